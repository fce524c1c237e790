"""Every key of the configuration explains itself, and the page of all keys is up to date."""

from dataclasses import dataclass

import pytest

from mqat.config import CHOICES, MINIMUM, load_config
from mqat.errors import UserError
from mqat.plan.config_keys import _CHOICES, find_keys, keys, meanings
from tools import config_reference

KEYS = {key.name: key for key in keys()}


@pytest.mark.parametrize("name", KEYS)
def test_a_key_has_a_meaning(name):
    key = KEYS[name]
    assert key.meaning or key.about, "write it behind the field in mqat/config.py, or above it"


def test_limits_and_choices_are_of_keys_that_exist():
    assert CHOICES.keys() | MINIMUM.keys() | _CHOICES.keys() <= KEYS.keys()


@pytest.mark.parametrize(
    "name", [n for n, key in KEYS.items() if key.choices and n in CHOICES and "decoder" not in n]
)
def test_a_choice_is_taken_and_another_word_is_not(name):
    for choice in KEYS[name].choices:
        load_config(None, [f"{name}={choice}"])
    with pytest.raises(UserError, match=name):
        load_config(None, [f"{name}=nonsense"])


def test_the_page_of_all_keys_is_up_to_date():
    page = config_reference.page()
    assert config_reference.PAGE.read_text("utf-8") == page, "run tools/config_reference.py"
    assert all(f"| `{name.rpartition('.')[2]}` |" in page for name in KEYS if not KEYS[name].about)


def test_meanings_are_the_comments_of_fields():
    @dataclass
    class Section:
        """Of a test."""

        plain: int = 1
        # Two lines
        # above it
        above: str = "#no comment"

        # of nobody

        behind: int = 2  # its own
        both: list[str] | None = None  # not the next one's

    assert meanings(Section) == {
        "plain": "", "above": "Two lines above it", "behind": "its own", "both": "not the next one's",
    }  # fmt: skip


def test_a_section_is_found_with_what_is_below_it():
    found = [key.name for key in find_keys("quantization.distill")]
    assert found[0] == "quantization.distill" and "quantization.distill.top_k" in found
    assert all(name.startswith("quantization.distill") for name in found)
    (one,) = find_keys("model.optim.lr")
    assert (one.takes, one.default) == ("number, at least 0", "1e-05")
    assert find_keys("quantization.rules.weight.scale")[0].choices[0] == "float32"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lr", "did you mean model.optim.lr, model.pretrain.lr?"),
        ("model.optm.lr", "did you mean model.optim.lr"),
        ("micro_batch", "did you mean model.micro_batch_size"),
        ("zzz", "mqat config lists them all"),
    ],
)
def test_an_unknown_key_is_answered_by_near_ones(name, hint):
    with pytest.raises(UserError, match=r"unknown key") as refused:
        find_keys(name)
    assert hint in str(refused.value)

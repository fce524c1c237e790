"""Whatever is wrong with a source, it gives transformers' numbers or one line."""

from __future__ import annotations

import logging

import pytest

from mqat.checkpoints import huggingface
from mqat.checkpoints.hf_config import decoder_config
from mqat.errors import UserError
from tests.unit.checkpoints import malformed_families, malformed_gguf
from tests.unit.checkpoints.malformed_families import EXPECTED_NEWER, NEWER
from tests.unit.checkpoints.malformed_sources import (
    EXPECTED,
    FAMILIES,
    good,
    outcome,
    write_directory,
)

COUNT = 150  # of each reader; tools/fuzz_sources.py runs thousands


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def outcomes(tmp_path, reader, seeds):
    return {seed: malformed_gguf.run_case(reader, seed, tmp_path / str(seed)) for seed in seeds}


@pytest.mark.parametrize("family", FAMILIES)
def test_unchanged_models_give_transformers_numbers(world, tmp_path, family):
    path = write_directory(good(family), tmp_path / "model")
    assert outcome(path, EXPECTED.of(family)) == "same numbers"


@pytest.mark.parametrize("family", NEWER)
def test_unchanged_models_of_other_families_give_transformers_numbers(world, tmp_path, family):
    """Of ChatGLM, the numbers of the tests' own formulas."""
    path = write_directory(malformed_families.good(family), tmp_path / "model")
    assert outcome(path, EXPECTED_NEWER.of(family)) == "same numbers"


@pytest.mark.parametrize("reader", ["huggingface", "gguf", "families"])
def test_malformed_models_give_the_same_numbers_or_one_line(world, tmp_path, reader):
    found = outcomes(tmp_path, reader, range(COUNT))
    wrong = {seed: case for seed, case in found.items() if case[1][0].isupper()}
    assert not wrong
    ends = [end for _, end in found.values()]
    assert ends.count("refused") > COUNT / 3 and ends.count("same numbers") > COUNT / 20  # control


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gemma3_text", "num_hidden_layers", 1 << 40),
        ("mixtral", "num_local_experts", 1 << 40),
        ("gemma3_text", "sliding_window_pattern", None),
        ("gemma2", "sliding_window", None),
        ("gemma2", "final_logit_softcapping", 30),
        ("qwen3_moe", "add_bias_linear", False),
        ("chatglm", "rope_ratio", 50),
    ],
)
def test_a_key_is_refused_by_its_name(family, key, value):
    """Numbers that would fill the memory, nulls that no transformers takes, keys of other families."""
    config = malformed_families.good(family).config
    decoder_config(config)  # control
    with pytest.raises(UserError, match=f"{key}( is|={value}|=)"):
        decoder_config(config | {key: value})


def test_without_the_check_of_tensors_sizes_would_cut_them(world, tmp_path, monkeypatch):
    """Control: the judge sees what the check keeps out."""
    case = good("llama")
    case.config["intermediate_size"] = 24
    path = write_directory(case, tmp_path / "model")
    assert outcome(path, EXPECTED.of("llama")) == "refused"
    monkeypatch.setattr(huggingface, "check_tensors", lambda *args, **names: None)
    assert outcome(path, EXPECTED.of("llama")).startswith("DIFFERENT NUMBERS")

"""Whatever is wrong with a source, it gives transformers' numbers or one line."""

from __future__ import annotations

import logging

import pytest

from mqat.checkpoints import huggingface
from tests.unit.checkpoints import malformed_gguf
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


@pytest.mark.parametrize("reader", ["huggingface", "gguf"])
def test_malformed_models_give_the_same_numbers_or_one_line(world, tmp_path, reader):
    found = outcomes(tmp_path, reader, range(COUNT))
    wrong = {seed: case for seed, case in found.items() if case[1][0].isupper()}
    assert not wrong
    ends = [end for _, end in found.values()]
    assert ends.count("refused") > COUNT / 3 and ends.count("same numbers") > COUNT / 20  # control


def test_without_the_check_of_tensors_sizes_would_cut_them(world, tmp_path, monkeypatch):
    """Control: the judge sees what the check keeps out."""
    case = good("llama")
    case.config["intermediate_size"] = 24
    path = write_directory(case, tmp_path / "model")
    assert outcome(path, EXPECTED.of("llama")) == "refused"
    monkeypatch.setattr(huggingface, "check_tensors", lambda *args, **names: None)
    assert outcome(path, EXPECTED.of("llama")).startswith("DIFFERENT NUMBERS")

"""Exports of a real model as transformers, vLLM and llama.cpp compute them, beside the trainer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tools.compare_servers import FORMS, ROOT, Workshop, difference

pytestmark = [pytest.mark.serve, pytest.mark.timeout(7200)]
PYTHON = ROOT / ".venv-serve" / "bin" / "python"
PAIRS = [
    (name, server)
    for name, form in FORMS.items()
    for server in form.servers
    if server != "vllm-default"  # kernels that round otherwise than the directory says
]


@pytest.fixture(scope="session")
def answers():
    """Of every form, by `tools/compare_servers.py`; the first test waits for all."""
    if not PYTHON.is_file():
        pytest.skip(f"{PYTHON.relative_to(ROOT)} is missing: make install-serve")
    return Workshop(Path(ROOT / "build" / "serve"), PYTHON).answers(list(FORMS))


def limit(answers, name):
    """What noise of the dtype's size on the input of every linear changes, and half of it more.

    llama.cpp rounds inputs of quantized linears to INT8 in blocks of 32: about as bfloat16 does.
    """
    like = {"gguf": "plain", "q8_0": "plain_bf16", "q4_0": "int4", "q4_1": "int4"}.get(name, name)
    reader = answers[like]["reader"]
    return 1.5 * difference(reader, {"logs": reader["noisy"], "texts": []}).mean


@pytest.mark.parametrize(("name", "server"), PAIRS)
def test_servers_compute_what_was_trained(answers, name, server):
    found, trainer = answers[name][server], answers[name]["trainer"]
    assert "error" not in found, found["error"]
    told, allowed = difference(trainer, found), limit(answers, name)
    assert told.mean <= allowed, told
    # Differences of tokens have no common sign: what is left of their mean.
    tokens = sum(map(len, trainer["logs"]))
    own = difference(trainer, trainer).perplexity
    assert abs(math.log(told.perplexity / own)) <= 4 * allowed / math.sqrt(tokens) + 1e-4, told


@pytest.mark.parametrize("server", ["transformers", "vllm"])
def test_another_model_is_found_by_the_same_limits(answers, server):
    for name, other in (("plain", "int8_pc_pt"), ("int4", "plain_bf16"), ("fp8", "int8")):
        told = difference(answers[name]["trainer"], answers[other][server])
        assert told.mean > limit(answers, name), (name, other)


def test_greedy_texts_of_the_unquantized_model_are_the_same(answers):
    for server in ("transformers", "vllm"):
        found = difference(answers["plain"]["trainer"], answers["plain"][server])
        assert (found.texts, found.of_texts) == (4, 4), server

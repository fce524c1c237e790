"""Exports of a real model as transformers, vLLM and llama.cpp compute them, beside the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.compare_servers import FORMS, ROOT, Workshop, difference

pytestmark = [pytest.mark.serve, pytest.mark.timeout(7200)]
PYTHON = ROOT / ".venv-serve" / "bin" / "python"
# Rounding of llama.cpp's own, of inputs to INT8 in blocks of 32; measured: see docs/export.md.
LLAMA_CPP = {"gguf": 1e-3}
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
    """Four times what noise on the input of every linear changes, as `mqat verify` allows."""
    reader = answers[name].get("reader", answers["plain"]["reader"])
    return 4 * difference(reader, {"logs": reader["noisy"], "texts": []}).mean


@pytest.mark.parametrize(("name", "server"), PAIRS)
def test_servers_compute_what_was_trained(answers, name, server):
    found = answers[name][server]
    assert "error" not in found, found["error"]
    trainer = answers[name]["trainer"]
    told = difference(trainer, found)
    assert told.mean <= LLAMA_CPP.get(name, limit(answers, name)), told
    assert told.perplexity == pytest.approx(difference(trainer, trainer).perplexity, rel=0.01)

"""The digests that a GPU's are compared with."""

import pytest
import torch

from mqat.kernels import device_check, operators
from mqat.kernels.cpu import passes

CPU = torch.device("cpu")


def test_the_compiled_library_and_the_reference_have_the_same_digests(monkeypatch):
    if passes.library() is None:
        pytest.skip("no C++ compiler here")
    compiled = device_check.digests(CPU)
    monkeypatch.setattr(passes, "library", lambda: None)
    assert device_check.digests(CPU) == compiled
    assert {call.split()[0] for call in compiled} == {
        "encode", "decode", "fake_quantize", "apply_mask", "accumulate", "int8", "stochastic_rows",
        "stochastic_columns",
    }  # fmt: skip


def test_another_bit_gives_another_digest(monkeypatch):
    decode = operators.decode
    before = device_check.digests(CPU)
    monkeypatch.setattr(operators, "decode", lambda *a, **k: -decode(*a, **k))
    after = device_check.digests(CPU)
    differing = {call for call in before if before[call] != after[call]}
    assert differing == {call for call in before if call.startswith("decode")}

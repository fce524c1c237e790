"""`import mqat` is light, and what it promises exists."""

import subprocess
import sys

import pytest

import mqat


def test_importing_mqat_loads_neither_torch_nor_megatron():
    code = "import sys, mqat; print([m for m in ('torch', 'megatron') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_loaded_from_its_module():
    code = (
        "import mqat; mqat.initialize(); "
        "print([n for n in mqat.__all__ if not callable(getattr(mqat, n))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'quantise'.*calibrate"):
        _ = mqat.quantise

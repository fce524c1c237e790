from dataclasses import replace
from pathlib import Path

import pytest

from mqat.checkpoints.dist_checkpoint import _check_schemes
from mqat.quant.algorithm import named_scheme

NAME = "decoder.layers.0.mlp.linear_fc1"


def description(scheme):
    layers = {NAME: scheme.to_dict()}
    return {"quantization": {"algorithm": scheme.name, "layers": layers}}


def test_a_checkpoint_fits_by_its_operands_whatever_they_were_called():
    saved = description(named_scheme("int4_awq"))
    for fitting in (named_scheme("int4"), replace(named_scheme("int4"), name="custom")):
        _check_schemes(Path("ckpt"), saved, {NAME: fitting})
    other = replace(named_scheme("w4a8_awq"), name="int4_awq")
    with pytest.raises(ValueError, match=f"{NAME} was calibrated as .*Use quantization.algorithm="):
        _check_schemes(Path("ckpt"), saved, {NAME: other})

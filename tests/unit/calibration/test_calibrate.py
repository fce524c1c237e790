"""Calibration on one process: scales come from real tokens, not from padding and filler."""

from dataclasses import replace

import pytest
import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.quant.observers import METHODS
from mqat.specs.policy import Policy, Rule
from tests.unit.model_fixtures import MODEL, epoch, padded_data, without_masks

# Tokens that cause larger activations in this model than the rows': ignoring the mask shows in maxima.
PAD, OTHER_PAD = 20, 300
OUTPUT = Rule("*.linear_qkv", operands={"output": {"format": "int8_full", "granularity": "tensor"}})


@pytest.fixture
def scales(world):
    """Every activation's scale, calibrated on `steps`."""
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.config import ModelConfig
    from mqat.evaluation.forward import run_layers
    from mqat.parallel.quantized_module import quantized_modules
    from mqat.specs.model import build_model

    def make(steps, method="max", algorithm="int8", **more):
        rules = (OUTPUT,) if algorithm == "int8" else ()
        layers = Policy(algorithm, 64, rules, "int8", "separate").schemes(MODEL)
        chunks = build_model(MODEL, ModelConfig(), layers, torch.float32)
        load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        calibrate(
            chunks, lambda: run_layers(chunks, steps), group=group, method=method, percentile=99.0,
            **more,
        )  # fmt: skip
        return {
            f"{name}.{kind}": float(quantizer.frozen_tensors.get("global_scale", quantizer.scale))
            for name, module in quantized_modules(chunks).items()
            for kind, quantizer in module.quantizers.items()
            if kind != "weight"
        }

    return make


@pytest.mark.parametrize("method", METHODS)
def test_scales_do_not_depend_on_what_padding_holds(scales, method):
    first, second = epoch(padded_data(PAD)), epoch(padded_data(OTHER_PAD))
    found = scales(first, method)
    assert {name.rpartition(".")[2] for name in found} == {"input", "output", "key", "value"}
    assert scales(second, method) == found
    controls = [scales(without_masks(steps), method) for steps in (first, second)]
    assert controls[0] != controls[1] and found not in controls


@pytest.mark.parametrize("method", METHODS)
def test_scales_with_and_without_filler_are_equal(scales, method):
    data = padded_data(PAD, rows=4)
    plain, filled = epoch(data), epoch(data, global_batch_size=16)
    assert [len(step) for step in (*plain, *filled)] == [2, 8]
    assert scales(filled, method) == scales(plain, method)
    if method != "max":  # fillers repeat a row, so that they move no maximum
        assert scales(without_masks(filled), method) != scales(without_masks(plain), method)


def test_the_rows_alone_and_padded_to_twice_their_length_have_the_same_scales(scales):
    data = padded_data(PAD)
    alone = replace(
        data,
        tokens=data.tokens[:, :17],
        loss_mask=data.loss_mask[:, :16],
        segments=data.segments[:, :16],
    )
    assert scales(epoch(data)) == scales(epoch(alone))
    assert scales(without_masks(epoch(data))) != scales(epoch(alone))


def test_filler_alone_is_no_calibration_text(scales):
    (step,) = epoch(padded_data(PAD, rows=2))
    assert not step[1]["token_mask"].any()
    with pytest.raises(ValueError, match="no calibration token reached this layer"):
        scales([step[1:]])


def test_headroom_is_of_upper_scales_alone(scales):
    steps = epoch(padded_data(PAD))
    plain, roomy = (scales(steps, algorithm="nvfp4", input_headroom=room) for room in (1.0, 1.75))
    for name, scale in plain.items():
        expected = scale * 1.75 if name.endswith(".input") else scale
        assert roomy[name] == pytest.approx(expected, rel=1e-6), name
    assert any(name.endswith(".input") for name in plain)
    assert scales(steps, input_headroom=1.75) == scales(steps)

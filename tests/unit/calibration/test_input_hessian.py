"""XᵀX, channel maxima and token counts on one process: of real tokens only."""

import pytest
import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.specs.policy import Policy
from tests.unit.model_fixtures import MODEL, epoch, padded_data, without_masks


@pytest.fixture
def collected(world):
    """`collected(steps)`: name -> XᵀX, channel maxima, tokens of every linear."""
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import exact_forward
    from mqat.calibration.input_hessian import collect_input_hessians
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.config import ModelConfig
    from mqat.evaluation.forward import run_layers
    from mqat.parallel.linear import decoder_linears
    from mqat.specs.model import build_model

    chunks = build_model(MODEL, ModelConfig(), Policy("int8", 64).schemes(MODEL), torch.float32)
    load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
    groups = {
        "group": parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        "dp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }

    def make(steps):
        linears = decoder_linears(chunks)
        with exact_forward(linears):
            found = collect_input_hessians(linears, lambda: run_layers(chunks, steps), **groups)
        return {name: (x.matrix(linears[name]), x.amax, int(x.tokens)) for name, x in found.items()}

    return make


def equal(first, second):
    return [
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
        for a, b in zip(first.values(), second.values(), strict=True)
    ]


def test_input_hessians_do_not_depend_on_what_padding_holds(collected):
    first, second = epoch(padded_data(20)), epoch(padded_data(300))
    found = collected(first)
    assert len(found) == 4 * MODEL.num_layers
    assert {tokens for *_, tokens in found.values()} == {4 * 16}  # half of each row
    assert all(equal(collected(second), found))
    ignored = collected(without_masks(first))
    assert {tokens for *_, tokens in ignored.values()} == {4 * 32}
    assert not any(equal(ignored, found))
    assert not any(equal(ignored, collected(without_masks(second))))


def test_filler_adds_nothing_to_input_hessians(collected):
    data = padded_data(20)
    plain, filled = epoch(data), epoch(data, global_batch_size=16)
    assert all(equal(collected(filled), collected(plain)))
    assert not any(equal(collected(without_masks(filled)), collected(without_masks(plain))))


def test_the_input_hessian_is_that_of_the_real_rows_alone(world):
    from mqat.calibration.input_hessian import _empty
    from mqat.config import ModelConfig
    from mqat.parallel.linear import decoder_linears
    from mqat.parallel.quantized_module import set_token_mask
    from mqat.specs.model import build_model

    chunks = build_model(MODEL, ModelConfig(), Policy("int8", 64).schemes(MODEL), torch.float32)
    linear = next(iter(decoder_linears(chunks).values()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 10, (8, 2, MODEL.hidden_size), generator=generator).float()  # exact sums
    mask = torch.rand(2, 8, generator=generator) < 0.5
    real = x[mask.t()]
    x[~mask.t()] = float("nan")  # padding cannot spoil anything
    set_token_mask(linear, mask)
    hessian, maxima = (_empty({"a": linear}, names)[1]["a"] for names in (["a"], []))
    hessian.observe_(linear, x, 1)
    maxima.observe_(linear, x, 1)
    assert maxima.hessian.numel() == 0 and torch.equal(maxima.amax, hessian.amax)
    assert int(maxima.tokens) == int(hessian.tokens)
    assert torch.equal(hessian.matrix(linear), (real.t() @ real).double())
    assert torch.equal(hessian.diagonal(linear), hessian.matrix(linear).diagonal())
    assert torch.equal(hessian.amax, real.abs().amax(dim=0))
    assert int(hessian.tokens) == len(real) == int(mask.sum()) and not hessian.flag
    set_token_mask(linear, torch.zeros_like(mask))
    hessian.observe_(linear, x, 1)
    assert int(hessian.tokens) == len(real) and not hessian.flag
    set_token_mask(linear, None)
    hessian.observe_(linear, x, 1)
    assert hessian.flag  # control: it was there

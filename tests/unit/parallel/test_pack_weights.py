import pytest
import torch

from mqat.parallel.linear import quantized_linears
from mqat.parallel.pack_weights import pack_weights_
from mqat.quant.algorithm import ALGORITHMS
from mqat.quant.formats import INT4
from tests.unit.model_fixtures import microbatches, switch_off

LOWERED = [name for name in ALGORITHMS if name != "null"]
COMMON = [
    "int8",
    "int8_pc_pt",
    "int8_wo",
    "int4",
    "int4_w_int8_a",
    "w_uint4_asym",
    "8da4w",
    "fp8",
    "nf4",
]


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("algorithm", LOWERED)
def test_a_lowered_model_gives_the_logits_of_the_trained_one_from_fewer_bytes(
    calibrated, algorithm
):
    from mqat.evaluation.forward import logits

    chunks = calibrated(algorithm)
    tokens = microbatches()[0]["tokens"]
    expected = logits(chunks, tokens)
    before, after = pack_weights_(chunks)
    assert all(linear.weight.numel() == 0 for linear in quantized_linears(chunks).values())
    # Of 32 bits: 8 and a scale, or 4 with scales of groups of 16 to 64.
    assert after <= before * (0.3 if "8" in algorithm.split("_")[0] else 0.25)
    found = logits(chunks, tokens)
    # float32 sums in another order; flipped codes of later layers' inputs add to it
    assert distance(found, expected) < (1e-3 if algorithm in COMMON else 2e-2)


@pytest.mark.parametrize("length", [1, 32])
@pytest.mark.parametrize("algorithm", COMMON)
def test_in_bfloat16_they_agree_within_its_rounding(calibrated, algorithm, length):
    """One token and two times 32: torch's kernels for few tokens, and decoded weights."""
    from mqat.evaluation.forward import logits

    chunks = calibrated(algorithm, torch.bfloat16)
    tokens = microbatches()[0]["tokens"][:, :length]
    expected = logits(chunks, tokens)
    switch_off(chunks)
    unquantized = logits(chunks, tokens)
    for linear in quantized_linears(chunks).values():
        for quantizer in linear.quantizers.values():
            quantizer.is_enabled = True
    pack_weights_(chunks)
    found = logits(chunks, tokens)
    # every linear's output is rounded to 8 bits in both, weights in one of them; flipped input codes
    assert distance(found, expected) < 2.0**-4
    assert distance(unquantized, expected) > 2.0**-2  # control


def test_the_format_in_use_is_lowered(calibrated):
    """A checkpoint may stop while bits are still on their way down."""
    from mqat.evaluation.forward import logits

    chunks = calibrated("int8")
    tokens = microbatches()[0]["tokens"]
    whole = logits(chunks, tokens)
    for linear in quantized_linears(chunks).values():
        linear.weight_quantizer.active_format = INT4
    staged = logits(chunks, tokens)
    pack_weights_(chunks)
    assert distance(logits(chunks, tokens), staged) < 1e-3
    assert distance(whole, staged) > 1e-2  # control


def test_what_has_no_scales_is_refused(calibrated):
    chunks = calibrated("int8")
    next(iter(quantized_linears(chunks).values())).input_quantizer.reset()
    with pytest.raises(ValueError, match="has no scales yet"):
        pack_weights_(chunks)

import pytest
import torch

from mqat.parallel.linear import quantized_linears
from mqat.parallel.lowering import lower_
from mqat.quant.formats import INT4
from mqat.quant.gemm_lowered import lower_weight, lowered_matmul
from mqat.quant.granularity import PerGroup
from mqat.quant.scales import compute_amax
from mqat.quant.scheme import LinearScheme, TensorScheme, named_scheme
from tests.unit.parallel.conftest import microbatches

ALGORITHMS = ["int8", "int8_wo", "int4", "int4_w_int8_a", "fp8"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_lowered_model_gives_the_logits_of_the_trained_one_from_fewer_bytes(
    calibrated, algorithm
):
    from mqat.training.step import logits

    chunks = calibrated(algorithm)
    tokens = microbatches()[0]["tokens"]
    expected = logits(chunks, tokens)
    before, after = lower_(chunks)
    assert all(linear.weight.numel() == 0 for linear in quantized_linears(chunks).values())
    # One byte of four. INT4: half a byte in each of two layouts, and scales of groups of 64 twice.
    assert after <= before * 0.29
    found = logits(chunks, tokens)
    # float32 sums in another order; flipped INT8 codes of later layers add to it
    assert float((found - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_torchs_int4_kernel_and_the_unpacked_gemm_agree(rows):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 128, generator=generator)
    scheme = named_scheme("int4", group_size=64)
    scale = (compute_amax(w, PerGroup(64)) / 7).bfloat16().float()
    lowered = lower_weight(w, scale, scheme)
    x = torch.randn(rows, 128, generator=generator)
    exact = lowered_matmul(x, None, lowered)
    half = lowered_matmul(x.bfloat16(), None, lowered)
    assert lowered.torch_pack is not None
    # bfloat16 rounds x and the result to 8 bits
    assert float((half.float() - exact).norm() / exact.norm()) < 2.0**-7
    assert float((x @ w.t() - exact).norm() / exact.norm()) > 0.05  # control: it is quantized


def test_scales_off_the_bfloat16_grid_are_not_rounded_into_torchs_kernel():
    scheme = LinearScheme("x", TensorScheme(INT4, PerGroup(64)), None)
    assert lower_weight(torch.randn(32, 128), torch.rand(32, 2) + 0.1, scheme).torch_pack is None


def test_what_cannot_be_lowered_is_refused(calibrated):
    fp8 = named_scheme("fp8").input
    mixed = LinearScheme("mixed", named_scheme("int8").weight, fp8)
    with pytest.raises(ValueError, match="no low-precision inference"):
        lower_weight(torch.randn(8, 8), torch.ones(8), mixed)
    chunks = calibrated("int8")
    next(iter(quantized_linears(chunks).values())).input_quantizer.reset()
    with pytest.raises(ValueError, match="has no scales yet"):
        lower_(chunks)

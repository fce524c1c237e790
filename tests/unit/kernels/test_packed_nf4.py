import pytest
import torch

from mqat.kernels.packed_nf4 import DoubleScales, nf4_quantize
from mqat.quant.formats import NF4
from mqat.quant.functional import fake_quantize
from mqat.quant.granularity import PerGroup
from mqat.quant.scales import compute_amax


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_double_quantization_it_is_fake_quantization(dtype):
    w = weight(48, 128).to(dtype)
    stored = nf4_quantize(w, double=False)
    expected = fake_quantize(w, compute_amax(w, PerGroup(64)), NF4, PerGroup(64))
    assert torch.equal(stored.decode(dtype), expected)
    assert not torch.equal(expected, w)


def test_memory_is_a_little_over_half_a_byte_a_weight():
    w = weight(512, 1024)
    assert nf4_quantize(w, double=False).num_bytes * 8 / w.numel() == 4.5
    bits = nf4_quantize(w).num_bytes * 8 / w.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_double_quantized_maxima_are_within_half_a_step_and_cost_little_accuracy():
    w = weight(256, 512, seed=1) * torch.rand(256, 1, generator=torch.Generator().manual_seed(2))
    amax = compute_amax(w, PerGroup(64)).view(-1)
    double, single = nf4_quantize(w), nf4_quantize(w, double=False)
    assert isinstance(double.scales, DoubleScales) and double.scales.codes.dtype == torch.int8
    error = (double.scales.values() - amax).abs()
    assert (error <= 0.5 * double.scales.steps.repeat_interleave(256) * (1 + 1e-4)).all()
    assert error.max() > 0  # control: they are quantized
    rms = [(s.decode(torch.float32) - w).pow(2).mean().sqrt() for s in (single, double)]
    assert rms[1] / rms[0] == pytest.approx(1.0, abs=0.02)


def test_packing_again_changes_nothing():
    once = nf4_quantize(weight(8, 64), double=False)
    again = nf4_quantize(once.decode(torch.float32), double=False)
    assert torch.equal(again.packed, once.packed) and torch.equal(again.scales, once.scales)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 65), (2, 3, 64)])
def test_odd_sizes_are_padded_and_cut_again(shape):
    w = weight(*shape, seed=3)
    values = nf4_quantize(w).decode(torch.bfloat16)
    assert values.shape == w.shape and values.dtype == torch.bfloat16
    assert (values.float() - w).abs().max() < 0.2 * w.abs().max()


def test_zeros_stay_zero_among_large_blocks():
    w = weight(4, 64)
    w[2] = 0.0
    assert (nf4_quantize(w, double=False).decode(torch.float32)[2] == 0).all()
    assert nf4_quantize(torch.zeros(4, 64)).decode(torch.float32).tolist() == [[0.0] * 64] * 4


@pytest.mark.parametrize("bad", [torch.empty(0), torch.tensor([1.0, float("nan")])])
def test_what_cannot_be_stored_is_refused(bad):
    with pytest.raises(ValueError, match="empty or not finite"):
        nf4_quantize(bad)

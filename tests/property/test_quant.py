import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mqat.quant.formats import INT4, INT8
from mqat.quant.functional import compute_amax, compute_scale, fake_quantize
from mqat.quant.granularity import PerChannel, PerGroup


def _matrix(rows: int, cols: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(rows=st.integers(1, 8), cols=st.integers(1, 64), seed=st.integers(0, 2**31))
def test_rounding_error_is_at_most_half_a_step(rows, cols, seed):
    x = _matrix(rows, cols, seed)
    scale = compute_scale(compute_amax(x, PerChannel()), INT8)
    error = (fake_quantize(x, scale, INT8, PerChannel()) - x).abs()
    assert (error <= 0.5 * scale[:, None] * (1 + 1e-4)).all()  # float32 division and product


@settings(deadline=None)
@given(cols=st.integers(1, 100), size=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_fake_quantization_is_idempotent(cols, size, seed):
    x = _matrix(4, cols, seed)
    scale = compute_scale(compute_amax(x, PerGroup(size)), INT4)
    once = fake_quantize(x, scale, INT4, PerGroup(size))
    assert torch.equal(fake_quantize(once, scale, INT4, PerGroup(size)), once)

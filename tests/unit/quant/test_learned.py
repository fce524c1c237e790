"""Learned scales against torch's own learnable fake quantization and hand-computed gradients."""

import pytest
import torch

from mqat.quant.algorithm import named_scheme
from mqat.quant.formats import FP8_E4M3, INT2_ELASTIC, INT4, INT8, TERNARY
from mqat.quant.functional import fake_quantize
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor
from mqat.quant.learned import check_learnable, fake_quantize_learned, lsq_grad_scale, served_scale
from mqat.quant.scheme import TensorScheme


def gradients(x, scale, upstream, granularity, fmt=INT4, **options):
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = fake_quantize_learned(x, scale, fmt, granularity, **options)
    y.backward(upstream)
    return y.detach(), x.grad, scale.grad


@pytest.mark.parametrize("fmt", [INT4, INT8, TERNARY, INT2_ELASTIC])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(8), PerGroup(5)])
def test_values_are_those_of_the_frozen_scale(fmt, granularity):
    x = torch.randn(6, 16)
    scale = torch.rand(granularity.scale_shape((6, 16))) * 0.3 + 0.01
    learned = fake_quantize_learned(x, scale, fmt, granularity)
    assert torch.equal(learned, fake_quantize(x, scale, fmt, granularity))


def test_per_tensor_gradients_equal_torchs_learnable_fake_quantize():
    x, upstream = 2 * torch.randn(32, 16), torch.randn(32, 16)
    scale = torch.tensor([0.2])
    theirs_x, theirs_s = x.clone().requires_grad_(), scale.clone().requires_grad_()
    zero = torch.zeros(1)
    torch._fake_quantize_learnable_per_tensor_affine(
        theirs_x, theirs_s, zero, INT4.qmin, INT4.qmax, 0.25
    ).backward(upstream)
    _, x_grad, scale_grad = gradients(x, scale, upstream, PerTensor(), grad_scale=0.25)
    assert torch.allclose(scale_grad, theirs_s.grad, rtol=1e-4)
    assert torch.equal(x_grad, theirs_x.grad)
    assert (x_grad == 0).any() and (x_grad != 0).any()  # control: some values are clipped


def test_gradient_of_the_scale_by_hand():
    x = torch.tensor([[0.26, -0.26, 5.0, -5.0]])
    scale, upstream = torch.tensor([0.1]), torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    # 3 - 2.6, -3 + 2.6, clipped at 7, clipped at -8
    expected = 1 * 0.4 + 2 * -0.4 + 4 * 7 + 8 * -8
    _, _, grad = gradients(x, scale, upstream, PerTensor())
    assert grad.item() == pytest.approx(expected, rel=1e-5)
    _, _, grad = gradients(x, scale, upstream, PerTensor(), rule="pact")
    assert grad.item() == pytest.approx((4 - 8) * 7)  # d alpha = 7 d s


def test_a_group_gets_the_gradient_of_its_own_elements():
    x, upstream = torch.randn(3, 12), torch.randn(3, 12)
    scale = torch.rand(3, 3) * 0.2 + 0.05
    _, _, grouped = gradients(x, scale, upstream, PerGroup(5))
    for row in range(3):
        for index, cols in enumerate((slice(0, 5), slice(5, 10), slice(10, 12))):
            piece = (slice(row, row + 1), cols)
            _, _, alone = gradients(
                x[piece], scale[row, index : index + 1], upstream[piece], PerTensor()
            )
            assert torch.allclose(grouped[row, index], alone[0], rtol=1e-5, atol=1e-6)


def test_training_the_scale_lowers_the_error():
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    scale = torch.tensor([1.0], requires_grad=True)
    optimizer = torch.optim.Adam([scale], lr=0.02)
    errors = []
    for _ in range(100):
        error = (fake_quantize_learned(x, scale, INT4, PerTensor()) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.4 * errors[0]


def test_grad_scale_is_the_papers():
    assert lsq_grad_scale(100, INT4) == pytest.approx(1 / (100 * 7) ** 0.5)


def test_floating_point_formats_are_refused():
    with pytest.raises(AssertionError, match="fp8_e4m3 has no one step"):
        fake_quantize_learned(torch.ones(2), torch.ones(1), FP8_E4M3, PerTensor())


def test_gradient_of_a_stretched_scale_by_hand():
    x = torch.tensor(
        [[0.06, -0.12, 0.3, -0.3]]
    )  # ratios 0.6, -1.2, 3 and -3: levels 0.5, -1.5, ends
    scale, upstream = torch.tensor([0.1]), torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    expected = 1 * -0.1 + 2 * -0.3 + 4 * 1.5 + 8 * -1.5
    _, x_grad, grad = gradients(x, scale, upstream, PerTensor(), fmt=INT2_ELASTIC)
    assert grad.item() == pytest.approx(expected, rel=1e-5)
    assert x_grad.tolist() == [[1.0, 2.0, 0.0, 0.0]]


def test_a_served_scale_is_positive_and_on_its_grid_and_gets_the_whole_gradient():
    scale = torch.tensor([1 / 3, -0.5, 0.0], requires_grad=True)
    served = served_scale(scale, torch.bfloat16)
    assert served.tolist() == [171 / 512, 2.0**-24, 2.0**-24]
    served.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert scale.grad.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (named_scheme("8da4w").input, "dynamic scales"),
        (named_scheme("fp8").weight, "format 'fp8_e4m3'"),
        (named_scheme("nf4").weight, "format 'nf4'"),
        (named_scheme("nvfp4").weight, "format 'fp4_e2m1'"),
        (named_scheme("w_uint4_asym").weight, "a zero point"),
        (TensorScheme(INT4, PerGroup(32), torch.float8_e8m0fnu), "grid 'float8_e8m0fnu'"),
    ],
)
def test_scales_that_cannot_be_learned_are_refused_with_the_reason(scheme, reason):
    with pytest.raises(ValueError, match=rf"fc1\.weight: a learned scale needs .*{reason}"):
        check_learnable(scheme, "fc1.weight")

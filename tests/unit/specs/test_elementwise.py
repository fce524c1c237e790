"""RMSNorm and SwiGLU against torch's own, by either backend."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from mqat.kernels.reference import swiglu
from mqat.specs.elementwise import LayerNorm, OutputNorm, RmsNorm, Swiglu


class Config:
    gated_linear_unit = True
    activation_func = staticmethod(F.silu)


def results(function, x, weights, seed=1):
    inputs = [x.detach().requires_grad_(), *weights]
    y = function(inputs[0])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    return y, *torch.autograd.grad(y, inputs, dy)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# Roundings of the last bit only: the sums and exponentials are float32 in all.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("width", [64, 200, 1001])
def test_norm_and_swiglu_equal_torchs(backend, dtype, width):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(7, 3, width, generator=generator) * 3).to(dtype)
    norm = RmsNorm(width, eps=1e-5, dtype=dtype)
    with torch.no_grad():
        norm.weight += 0.1 * torch.randn(width, generator=generator).to(dtype)
    found = results(norm, x, [norm.weight])
    expected = results(lambda t: F.rms_norm(t, (width,), norm.weight, 1e-5), x, [norm.weight])
    x = (torch.randn(7, 3, 2 * width, generator=generator) * 4).to(dtype)
    found += results(Swiglu(Config), x, [])
    expected += results(swiglu, x, [])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and relative(a, b) < LIMITS[dtype]
    assert relative(found[0] * 1.01, expected[0]) > LIMITS[dtype]  # control


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kind", [RmsNorm, LayerNorm])
def test_norms_multiply_by_one_more_than_a_zero_centred_weight(backend, kind, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(7, 3, 200, generator=generator) * 3).to(dtype)
    norm = kind(200, eps=1e-5, dtype=dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(0.1 * torch.randn(200, generator=generator))
    plain = results(norm, x, [*norm.parameters()])
    norm.zero_centered_gamma = True
    found = results(norm, x, [*norm.parameters()])

    def reference(t):
        centred = t.double() - t.double().mean(-1, keepdim=True) * (kind is LayerNorm)
        normed = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        bias = norm.bias.double() if kind is LayerNorm else 0
        return (normed * (1 + norm.weight.double()) + bias).to(dtype)

    expected = results(reference, x, [*norm.parameters()])
    # LayerNorm1P rounds 1 + weight, as transformers does.
    limit = LIMITS[dtype] * (2 if kind is LayerNorm else 1)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and relative(a, b) < limit
    assert relative(plain[0], expected[0]) > 0.1  # control


def test_what_a_layer_adds_is_normalized_with_its_bias():
    config = type("Config", (), {"hidden_size": 8, "layernorm_epsilon": 1e-5})
    add = OutputNorm(config, lambda config, hidden_size, eps: RmsNorm(hidden_size, eps=eps))
    x, bias, residual = torch.randn(3, 1, 8), torch.randn(8), torch.randn(3, 1, 8)
    found = add(False, False)((x, bias), residual, 0.5)
    expected = residual + F.rms_norm(x + bias, (8,), torch.ones(8), 1e-5)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(
        add(False, False)((x, None), residual, 0.5), residual + add.norm(x), atol=1e-6
    )


def test_extreme_gates_and_nan_come_out_as_torchs(backend):
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4, float("inf"), float("nan")])
    x = torch.cat([gate, torch.ones(8)]).requires_grad_()
    y, grad = results(Swiglu(Config), x, [])
    expected, expected_grad = results(swiglu, x, [])
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-30)
    finite = slice(0, 6)
    torch.testing.assert_close(grad[finite], expected_grad[finite], rtol=1e-5, atol=1e-30)


def test_a_row_does_not_depend_on_the_rows_beside_it(backend):
    x = torch.randn(9, 130).bfloat16()
    norm, swiglu = RmsNorm(130, eps=1e-5, dtype=torch.bfloat16), Swiglu(Config)
    for function in (norm, swiglu):
        assert torch.equal(function(x)[4:6], function(x[4:6].contiguous()))


def test_only_the_input_is_kept_for_backward(backend):
    kept = []
    x = torch.randn(16, 1, 256).bfloat16().requires_grad_()
    norm = RmsNorm(256, eps=1e-5, dtype=torch.bfloat16)

    def bytes_kept(function):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
        ):
            function(x)
        return sum(kept)

    size = x.numel() * 2
    assert bytes_kept(norm) <= size + 256 * 2 + 16 * 4  # and the weight, and a number per row
    assert bytes_kept(Swiglu(Config)) == size
    assert bytes_kept(swiglu) > size  # control


def test_other_activations_are_refused():
    class Gelu:
        gated_linear_unit = True
        activation_func = staticmethod(F.gelu)

    with pytest.raises(ValueError, match="SwiGLU"):
        Swiglu(Gelu)


def test_gradients_of_gradients_are_refused_not_zero():
    x = torch.randn(4, 64, requires_grad=True)
    (first,) = torch.autograd.grad(RmsNorm(64, eps=1e-6)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()

"""Scales and codes are decided by divisions that every device rounds alike."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mqat.calibration.clipping import WeightShard
from mqat.calibration.clipping_methods import CLIPPING_METHODS
from mqat.calibration.scale_search import InputStatistics, shard_losses
from mqat.calibration.smoothquant import smoothquant_scale
from mqat.kernels import reference
from mqat.kernels.packed_nf4 import nf4_quantize
from mqat.quant.algorithm import ALGORITHMS, named_scheme
from mqat.quant.formats import INT4, INT8
from mqat.quant.functional import quantize
from mqat.quant.granularity import PerBlock, PerGroup, PerTensor, PerToken
from mqat.quant.histogram import entropy_amax, mse_amax
from mqat.quant.observers import ActivationObserver
from mqat.quant.qparams import rounded, statistic_of
from mqat.quant.quantizer import Quantizer
from mqat.quant.scales import _largest_magnitude, compute_amax, compute_scale, divide
from mqat.quant.scheme import TensorScheme


class Reciprocals(TorchDispatchMode):
    """Remembers divisions by Python numbers: CUDA multiplies by the reciprocal, inexact but for 2**k."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            divisor = args[1]
            if not isinstance(divisor, torch.Tensor) and math.frexp(divisor)[0] != 0.5:
                self.found.append(divisor)
        return func(*args, **(kwargs or {}))


def reciprocals(function, *arguments):
    with Reciprocals() as mode:
        function(*arguments)
    return mode.found


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def use(scheme: TensorScheme, x):
    """Freezes scales, quantizes, and quantizes in the format of another phase."""
    shape = None if scheme.is_dynamic else tuple(x.shape)
    quantizer = Quantizer(scheme, shape, "x")
    quantizer.freeze_(statistic_of(x, scheme), x.abs().amax().reshape(1))
    quantizer(x)
    scale, zero_point = quantizer.qparams(x)
    quantize(x, scale, scheme.format, scheme.granularity, zero_point=zero_point)
    if scheme.format == INT4:
        quantizer.active_format = INT8
        quantizer(x)
    if not (scheme.format.levels or scheme.is_asymmetric):
        scale, names = quantizer.qparams(x)[0], (scheme.format.name, str(scheme.granularity))
        reference.encode(x, scale, None, *names, None, True)
        reference.fake_quantize_with_mask(x, scale, *names, None)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "null"])
def test_no_scale_or_code_of_a_named_algorithm_depends_on_the_device(algorithm):
    scheme = named_scheme(algorithm)
    for operand, x in ((scheme.weight, normal(16, 512)), (scheme.input, normal(4, 2, 512))):
        if operand is not None:
            assert reciprocals(use, operand, x) == []


def test_no_clipping_point_or_factor_depends_on_the_device():
    x, weight = normal(64, 256), normal(16, 256, seed=1)
    int8 = named_scheme("int8")

    def chosen():
        observer = ActivationObserver("mse")
        observer.observe_(x)
        for choose in (mse_amax, entropy_amax):
            choose(observer.histogram, x.abs().amax().reshape(1), int8.input.format)
        for scheme in (int8.weight, named_scheme("int4").weight):
            statistic = statistic_of(weight, scheme)
            shard = WeightShard(weight, statistic, scheme, None, (x.t() @ x).double())
            for name in ("mse", "awq", "sawb"):
                method = CLIPPING_METHODS[name]
                method.choose(statistic, method.measure(shard), scheme)
        inputs = InputStatistics((x.t() @ x).double(), x.abs().amax(dim=0), len(x))
        factors = smoothquant_scale(inputs.amax, weight.abs().amax(dim=0), 0.5)[None]
        shard_losses([weight], inputs, factors, int8.weight, int8.input)
        nf4_quantize(weight)

    assert reciprocals(chosen) == []


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerToken(), PerGroup(16), PerBlock(3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maxima_in_one_kernel_as_on_cuda_are_the_same_bits(granularity, dtype):
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 3], x[1, 0], x[3] = torch.nan, -torch.inf, -0.0
    expected = compute_amax(x, granularity)
    assert bool(expected.isnan().any())
    found = granularity.largest(x, _largest_magnitude).float()
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_a_division_by_a_number_is_noticed():
    amax = normal(8).abs()
    for wrong in (lambda: amax / 127.0, lambda: amax.clone().div_(448)):
        assert len(reciprocals(wrong)) == 1
    assert reciprocals(lambda: amax / 2) == []


def test_dividing_by_a_filled_tensor_gives_the_correctly_rounded_quotient():
    x = normal(10_000).abs()
    for number in (127, 448, 7.5, 6 * 448):
        exact = (x.double() / number).float()
        assert torch.equal(divide(x, number), exact)
        assert not torch.equal(x * (1 / torch.tensor(number)), exact)  # control: what CUDA makes
    assert torch.equal(compute_scale(x, INT8), x / 127)


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_pc_pt", "int8_pc_pt", "nvfp4"])
@pytest.mark.parametrize("amax", [1e-4, 1e-8, 1e-20, 1e-30])
def test_tensors_close_to_zero_keep_the_precision_of_their_format(name, amax):
    """The largest element of each group comes back within half a step of its format's largest code."""
    x = (torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1) * amax
    scheme = named_scheme(name).weight
    error = (rounded(x, scheme) - x).abs().amax() / amax
    assert 0 < error < {"int8": 1 / 250, "int8_pc_pt": 1 / 250}.get(name, 1 / 5)
    usual = (rounded(x / amax, scheme) - x / amax).abs().amax()
    assert error == pytest.approx(usual.item(), rel=0.3)

import pytest
import torch
from torch.ao.quantization import MinMaxObserver

from mqat.quant.formats import FORMATS
from mqat.quant.granularity import PerTensor
from mqat.quant.observers import ActivationObserver
from mqat.quant.quantizer import Quantizer
from mqat.quant.scheme import TensorScheme

UINT8 = FORMATS["uint8"]


def observed(*parts: torch.Tensor, method: str = "percentile") -> ActivationObserver:
    observer = ActivationObserver(method)
    for part in parts:
        observer.observe_(part)
    return observer


def test_histograms_of_parts_add_up_to_the_histogram_of_the_whole():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(2))
    whole, first, second = observed(x), observed(x[:3000]), observed(x[3000:])
    assert torch.equal(whole.histogram, first.histogram + second.histogram)
    assert torch.equal(whole.statistics, torch.maximum(first.statistics, second.statistics))
    assert int(whole.histogram.sum()) == x.numel()
    assert whole.amax().tolist() == [x.abs().max().item()]


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
def test_a_percentile_is_within_one_bin_above_the_exact_one_and_never_above_the_maximum(percentile):
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(3))
    exact = x.abs().kthvalue(round(100 * percentile)).values.item()
    found = observed(x).amax(percentile).item()
    assert exact <= found <= min(exact * (1 + 1 / 128), x.abs().max().item())


def test_a_share_that_is_reached_exactly_needs_no_further_bin():
    x = torch.full((1000,), 0.25)
    x[-1] = 64.0
    assert observed(x).amax(99.9).item() == 0.25 * (1 + 1 / 128)
    assert observed(x).amax(99.95).item() == 64.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_and_dtype_in_memory_do_not_matter(dtype):
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(4)).to(dtype)
    plain, strided = observed(x), observed(x.float().transpose(0, 1))
    assert torch.equal(plain.histogram, strided.histogram)
    assert torch.equal(plain.statistics, strided.statistics)


def test_an_empty_tensor_changes_nothing():
    observer = observed(torch.empty(0, 8))
    assert observer.statistics.tolist() == [0.0, 0.0, 0.0, 0.0]
    assert not observer.histogram.any()


def test_statistics_are_not_part_of_the_state_dict_and_need_no_gradient():
    observer = observed(torch.ones(3, requires_grad=True))
    assert not observer.state_dict()
    assert not observer.statistics.requires_grad


def test_a_layer_that_saw_nothing_is_named():
    with pytest.raises(ValueError, match=r"layer\.7: no calibration token"):
        ActivationObserver().check("layer.7")


@pytest.mark.parametrize("method", ["max", "percentile"])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_layer_that_saw_nan_or_infinity_is_named_even_after_finite_batches(bad, method):
    observer = observed(torch.tensor([1.0, bad]), torch.ones(2), method=method)
    with pytest.raises(ValueError, match=r"layer\.7: input holds NaN"):
        observer.check("layer.7")
    observed(torch.ones(2), method=method).check("layer.7")  # control: finite values pass


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
def test_percentiles_out_of_range_are_refused(percentile):
    with pytest.raises(ValueError, match=r"must be in \(0, 100\]"):
        observed(torch.ones(2)).amax(percentile)


def test_a_percentile_without_a_histogram_is_refused():
    with pytest.raises(ValueError, match="method='percentile'"):
        observed(torch.ones(2), method="max").amax(99.0)


def test_ranges_of_parts_merge_to_the_range_of_the_whole_and_contain_zero():
    parts = torch.tensor([-3.0, 1.0]), torch.tensor([0.5, 8.0])
    observer = observed(*parts, method="max")
    assert observer.statistics.tolist() == [3.0, 8.0, 1.0, 0.0]
    scheme = TensorScheme(UINT8, PerTensor(), is_asymmetric=True)
    assert observer.calibrated(scheme, 100.0).tolist() == [[3.0], [8.0]]
    assert observed(torch.ones(3)).calibrated(scheme, 100.0).tolist() == [[0.0], [1.0]]


def test_a_clipping_point_cuts_both_ends_of_a_range():
    x = torch.cat([torch.linspace(-0.5, 1, 20_000), torch.tensor([-900.0, 500.0])])
    scheme = TensorScheme(UINT8, PerTensor(), is_asymmetric=True)
    low, high = observed(x).calibrated(scheme, 99.9).flatten().tolist()
    assert low == high and 0.99 < high < 1.02
    assert observed(x).calibrated(scheme, 100.0).flatten().tolist() == [900.0, 500.0]  # control


@pytest.mark.parametrize("shift", [-2.0, 0.3, 5.0])
def test_static_ranges_agree_with_torch(shift):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(5)) + shift
    observer = MinMaxObserver(dtype=torch.quint8, eps=1e-12)
    observer(x)
    expected_scale, expected_zero = observer.calculate_qparams()
    quantizer = Quantizer(TensorScheme(UINT8, PerTensor(), is_asymmetric=True), None, "x")
    quantizer.start_observing()
    for part in x:
        quantizer(part)
    quantizer.freeze_(quantizer.observer.calibrated(quantizer.scheme, 100.0))
    assert quantizer.scale.item() == pytest.approx(expected_scale.item(), rel=1e-6)
    assert quantizer.zero_point.tolist() == expected_zero.tolist()
    scale, zero = float(quantizer.scale), int(quantizer.zero_point)
    assert torch.equal(quantizer(x), torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255))


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="'magic' is unknown"):
        ActivationObserver("magic")

import pytest
import torch

from mqat.quant.algorithm import ALGORITHMS, named_scheme
from mqat.quant.formats import FORMATS
from mqat.quant.functional import dequantize, quantize
from mqat.quant.granularity import PerChannel
from mqat.quant.qparams import statistic_of
from mqat.quant.quantizer import Quantizer
from mqat.quant.scheme import TensorScheme

INT8 = named_scheme("int8")
X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


def weight_quantizer() -> Quantizer:
    return Quantizer(INT8.weight, tuple(X.shape), "fc1.weight")


def input_quantizer() -> Quantizer:
    return Quantizer(INT8.input, None, "fc1.input")


def through_codes(quantizer, x):
    """What a server makes of the codes it stores."""
    scale, zero_point = quantizer.qparams(x)
    fmt, granularity = quantizer.format, quantizer.scheme.granularity
    codes = quantize(x, scale, fmt, granularity, zero_point=zero_point)
    return dequantize(codes, scale, granularity, x.dtype, zero_point=zero_point, fmt=fmt)


def test_it_is_the_identity_until_frozen():
    quantizer = weight_quantizer()
    assert quantizer(X) is X
    quantizer.freeze_(X.abs().amax(dim=1))
    assert quantizer.is_frozen
    assert not torch.equal(quantizer(X), X)


def test_frozen_it_returns_at_most_255_values_per_row_and_what_its_codes_mean():
    quantizer = weight_quantizer()
    x = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1))
    quantizer.freeze_(x.abs().amax(dim=1))
    assert all(row.unique().numel() <= 255 for row in quantizer(x))
    assert torch.equal(quantizer(x), through_codes(quantizer, x))


def test_observing_passes_its_input_on_and_freezing_ends_it():
    quantizer = input_quantizer()
    quantizer.start_observing("percentile")
    assert quantizer(X) is X
    amax = quantizer.observer.amax()
    assert amax.item() == X.abs().max()
    quantizer.freeze_(amax)
    assert quantizer.observer is None
    assert quantizer.scale.tolist() == (X.abs().max() / 127).reshape(1).tolist()


def test_observing_again_forgets_the_frozen_scale():
    quantizer = input_quantizer()
    quantizer.freeze_(torch.tensor([0.1]))
    quantizer.start_observing()
    assert not quantizer.is_frozen
    assert quantizer(X) is X


def test_disabled_or_reset_it_is_the_identity_again():
    quantizer = weight_quantizer()
    quantizer.freeze_(X.abs().amax(dim=1))
    quantizer.is_enabled = False
    assert quantizer(X) is X
    quantizer.is_enabled = True
    assert quantizer(X) is not X
    quantizer.reset()
    assert quantizer(X) is X and not quantizer.scale.any()


def test_a_loaded_scale_gives_the_same_values_as_the_frozen_one():
    trained, loaded = weight_quantizer(), weight_quantizer()
    trained.freeze_(X.abs().amax(dim=1))
    loaded.load_({"scale": trained.scale.clone()})
    assert torch.equal(loaded(X), trained(X))


def test_scales_are_not_in_the_state_dict():
    quantizer = weight_quantizer()
    quantizer.freeze_(X.abs().amax(dim=1))
    assert not quantizer.state_dict()


def test_a_scale_of_another_shape_is_refused_by_name():
    with pytest.raises(ValueError, match=r"fc1\.weight: scale has shape \(1,\), expected \(4,\)"):
        weight_quantizer().load_({"scale": torch.ones(1)})


@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan"), float("inf")])
def test_a_step_that_is_not_positive_and_finite_is_refused_and_leaves_the_old_one(bad):
    quantizer = weight_quantizer()
    quantizer.load_({"scale": torch.ones(4)})
    with pytest.raises(ValueError, match=r"fc1\.weight: 1 of 4 scales"):
        quantizer.load_({"scale": torch.tensor([1.0, bad, 2.0, 3.0])})
    assert quantizer.scale.tolist() == [1.0] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_maximum_that_is_not_finite_cannot_be_frozen(bad):
    with pytest.raises(ValueError, match=r"fc1\.input: 1 of 1 scales"):
        input_quantizer().freeze_(torch.tensor([bad]))


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "null"])
def test_weights_of_every_algorithm_are_what_their_codes_mean_and_survive_loading(algorithm):
    w = torch.randn(8, 512, generator=torch.Generator().manual_seed(3)) * 0.1 + 0.01
    scheme = named_scheme(algorithm).weight
    quantizer, loaded = (Quantizer(scheme, tuple(w.shape), "w") for _ in range(2))
    assert quantizer(w) is w
    quantizer.freeze_(statistic_of(w, quantizer.scheme), w.abs().amax().reshape(1))
    values = quantizer(w)
    assert torch.equal(values, through_codes(quantizer, w))
    assert torch.equal(quantizer(values), values)
    loaded.load_({part: tensor.clone() for part, tensor in quantizer.frozen_tensors.items()})
    assert torch.equal(loaded(w), values) and not torch.equal(values, w)
    assert not quantizer.state_dict()
    quantizer.reset()
    assert quantizer(w) is w and not any(t.any() for t in quantizer.frozen_tensors.values())


def test_dynamic_scales_follow_the_input_and_pass_every_gradient():
    quantizer = Quantizer(named_scheme("fp8_pc_pt").input, None, "x")
    assert quantizer(X) is X  # not before calibration
    quantizer.freeze_(torch.ones(1))
    assert torch.equal(quantizer(X * 1024), quantizer(X) * 1024)
    x = (X * 1e4).requires_grad_()
    quantizer(x).sum().backward()
    assert (x.grad == 1).all()


def test_dynamic_maxima_are_merged_before_use():
    quantizer = Quantizer(named_scheme("8da4w").input, None, "x")
    quantizer.freeze_(torch.ones(1))
    whole, left = quantizer(X), X[:, :16]
    other = statistic_of(X[:, 16:], quantizer.scheme)
    assert not torch.equal(quantizer(left), whole[:, :16])  # control
    quantizer.reduce_amax = lambda local: local.copy_(torch.maximum(local, other))
    assert torch.equal(quantizer(left), whole[:, :16])


def test_a_zero_point_that_is_no_code_is_refused():
    quantizer = Quantizer(named_scheme("w_uint4_asym").weight, (2, 64), "w")
    zero = torch.tensor([[3], [16]], dtype=torch.int32)
    with pytest.raises(ValueError, match="w: a zero point is not a code of uint4"):
        quantizer.load_({"scale": torch.ones(2, 1), "zero_point": zero})


def test_a_learned_scale_is_a_parameter_that_starts_as_calibrated_and_is_served_on_its_grid():
    frozen = Quantizer(named_scheme("int4", group_size=8).weight, tuple(X.shape), "fc1.weight")
    learned = Quantizer(frozen.scheme, tuple(X.shape), "fc1.weight")
    parameter = learned.learn_("lsq", 0.5)
    for quantizer in (frozen, learned):
        quantizer.freeze_(statistic_of(X, quantizer.scheme))
    assert list(learned.parameters()) == [parameter] and not learned.state_dict()
    assert torch.equal(learned(X), frozen(X))
    (learned(X) - X).square().sum().backward()
    assert parameter.grad.any() and not parameter.grad.isnan().any()
    with torch.no_grad():
        parameter += 1e-3  # off the bfloat16 grid
    served = learned.frozen_tensors["scale"]
    assert torch.equal(served, served.bfloat16().float())
    assert not torch.equal(served, parameter)
    frozen.load_(learned.frozen_tensors)
    assert torch.equal(learned(X), frozen(X))  # what a server makes of it
    learned.reset()
    assert learned(X) is X


@pytest.mark.parametrize("rule", [None, "lsq"])
def test_a_stage_has_other_levels_over_the_same_range(rule):
    quantizer = Quantizer(TensorScheme(FORMATS["int2"], PerChannel()), tuple(X.shape), "fc1.weight")
    if rule:
        quantizer.learn_(rule, 1.0)
    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    quantizer.freeze_(torch.full((4,), 2.0))
    levels = []
    for name in ("int8", "int4", None):
        quantizer.active_format = FORMATS[name] if name else None
        values = quantizer(x)
        assert values.amax().item() == pytest.approx(2.0)
        levels.append(values.unique().numel())
    assert levels[0] == 255 and 8 < levels[1] <= 16 and levels[2] == 3


@pytest.mark.parametrize("is_learned", [False, True])
def test_casting_a_model_leaves_its_steps_in_float32(is_learned):
    quantizer = Quantizer(TensorScheme(FORMATS["int8"], PerChannel()), (4, 8), "x")
    quantizer.freeze_(torch.tensor([1.0, 2.0, 3.0, 4.1]))
    if is_learned:
        quantizer.learn_("lsq", 1.0)
    before = quantizer.scale.detach().clone()
    module = torch.nn.ModuleList([quantizer, torch.nn.Linear(2, 2)]).bfloat16()
    assert module[1].weight.dtype == torch.bfloat16  # control
    assert quantizer.scale.dtype == torch.float32
    assert torch.equal(quantizer.scale, before)

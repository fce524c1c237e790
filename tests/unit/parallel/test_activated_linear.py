"""linear_fc2 with SwiGLU inside against a module each: the same bits; and who still sees the values."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from mqat.kernels import operators
from mqat.models.structure import DENSE_NORMS, FC2
from mqat.parallel import operands
from mqat.parallel.activated_linear import ActivatedRowParallelLinear
from mqat.parallel.linear import QuantRowParallelLinear, quantized_linears
from mqat.parallel.low_precision_backward import set_backward_
from mqat.parallel.pack_weights import pack_weights_
from mqat.quant.algorithm import named_scheme
from mqat.quant.formats import FORMATS
from mqat.specs.backend import gpt_layer_spec
from mqat.specs.gpt import quantize_layer_spec
from mqat.specs.slots import spec_slot, with_slots
from tests.unit.model_fixtures import MODEL, microbatches, switch_off
from tests.unit.parallel.test_fast_path import loss_and_gradients

ALGORITHMS = ["int8", "fp8", "int4_w_int8_a"]  # products of codes, and of decoded ones
WIDTH = MODEL.intermediate_size


@pytest.fixture
def fused(monkeypatch):
    """One entry a call that encodes what was never written."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return operators.swiglu_encode(*args, **kwargs)

    monkeypatch.setattr(operands, "swiglu_encode", counted)
    return calls


@pytest.fixture
def plainly(monkeypatch):
    """Called with a function: what it returns where nothing is fused."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(ActivatedRowParallelLinear, "_fuses", lambda self: False)
            return function()

    return call


def fc2_of(chunks):
    return quantized_linears(chunks)[f"decoder.layers.0.{FC2.name}"]


def gate_and_up(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(8, 2, 2 * WIDTH, generator=generator) * 2).to(dtype)


def assert_same_step(found, expected):
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_has_the_same_bits(calibrated, fused, plainly, algorithm, dtype, recompute):
    chunks = calibrated(algorithm, dtype, recompute)
    found = loss_and_gradients(chunks)
    per_layer = 2 * (2 if recompute == "full" else 1)  # microbatches
    assert len(fused) == per_layer * MODEL.num_layers
    expected = plainly(lambda: loss_and_gradients(chunks))
    assert len(fused) == per_layer * MODEL.num_layers
    assert_same_step(found, expected)
    linear = fc2_of(chunks)
    linear.input_quantizer.load_({"scale": linear.input_quantizer.scale * 100})
    unclipped = loss_and_gradients(chunks)[1]
    assert any(not torch.equal(unclipped[n], x) for n, x in expected[1].items())  # control


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_so_it_has_where_there_is_no_compiler(calibrated, backend, fused, plainly, algorithm):
    chunks = calibrated(algorithm)
    found = loss_and_gradients(chunks)
    assert fused
    assert_same_step(found, plainly(lambda: loss_and_gradients(chunks)))


@pytest.mark.parametrize("algorithm", ["int8", "fp8"])
def test_gradients_in_8_bits_have_the_same_bits(calibrated, fused, plainly, algorithm):
    chunks = calibrated(algorithm, torch.bfloat16)
    exact = loss_and_gradients(chunks)
    found, expected = [], []
    for results, how in ((found, lambda function: function()), (expected, plainly)):
        set_backward_(chunks, algorithm)  # counts steps from the first again
        results += how(lambda: loss_and_gradients(chunks))
    assert fused
    assert_same_step(found, expected)
    assert any(not torch.equal(found[1][n], x) for n, x in exact[1].items())  # control


def test_a_frozen_weight_passes_the_same_gradient_on(calibrated, fused, plainly):
    chunks = calibrated("int8")
    linear = fc2_of(chunks)
    linear.weight.requires_grad_(False)

    def gradient():
        x = gate_and_up().requires_grad_()
        return torch.autograd.grad(linear(x)[0].square().sum(), x)[0]

    found = gradient()
    assert len(fused) == 1 and found.shape[-1] == 2 * WIDTH
    assert torch.equal(found, plainly(gradient))


def test_evaluation_has_the_same_bits(calibrated, fused, plainly):
    from mqat.evaluation.forward import evaluate

    chunks = calibrated("int8")
    found = evaluate(chunks, [microbatches()])
    assert fused and found == plainly(lambda: evaluate(chunks, [microbatches()]))


def test_as_much_is_kept_for_backward_and_less_in_between(calibrated, plainly):
    linear = fc2_of(calibrated("int8", torch.bfloat16))

    def kept():
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.update({t.data_ptr(): t.numel() * t.element_size()}) or t, lambda t: t
        ):
            linear(gate_and_up(torch.bfloat16).requires_grad_())
        return sum(found.values())

    elements = 8 * 2 * WIDTH
    assert kept() == plainly(kept)
    assert kept() <= elements * (4 + 1 + 1 / 8) + 4  # gate and up, codes, mask, the step


def hooked(linear, seen):
    return linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))


def test_hooks_see_the_activated_input(calibrated, fused):
    linear, seen, x = fc2_of(calibrated("int8")), [], gate_and_up()
    expected = linear(x)[0]
    assert len(fused) == 1
    hooks = {
        "pre": linear.register_forward_pre_hook,
        "forward": linear.register_forward_hook,
        "inside": linear.activation.register_forward_hook,
    }
    for name, register in hooks.items():
        handle = register(lambda _, args, *rest: seen.append(rest[0] if rest else args[0]))
        assert torch.equal(linear(x)[0], expected), name
        handle.remove()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(args[0]) if module is linear else None
    )
    assert torch.equal(linear(x)[0], expected)
    handle.remove()
    assert len(fused) == 1
    for values in (seen[0], seen[2], seen[3]):
        assert torch.equal(values, operators.swiglu(x))
    assert torch.equal(seen[1][0], expected)
    linear(x)
    assert len(fused) == 2


def test_megatrons_own_hooks_are_not_taken_for_observers(calibrated, monkeypatch, fused):
    from mqat.training import optimizer

    options = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    wrap = partial(optimizer.wrap_for_training, options=options)
    monkeypatch.setattr(optimizer, "wrap_for_training", wrap)
    chunks = calibrated("int8")
    linear = fc2_of(chunks)
    assert linear._forward_pre_hooks  # they gather parameters
    loss_and_gradients(chunks)
    assert fused
    fused.clear()
    hooked(linear, [])
    linear(gate_and_up())
    assert not fused  # control


@pytest.mark.parametrize(
    "change",
    [
        lambda chunks, linear: switch_off(chunks),
        lambda chunks, linear: setattr(linear, "is_reference", True),
        lambda chunks, linear: linear.begin_calibration(),
        lambda chunks, linear: linear.input_quantizer.learn_("lsq", 1.0),
        lambda chunks, linear: setattr(linear.weight_quantizer, "active_format", FORMATS["int4"]),
        lambda chunks, linear: linear.input_quantizer.reset(),
        lambda chunks, linear: pack_weights_(chunks),
    ],
    ids=["off", "reference", "calibrating", "learned", "annealed", "no scale", "packed"],
)
def test_whatever_needs_the_values_gets_them(calibrated, fused, change):
    chunks = calibrated("int8")
    linear, x = fc2_of(chunks), gate_and_up()
    with torch.no_grad():
        linear(x)
        assert len(fused) == 1
        change(chunks, linear)
        found, expected = linear(x)[0], linear(operators.swiglu(x))[0]
    assert len(fused) == 1
    assert torch.equal(found, expected)


def test_calibration_observes_what_is_encoded(calibrated):
    from mqat.quant.observers import ActivationObserver

    linear, x = fc2_of(calibrated("int8")), gate_and_up()
    linear.begin_calibration()
    linear.input_quantizer.observer = ActivationObserver("max")
    with torch.no_grad():
        linear(x)
    found = linear.input_quantizer.observer.amax()
    assert float(found) == float(operators.swiglu(x).abs().max())


@pytest.mark.parametrize("algorithm", ["null", "int4", "int8_pc_pt", "8da4w", "mxfp8"])
def test_other_inputs_have_the_activation_in_front(calibrated, fused, algorithm):
    chunks = calibrated(algorithm)
    loss_and_gradients(chunks)
    assert type(fc2_of(chunks)) is QuantRowParallelLinear and not fused


def test_a_model_that_activates_by_itself_is_left_to(calibrated, monkeypatch, fused):
    from mqat.specs import model

    config = model.transformer_config

    def without(*args, **kwargs):
        return config(*args, **kwargs | {"spec_has_activation": False})

    monkeypatch.setattr(model, "transformer_config", without)
    chunks = calibrated("int8")
    assert fc2_of(chunks).activation is None
    loss_and_gradients(chunks)
    assert not fused


def test_other_activations_in_the_spec_stay_where_they_are():
    class OwnSwiglu(torch.nn.Module):
        pass

    schemes = {FC2.name: named_scheme("int8")}
    for activation, expected in ((None, ActivatedRowParallelLinear), (OwnSwiglu, None)):
        spec = gpt_layer_spec(DENSE_NORMS)
        if activation is not None:
            spec = with_slots(spec, {FC2.activation: activation})
        made = quantize_layer_spec(spec, schemes, layer=0, num_shards=1)
        slot = spec_slot(made, FC2.name).module
        assert slot is (expected or QuantRowParallelLinear)
        kept = spec_slot(made, FC2.activation)
        assert (kept is activation) == (activation is not None)


def test_activated_inputs_are_multiplied_as_they_are(calibrated):
    linear, x = fc2_of(calibrated("int8")), gate_and_up()
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(linear(x)[0], linear(F.silu(gate) * up)[0], rtol=0.05, atol=0.05)
    assert torch.equal(linear(x)[0], linear(operators.swiglu(x))[0])

"""Recipes of experts: one rescaling behind the norm of a layer, routing as before, idle ones alone."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from mqat.calibration.check_recipes import check_recipes
from mqat.calibration.smoothquant import FLOOR, round_scale
from mqat.checkpoints.random_weights import RandomWeights
from mqat.errors import UserError
from mqat.models.experts import MIXTURE_NORM
from mqat.models.structure import in_layer
from mqat.specs.policy import Policy, Rule
from tests.distributed.worker import EXPERTS, MIXTRAL
from tests.unit.model_fixtures import microbatches

AWAY = torch.tensor([0.0, 0.0, 0.0, -1e4])
IDLE = [f"decoder.layers.0.mlp.experts.3.linear_fc{n}" for n in (1, 2)]
ALL = [in_layer(i, x.name) for i in range(2) for x in EXPERTS.linears if x.expert is not None]


@pytest.fixture
def mixture(world):
    """`mixture(policy)`: (chunk, its linears, a function that carries out the recipes)."""
    from megatron.core import parallel_state

    from mqat.calibration.weight_recipe import apply_weight_recipe_
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.config import ModelConfig
    from mqat.evaluation.forward import run_layers
    from mqat.parallel.linear import quantized_linears
    from mqat.specs.model import build_model

    def make(policy, *, idle=False, dtype=torch.float32, steps=None):
        algorithms = policy.resolve(EXPERTS)
        (chunk,) = build_model(EXPERTS, ModelConfig(), policy.schemes(EXPERTS), dtype)
        load_pretrained_([chunk], RandomWeights(EXPERTS, 1, 0.1))
        for layer in chunk.decoder.layers:  # channels that matter more than others
            norm = layer.get_submodule(MIXTURE_NORM.name).weight.detach()
            norm *= torch.logspace(-2, 1, len(norm)).to(norm.dtype)
        if idle:
            router = chunk.decoder.layers[0].mlp.router
            router.gating = lambda x, gating=router.gating: gating(x) + AWAY
        steps = [microbatches()] if steps is None else steps

        def carry_out(at_once=0):
            return apply_weight_recipe_(
                [chunk], lambda: run_layers([chunk], steps),
                {name: algorithm.recipe for name, algorithm in algorithms.items()},
                model=EXPERTS, calib_layers_at_once=at_once,
                group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
                dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            )  # fmt: skip

        return chunk, quantized_linears(chunk), carry_out

    return make


def routing(chunk):
    """Scores of every expert in every layer, of the calibration tokens."""
    from mqat.evaluation.forward import run_layers

    found, hooks = [], []
    for layer in chunk.decoder.layers:
        router = layer.mlp.router
        hooks.append(router.register_forward_hook(lambda *args: found.append(args[-1][0].clone())))
    run_layers([chunk], [microbatches()])
    for hook in hooks:
        hook.remove()
    return found


def first_mixture(chunk):
    """What the experts of the first layer make of the calibration tokens."""
    from mqat.evaluation.forward import run_layers

    found = []
    mixture = chunk.decoder.layers[0].mlp
    hook = mixture.register_forward_hook(lambda *args: found.append(args[-1][0].clone()))
    run_layers([chunk], [microbatches()])
    hook.remove()
    return torch.stack(found)


def loss(chunk):
    from mqat.evaluation.forward import evaluate

    return evaluate([chunk], [microbatches()])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_leave_routing_as_it_was_to_the_bit(mixture, dtype):
    chunk, linears, carry_out = mixture(Policy("int8_sq"), dtype=dtype)
    layers, before = chunk.decoder.layers, routing(chunk)
    routers = [layer.mlp.router.weight.detach().clone() for layer in layers]
    weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    _, idle = carry_out()
    assert idle == []
    assert all(map(torch.equal, routing(chunk), before))
    for number, (layer, router) in enumerate(zip(layers, routers, strict=True)):
        own = [n for n in ALL if n.startswith(f"decoder.layers.{number}.") and n.endswith("fc1")]
        factors = layer.mlp.router.weight.detach() / router
        assert len({float(f) for f in factors[0]}) > 3 and torch.equal(factors[0], factors[-1])
        up = EXPERTS.expert_intermediate_size  # the rows behind take up the factors of fc2
        for name in own:
            assert torch.equal(linears[name].weight[:up], weights[name][:up] * factors[0])
    layers[1].mlp.router.weight.data.copy_(routers[1])  # control
    assert not torch.equal(routing(chunk)[-1], before[-1])


def test_other_factors_change_routing_by_rounding_alone(mixture):
    chunk, _, carry_out = mixture(Policy("int8", recipe={"smoothquant": True, "sq_grid": "float"}))
    before, expected = routing(chunk), loss(chunk)
    carry_out()
    for found, wanted in zip(routing(chunk), before, strict=True):
        assert not torch.equal(found, wanted)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert loss(chunk) == pytest.approx(expected, rel=1e-4)


def test_factors_are_made_from_the_maxima_of_all_experts(mixture):
    from mqat.calibration.calibrate import exact_forward
    from mqat.evaluation.forward import run_layers

    chunk, linears, carry_out = mixture(Policy("int8_sq"))
    seen = {name: torch.zeros(linears[name].weight.shape[1]) for name in ALL}

    def watch(name, _, args):
        seen[name] = seen[name].maximum(args[0].abs().flatten(0, -2).amax(dim=0))

    hooks = [linears[name].register_forward_pre_hook(partial(watch, name)) for name in ALL]
    with exact_forward(linears):
        run_layers([chunk], [microbatches()])
    for hook in hooks:
        hook.remove()
    norm = chunk.decoder.layers[1].get_submodule(MIXTURE_NORM.name).weight
    before = norm.detach().clone()
    own = [f"decoder.layers.1.mlp.experts.{e}.linear_fc1" for e in range(4)]
    x = torch.stack([seen[name] for name in own]).amax(dim=0)
    w = torch.stack([linears[name].weight.detach().abs().amax(dim=0) for name in own]).amax(dim=0)
    second = linears[own[2].replace("fc1", "fc2")].weight
    x2, w2 = seen[own[2].replace("fc1", "fc2")], second.detach().abs().amax(dim=0)
    columns = second.detach().clone()
    carry_out()

    def factors(x, w):
        return round_scale(x.clamp_min(FLOOR) ** 0.8 / w.clamp_min(FLOOR) ** 0.2, "power_of_two")

    assert torch.equal(before / norm, factors(x, w))
    assert torch.equal(second / columns, factors(x2, w2).expand_as(second))
    assert not torch.equal(factors(x, w), factors(seen[own[0]], w))  # control: of one expert


@pytest.mark.parametrize("at_once", [0, 1])
def test_awq_of_experts_lowers_their_error_and_keeps_the_function(mixture, at_once):
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate

    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    errors = {}
    for algorithm in ("int4", "int4_awq"):
        rules = (Rule("*.mlp.experts.*", algorithm),)
        chunk, _, carry_out = mixture(Policy("null", 32, rules))
        exact, expected = first_mixture(chunk), loss(chunk)
        qparams, idle = carry_out(at_once)
        assert idle == [] and loss(chunk) == pytest.approx(expected, rel=1e-4)
        assert qparams.keys() == (set(ALL) if algorithm == "int4_awq" else set())
        calibrate([chunk], lambda: None, group=group, weight_qparams=qparams)
        errors[algorithm] = float((first_mixture(chunk) - exact).square().sum())
    assert errors["int4_awq"] < 0.75 * errors["int4"]


@pytest.mark.parametrize(
    "recipe",
    [
        {"rounding": "gptq"},
        {"rounding": "gptq", "weight_calibrator": "awq", "smoothquant": True, "sq_alpha": None},
        {"smoothquant": True},
    ],
)
def test_an_idle_expert_is_reported_and_rounded_to_nearest(mixture, recipe):
    chunk, linears, carry_out = mixture(Policy("int8", recipe=recipe), idle=True)
    before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    norm = chunk.decoder.layers[0].get_submodule(MIXTURE_NORM.name).weight
    old = norm.detach().clone()
    qparams, idle = carry_out()
    assert idle == IDLE
    assert torch.equal(linears[IDLE[1]].weight, before[IDLE[1]])
    assert torch.equal(linears[IDLE[0]].weight, before[IDLE[0]] * (old / norm))
    if "rounding" in recipe:
        for name, found in qparams.items():
            quantizer, weight = linears[name].weight_quantizer, linears[name].weight.detach()
            quantizer.load_(found)
            assert torch.equal(quantizer(weight), weight) == (name not in IDLE), name
    else:
        assert not torch.equal(norm, old)


def test_a_layer_that_no_token_reached_is_an_error(mixture):
    _, _, carry_out = mixture(Policy("int8", recipe={"rounding": "gptq"}), steps=[])
    with pytest.raises(UserError, match=r"decoder\.layers\.0.*no calibration token"):
        carry_out()


def check(policy, model=MIXTRAL):
    found = policy.resolve(model)
    recipes = {name: a.recipe for name, a in found.items()}
    check_recipes(recipes, {name: a.scheme.weight for name, a in found.items()}, model)


def test_experts_of_a_layer_are_rescaled_together_or_not_at_all():
    for algorithm in ("int8_sq", "int4_awq"):
        check(Policy(algorithm, 32 if algorithm == "int4_awq" else None))
    first = "decoder.layers.0.mlp.experts.0.*"
    apart = (
        (
            Rule(first, "int8_sq", recipe={"sq_alpha": 0.5}),
            r"experts\.1\.linear_fc1 differs \(sq_al",
        ),
        (Rule(first, "int8"), r"differs \(smoothquant"),
        (Rule(first), r"experts\.0\.linear_fc1 is not quantized"),
    )
    for rule, message in apart:
        with pytest.raises(UserError, match=message):
            check(Policy("int8_sq", rules=(rule,)))
        second = replace(
            rule, pattern="*.mlp.experts.*.linear_fc2"
        )  # control: each has its own input
        check(Policy("int8_sq", rules=(second,)))

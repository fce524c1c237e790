"""Runs of mixtures of experts are planned, and refused, before a process group exists."""

from dataclasses import replace
from pathlib import Path

import pytest

from mqat.config import load_config
from mqat.errors import UserError
from mqat.plan.run import describe, make_plan, memory_estimate
from tests.unit.checkpoints.test_experts import random_model

CONF = Path(__file__).parents[3] / "conf" / "qat_experts_int4.yaml"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """What the shipped recipe needs to fit a tiny model on eight processes."""
    path = tmp_path_factory.mktemp("hf")
    random_model("qwen3_moe").save_pretrained(path)
    return [
        f"model.restore_from_path={path}", "model.expert_model_parallel_size=2",
        "model.global_batch_size=8", "quantization.num_calib_size=8", "model.data.packaged=python_docs",
        "model.data.seq_length=64", "model.data.train=[]", "model.data.validation=[]",
        # 40 features of an expert are no whole groups of 32, which packed INT4 needs.
        "export.format=null",
    ]  # fmt: skip


def test_the_recipe_quantizes_experts_alone_in_groups_of_32(options):
    plan = make_plan(load_config(CONF, options), world_size=8)
    assert len(plan.layers) == 2 * 6 * 2 and all(".mlp.experts." in name for name in plan.layers)
    for scheme in plan.layers.values():
        assert str(scheme.weight.granularity) == "group:32" and scheme.weight.format.name == "int4"
        assert scheme.input is None
    assert describe(plan)["layout"] == "TP 2 x PP 1 x CP 1 x DP 4 x EP 2 + sequence parallel"
    more = [*options, "model.expert_model_parallel_size=6", "model.global_batch_size=12"]
    wider = make_plan(load_config(CONF, [*more, "quantization.num_calib_size=12"]), world_size=24)
    large = replace(plan.model, expert_intermediate_size=1 << 20)
    found = [memory_estimate(replace(p, model=large))["parameters per rank"] for p in (plan, wider)]
    millions = [float(text.removesuffix(" M")) for text in found]
    assert millions[0] == pytest.approx(3 * millions[1], rel=1e-2)  # of three times as many experts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.expert_model_parallel_size=4"], "=4 does not divide num_experts=6.*1, 2, 3, 6"),
        (
            ["model.expert_model_parallel_size=3"],
            "needs an expert_parallel that is a multiple of 2",
        ),
        (["model.sequence_parallel=false"], "set model.sequence_parallel=true"),
        (
            ["export.format=trtllm", "export.style=null"],
            "group_size=32; TensorRT-LLM's INT4 kernels",
        ),
        (
            ["quantization.rules=[{pattern: '*.experts.0.*', algorithm: int8_sq}]"],
            "smoothquant rescales the one input of all experts",
        ),
        (["quantization.rules=[{pattern: '*.router', algorithm: int8}]"], "never quantized"),
        (["model.moe_router_bias_update_rate=0.001"], "have no correction that could be moved"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, changes, message):
    with pytest.raises(UserError, match=message):
        make_plan(load_config(CONF, [*options, *changes]), world_size=8)


def test_settings_of_experts_are_refused_for_dense_models(tmp_path):
    tiny = CONF.with_name("sft_tiny.yaml")
    for key, value in (
        ("expert_model_parallel_size", 2), ("expert_tensor_parallel_size", 1),
        ("moe_aux_loss_coeff", 0.01),
    ):  # fmt: skip
        with pytest.raises(UserError, match=key):
            make_plan(load_config(tiny, [f"model.{key}={value}"]), world_size=2)
    make_plan(load_config(tiny), world_size=2)  # control

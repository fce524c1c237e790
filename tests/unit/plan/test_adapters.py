"""Adapters that would not do what their keys say are refused before anything is loaded."""

import pytest

from mqat.config import load_config
from mqat.plan.run import describe, make_plan, memory_estimate
from tests.unit.export.checkpoints import (
    QWEN3_MOE,
    TINY,
    write_checkpoint,
)
from tests.unit.export.checkpoints import (
    describe as describe_checkpoint,
)

LORA, TARGETS = "model.peft.lora_tuning", "model.peft.lora_tuning.target_modules"
PACKED = [
    "quantization.algorithm=nf4", "quantization.compress=true",
    "quantization.compare_with_finetuned=false", "export.format=peft",
]  # fmt: skip


@pytest.fixture
def plan(tmp_path):
    def make(*keys, model=TINY, world_size=2):
        path = tmp_path / "start"
        if not path.exists():
            write_checkpoint(path, model, {})
        settings = [
            f"model.restore_from_path={path}", "model.data.packaged=python_docs",
            "model.data.seq_length=32", "model.global_batch_size=2", "export.format=null",
            "model.peft.peft_scheme=lora", "quantization.group_size=64", "quantization.algorithm=int4",
            *keys,
        ]  # fmt: skip
        if "quantization.algorithm=nf4" in keys:
            settings.remove("quantization.group_size=64")
        return make_plan(load_config(None, settings), world_size=world_size)

    return make


def test_patterns_are_of_the_last_word_or_of_the_whole_name(plan):
    assert len(plan().adapters.names) == 4 * 4
    found = plan(f"{TARGETS}=[linear_qkv,'*.layers.3.mlp.*']", f"{LORA}.adapter_dim=8").adapters
    assert found.names[-2:] == (
        "decoder.layers.3.mlp.linear_fc1",
        "decoder.layers.3.mlp.linear_fc2",
    )
    assert len(found.names) == 6 and (found.rank, found.alpha, found.scale) == (8, 8.0, 1.0)
    assert "everything else is frozen" in describe(plan())["adapters"]


def test_memory_is_that_of_adapters(plan):
    from mqat.plan.adapters import rank_adapters
    from mqat.plan.compressed import packed_savings

    alone = plan(world_size=1)
    settings, shapes = alone.config.model, alone.adapters.shapes(TINY).values()
    assert rank_adapters(TINY, settings, alone.adapters) == sum(a * b for a, b in shapes)
    weights = sum(
        a * b for a, b in (TINY.linear_shape(n.split(".", 3)[3]) for n in alone.adapters.names)
    )
    saved = packed_savings(TINY, settings, alone.layers, 4)
    assert saved == weights * (4 - 0.5 - 2 / 64)
    key = "weights, gradients, optimizer per rank"
    assert memory_estimate(alone)[key] != memory_estimate(plan("model.peft=null"))[key]
    assert "packed" in describe(plan(*PACKED))["backbone"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([f"{TARGETS}=[linear_q]"], "pattern 'linear_q' matches no linear. Linears are linear_qkv"),
        ([f"{TARGETS}=[]"], "target_modules=.* must be patterns of names"),
        ([f"{LORA}.adapter_dim=0"], "adapter_dim=0 must be at least 1"),
        ([f"{LORA}.alpha=-1"], "alpha=-1.0 must be null, or a number above 0"),
        ([f"{LORA}.adapter_dropout=1"], r"adapter_dropout=1.0 must be a number in \[0, 1\)"),
        (
            ["model.peft.merge=true", f"{LORA}.adapter_dropout=0.1"],
            "0 with merge: true, where an adapter has no input of its own",
        ),
        (["model.peft.peft_scheme=ia3"], "peft_scheme=ia3 must be lora"),
        (["model.peft.lora_tunning=1"], "unknown key 'model.peft.lora_tunning'; .*lora_tuning"),
        (
            [f"{TARGETS}=['*.layers.0.*']", "model.pipeline_model_parallel_size=2"],
            "no linear of layers 2 to 3 has an adapter",
        ),
        (["model.pretrain.max_steps=5"], "pretrain.max_steps=5 with model.peft: trains all weights"),
        (
            ["model.peft.merge=true", "model.ddp.overlap_param_gather=true",
             "model.ddp.overlap_grad_reduce=true"],
            "gathers adapters when they are called, which merged ones are not",
        ),
        (["quantization.weight_scales=lsq"], "only adapters are trained; set it to frozen"),
        (["quantization.bit_schedule=[[0,8],[1,4]]"], "changes the bits of weights that are frozen"),
        (
            ["model.peft.merge=true", f"{TARGETS}=[linear_qkv]",
             "quantization.rules=[{pattern: '*.linear_qkv', algorithm: 'null'}]"],
            "none of the 12 quantized linears .* has an adapter",
        ),
        (["model.peft.merge=true", "export.format=peft"], "writes adapters beside the weights"),
        ([*PACKED, "model.peft=null"], "writes adapters beside|cannot be trained"),
        ([*PACKED, "export.format=null", "model.peft=null"], "packed weights cannot be trained"),
        ([*PACKED, "export.format=null", "model.peft.merge=true"], "packed weights cannot be trained"),
        ([*PACKED, "quantization.algorithm=int8_wo"], "of channel is not stored packed under adapters"),
        ([*PACKED, "quantization.algorithm=int4_awq"], "needs a recipe .*Calibrate first"),
        ([*PACKED, "export.format=hf"], "export.format=hf with quantization.compress"),
        (
            [*PACKED, "quantization.compare_with_finetuned=true"],
            "there is no unquantized model to fine-tune",
        ),
        (
            [*PACKED, "quantization.rules=[{pattern: '*.1.*', algorithm: 'null'}]"],
            "is quantized in 3 of 4 layers, but is packed in all or none",
        ),
        (
            ["quantization.rules=[{pattern: '*.linear_fc1', output: {format: int8_full, "
             "granularity: tensor}}]"],
            "the output of .*linear_fc1 is quantized",
        ),
    ],
)  # fmt: skip
def test_what_would_not_be_honoured_is_refused(plan, keys, message):
    with pytest.raises(ValueError, match=message):
        plan(*keys)


def test_what_is_calibrated_with_data_does_not_start_under_trained_adapters(plan, tmp_path):
    adapters = plan().adapters.to_dict()
    describe_checkpoint(tmp_path / "start", adapters=adapters)
    assert plan() and plan("quantization.algorithm=null", "model.peft.merge=true") and plan(*PACKED)
    for keys, message in (
        (
            ["quantization.algorithm=int8", "quantization.group_size=null"],
            "linear_qkv is calibrated",
        ),
        (["quantization.algorithm=int4_awq"], "linear_qkv is calibrated with data"),
        (
            ["model.peft=null", "quantization.kv_cache=fp8"],
            "core_attention is calibrated with data",
        ),
        (["model.peft.merge=true"], r"W \+ B A is quantized"),
    ):
        with pytest.raises(ValueError, match=f"has trained adapters, but .*{message}"):
            plan(*keys)


def test_linears_of_experts_are_refused(plan):
    with pytest.raises(ValueError, match=r"'linear_fc1' matches .*experts\.0\.linear_fc1"):
        plan(model=QWEN3_MOE, world_size=1)

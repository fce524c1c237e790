from pathlib import Path

import pytest

from mqat.config import load_config
from mqat.errors import UserError
from mqat.plan.run import make_plan

CONF = Path(__file__).parents[2] / "conf"
TINY = CONF / "qat_tiny.yaml"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_step=3", "unknown key 'trainer.max_step'; did you mean 'max_steps'"),
        ("trainer.max_steps=many", "trainer.max_steps"),
        ("quantization.percentile=0", "quantization.percentile=0"),
        ("quantization.sq_alpha=1.5", r"quantization.sq_alpha=1.5 must be in \[0, 1\]"),
        (
            "quantization.rounding=gtpq",
            "quantization.rounding='gtpq' is unknown; did you mean 'gptq'",
        ),
        ("quantization.equalize=true", "quantization.equalize is now quantization.smoothquant"),
        ("quantization.equalize_grid=float", "equalize_grid is now quantization.sq_grid"),
        ("quantization.equalize_alpha=1", "equalize_alpha is now quantization.sq_alpha"),
        ("model.architecture.hiden_size=3", "did you mean 'hidden_size'"),
    ],
)
def test_a_bad_key_or_value_is_one_clear_error(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(TINY, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run.yaml: No such file"),
        ("3", "run.yaml: .*int"),
        ("a: [", "run.yaml: not valid YAML"),
    ],
)
def test_a_bad_config_file_is_one_clear_error(content, message, tmp_path):
    if content is not None:
        (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"config file .*{message}"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        ([], 3, "world size 3 is not a multiple"),
        (["model.tensor_model_parallel_size=3"], 12, "does not divide num_attention_heads=8"),
        (["model.global_batch_size=9"], 8, "global_batch_size=9 is not a multiple"),
        (["model.context_parallel_size=3"], 8, "8 is not a multiple of .* x context_parallel_size=3"),
        (
            ["model.context_parallel_size=2", "model.data.seq_length=66"],
            8,
            "seq_length=66 is not a multiple of 4: context_parallel_size=2 cuts .* 4 chunks.* Use 68",
        ),
        (
            ["model.context_parallel_size=2", "model.tensor_model_parallel_size=4",
             "model.pipeline_model_parallel_size=1", "model.sequence_parallel=true",
             "model.data.seq_length=68"],
            8,
            "seq_length=68 is not a multiple of 8: .* tensor_model_parallel_size=4 each rank's tokens",
        ),
        (
            ["model.context_parallel_size=2", "model.transformer_engine=true", "model.data.format=sft"],
            8,
            "format=sft packs conversations.*transformer_engine=false, or context_parallel_size=1",
        ),
        (["export.inference_tensor_parallel=3"], 8, "inference_tensor_parallel=3 does not fit"),
        (
            ["quantization.algorithm=int4", "quantization.group_size=128",
             "model.architecture.intermediate_size=320"],
            8,
            "group_size=128 does not divide in_features_per_partition",
        ),
        (
            ["quantization.algorithm=nf4", "quantization.group_size=32"],
            8,
            "group_size=32 has no effect: the weights of nf4 are not groups of integers",
        ),
        (["export.dtype=fp8"], 8, "export.dtype='fp8': must be one of bfloat16"),
        (["export.format=onnx"], 8, "export.format='onnx': must be one of trtllm, hf"),
        (["export.style=modelopt"], 8, "export.style='modelopt': trtllm has none"),
        (["export.decoder_type=qwen"], 8, "decoder_type=qwen, but the model is llama; leave it out"),
        (["quantization.rules=[{pattern: 'nothing*', algorithm: null}]"], 8, "matches no linear"),
        (["quantization.disabled=['*.output']"], 8, "matches nothing that is quantized"),
        (
            ["quantization.algorithm=fp8", "quantization.weight_scales=lsq"],
            8,
            "weight_scales=lsq: .*qkv.weight: a learned scale needs .*format 'fp8_e4m3'",
        ),
        (
            ["quantization.algorithm=8da4w", "quantization.input_scales=pact"],
            8,
            "input_scales=pact: .*qkv.input: a learned scale needs .*dynamic scales",
        ),
        (
            ["quantization.algorithm=int4", "quantization.input_scales=lsq"],
            8,
            "input_scales=lsq, but no input is quantized",
        ),
        (["quantization.bit_schedule=[[0,8],[9,4]]"], 8, "last stage has 4 bits, but .*'int8' of 8"),
        (["quantization.bit_schedule=[[1,8]]"], 8, "must start at 0 and ascend"),
        (["quantization.bit_schedule=[[0,9]]"], 8, "bits from 2 to 8"),
        (["quantization.bit_schedule=[8,4]"], 8, "bits from 2 to 8"),
        (
            ["quantization.algorithm=fp8", "quantization.bit_schedule=[[0,8]]"],
            8,
            "only symmetric integer weights",
        ),
        (["quantization.backward=fp4"], 8, "backward='fp4' is not one of: bf16, int8, fp8"),
        (
            ["quantization.algorithm=int4", "quantization.backward=int8"],
            8,
            "quantization.backward=int8: .*qkv has {'weight': 'int4'}",
        ),
        (["quantization.backward=fp8"], 8, "multiply codes of weight and input, both fp8"),
        (
            ["quantization.backward=int8", "quantization.input_scales=pact"],
            8,
            "goes with frozen scales and bits, not with quantization.input_scales=pact",
        ),
        (
            ["quantization.backward=int8", "quantization.disabled=['*.linear_fc2.input']"],
            8,
            "linear_fc2 has {'weight': 'int8'}",
        ),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_refused_before_any_process_group(overrides, world_size, message):
    with pytest.raises(ValueError, match=message):
        make_plan(load_config(TINY, overrides), world_size=world_size)


@pytest.mark.parametrize("name", ["qat_tiny", "qat_counting"])
def test_the_shipped_tiny_configs_fit_eight_processes(name):
    assert make_plan(load_config(CONF / f"{name}.yaml"), world_size=8).data_parallel == 2


def test_an_algorithm_without_tensorrt_llm_form_is_refused_with_what_to_use_instead():
    overrides = ["quantization.algorithm=int4_w_int8_a", "quantization.group_size=32"]
    with pytest.raises(ValueError, match="no INT4 weights with INT8 activations: use int8"):
        make_plan(load_config(TINY, overrides), world_size=8)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["exp_manager.checkpoint_callback_params.save_top_k=2"], "goes by the losses of validations"),
        (["exp_manager.create_early_stopping_callback=true", "trainer.val_check_interval=200"],
         "val_check_interval=200 must be at least 1 and at most trainer.max_steps=100"),
        (["exp_manager.checkpoint_callback_params.monitor=loss"], "is not one of: val_loss"),
        (["exp_manager.early_stopping_callback_params.patience=0"], "patience=0 must be a number of at"),
        (["exp_manager.profile.start_step=3"], "the first and the last step of a window"),
        (["exp_manager.profile.start_step=300", "exp_manager.profile.end_step=301"], "never reached"),
        (["exp_manager.wandb_logger_kwargs.projekt=x"], "did you mean 'project'"),
    ],
)  # fmt: skip
def test_what_cannot_be_logged_kept_or_profiled_as_asked_is_refused(overrides, match):
    with pytest.raises(UserError, match=match):
        load_config(None, overrides)

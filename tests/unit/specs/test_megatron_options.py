"""Megatron's switches for speed are handed on; what decides results, or has no effect, is refused."""

from dataclasses import fields

import pytest
import torch

from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.specs.megatron_options import DDP_SWITCHES, TRANSFORMER_SWITCHES, check_switches
from tests.unit.model_fixtures import MODEL


def config(**settings):
    from mqat.specs.model import transformer_config

    return transformer_config(MODEL, ModelConfig(**settings), torch.float32)


def test_switches_reach_megatrons_configuration(world):
    assert config().bias_dropout_fusion is False
    assert config(megatron={"bias_dropout_fusion": True}).bias_dropout_fusion is True
    assert config(megatron={"batch_p2p_sync": False}).batch_p2p_sync is False


def test_every_switch_is_a_field_that_no_result_depends_on(world):
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mqat.specs.config_check import changes_no_result

    assert TRANSFORMER_SWITCHES.keys() <= {field.name for field in fields(TransformerConfig)}
    assert all(map(changes_no_result, TRANSFORMER_SWITCHES))
    assert DDP_SWITCHES.keys() <= {field.name for field in fields(DistributedDataParallelConfig)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bias_droput_fusion": True},
            "bias_droput_fusion=True is none.*mean 'bias_dropout_fusion'",
        ),
        ({"hidden_size": 64}, "hidden_size=64 is none of Megatron's switches"),
        ({"num_moe_experts": 4}, "num_moe_experts=4 is none"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size=2 is none"),
        ({"fp16": True}, "fp16=True is none"),
        ({"init_method_std": 0.1}, r"init_method_std=0\.1 is none"),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl='local' is none"),
        ({"bias_dropout_fusion": "yes"}, "bias_dropout_fusion='yes' must be of type bool"),
        ({"deallocate_pipeline_outputs": True}, "gloo is still sending"),
        ({"apply_rope_fusion": True}, "apply_rope_fusion.*install TE"),
    ],
)
def test_other_fields_are_refused_by_name(world, options, message):
    if torch.cuda.is_available() and "deallocate_pipeline_outputs" in options:
        pytest.skip("CUDA frees outputs when they have been sent")
    with pytest.raises(UserError, match=f"(?s){message}"):
        config(megatron=options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap_grad_reduse": True}, "overlap_grad_reduse=True is none.*'overlap_grad_reduce'"),
        ({"grad_reduce_in_fp32": False}, "grad_reduce_in_fp32=False is none"),
        ({"use_megatron_fsdp": True}, "use_megatron_fsdp=True is none"),
        ({"bucket_size": 1.5}, r"bucket_size=1\.5 must be of type int"),
    ],
)
def test_data_parallel_options_are_checked_likewise(options, message):
    check_switches({}, {"bucket_size": 1000})
    with pytest.raises(UserError, match=message):
        check_switches({}, options)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tp_comm_overlap", True, "linear_qkv: tp_comm_overlap=True.*False"),
        ("cuda_graph_impl", "local", "linear_qkv: cuda_graph_impl='local' would replay.*'none'"),
        ("external_cuda_graph", True, "linear_qkv: external_cuda_graph=True would replay"),
    ],
)
def test_what_quantized_linears_cannot_do_is_refused_in_own_loops(world, field, value, message):
    from mqat.parallel.linear import QuantColumnParallelLinear

    settings = config()
    setattr(settings, field, value)
    with pytest.raises(UserError, match=message):
        QuantColumnParallelLinear(
            8, 8, config=settings, init_method=torch.nn.init.zeros_, quantized_name="linear_qkv",
            scheme=None, num_shards=1,
        )  # fmt: skip

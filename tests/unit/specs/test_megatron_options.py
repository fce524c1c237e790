"""Megatron's switches for speed are handed on; what decides results, or has no effect, is refused."""

import pytest
import torch

from mqat.config import ModelConfig
from mqat.errors import UserError
from tests.unit.model_fixtures import MODEL


def config(**settings):
    from mqat.specs.model import transformer_config

    return transformer_config(MODEL, ModelConfig(**settings), torch.float32)


def test_switches_reach_megatrons_configuration(world):
    assert config().bias_dropout_fusion is False
    assert config(megatron={"bias_dropout_fusion": True}).bias_dropout_fusion is True
    assert config(megatron={"batch_p2p_sync": False}).batch_p2p_sync is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias_droput_fusion": True}, "unknown key.*did you mean 'bias_dropout_fusion'"),
        ({"hidden_size": 64}, "hidden_size is decided by the model's description"),
        ({"num_moe_experts": 4}, "num_moe_experts is decided"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size is decided"),
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
        ({"overlap_grad_reduse": True}, "unknown key.*did you mean 'overlap_grad_reduce'"),
        ({"grad_reduce_in_fp32": False}, "grad_reduce_in_fp32 is always on"),
        ({"use_megatron_fsdp": True}, "use_megatron_fsdp is not supported"),
    ],
)
def test_data_parallel_options_are_checked_likewise(world, options, message):
    from mqat.specs.megatron_options import ddp_config

    with pytest.raises(UserError, match=message):
        ddp_config(options)
    assert ddp_config({"bucket_size": 1000}).bucket_size == 1000


def test_an_overlap_without_effect_is_refused_in_own_loops(world):
    from mqat.specs.megatron_options import check_overlaps

    settings = config()
    check_overlaps(settings)
    settings.tp_comm_overlap = True
    with pytest.raises(UserError, match=r"tp_comm_overlap.*False"):
        check_overlaps(settings)

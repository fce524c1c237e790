"""Megatron's own switches for speed and memory, handed on by name: `model.megatron` and `model.ddp`.

Only those that change no result (but its rounding): what a model computes is its description, and
parallel sizes, recompute and precision have keys of their own.
"""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from mqat.errors import UserError, nearest_hint
from mqat.specs.config_check import changes_no_result

# Set by mqat, which needs them so, or by keys of its own.
_DDP_FIXED = {"grad_reduce_in_fp32", "use_distributed_optimizer"}
_DDP_UNTRIED = {"use_megatron_fsdp", "use_custom_fsdp", "num_distributed_optimizer_instances"}


def _check_known(key: str, name: str, config: type) -> None:
    known = {field.name for field in fields(config)}
    if name not in known:
        raise UserError(f"config: unknown key '{key}.{name}'; {nearest_hint(name, known)}")


def transformer_options(given: Mapping[str, Any], fixed: Collection[str]) -> dict[str, Any]:
    """Fields of `TransformerConfig` from `model.megatron`.

    Args:
        given: Name -> value.
        fixed: Fields that other keys decide.

    Raises:
        UserError: Names the field, and why it is not handed on.
    """
    for name in given:
        _check_known("model.megatron", name, TransformerConfig)
        if name in fixed or not changes_no_result(name):
            raise UserError(
                f"config: model.megatron.{name} is decided by the model's description or by another key "
                "of mqat; only switches for speed and memory are handed on to Megatron."
            )
    if given.get("deallocate_pipeline_outputs") and not torch.cuda.is_available():
        raise UserError(
            "config: model.megatron.deallocate_pipeline_outputs=true on a CPU frees outputs that gloo "
            "is still sending, which would send whatever comes to lie there; leave it out."
        )
    return dict(given)


def ddp_config(given: Mapping[str, Any]) -> DistributedDataParallelConfig:
    """Megatron's data-parallel settings, with those of `model.ddp`.

    Raises:
        UserError: Names the field, and why it is not handed on.
    """
    for name in given:
        _check_known("model.ddp", name, DistributedDataParallelConfig)
        if name in _DDP_FIXED:
            raise UserError(
                f"config: model.ddp.{name} is always on: gradients are summed in float32 and optimizer "
                "states cut over data-parallel ranks; leave it out."
            )
        if name in _DDP_UNTRIED:
            raise UserError(f"config: model.ddp.{name} is not supported with quantized linears.")
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, **given
    )


def check_overlaps(config: Any) -> None:
    """Refuses switches of a user's own configuration that quantized linears would leave without effect.

    Raises:
        UserError: Names the switch.
    """
    if config.tp_comm_overlap:
        raise UserError(
            "tp_comm_overlap=True is done by Transformer Engine's linears, in whose place quantized "
            "ones stand; these overlap the collectives of their backward passes unasked. Set it to "
            "False."
        )

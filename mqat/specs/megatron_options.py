"""Megatron's own switches for speed and memory, handed on by name: `model.megatron` and `model.ddp`.

Only those that change no result (but its rounding): what a model computes is its description, and
parallel sizes, recompute and precision have keys of their own. Nothing here imports Megatron, so that
`mqat plan` can check them anywhere.

Names are those of Megatron-Core's `TransformerConfig` and `DistributedDataParallelConfig`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from mqat.errors import UserError, nearest_hint

TRANSFORMER_SWITCHES: dict[str, type] = {
    "apply_rope_fusion": bool, "bias_dropout_fusion": bool, "fused_single_qkv_rope": bool,
    "persist_layer_norm": bool, "memory_efficient_layer_norm": bool,
    "cross_entropy_loss_fusion": bool, "cross_entropy_fusion_impl": str,
    "gradient_accumulation_fusion": bool, "defer_embedding_wgrad_compute": bool,
    "wgrad_deferral_limit": int, "overlap_p2p_comm": bool, "batch_p2p_comm": bool,
    "batch_p2p_sync": bool, "deallocate_pipeline_outputs": bool, "use_ring_exchange_p2p": bool,
    "microbatch_group_size_per_vp_stage": int, "distribute_saved_activations": bool,
    "cp_comm_type": str, "use_te_rng_tracker": bool,
}  # fmt: skip
DDP_SWITCHES: dict[str, type] = {
    "overlap_grad_reduce": bool, "overlap_param_gather": bool, "bucket_size": int,
    "average_in_collective": bool, "pad_buckets_for_high_nccl_busbw": bool,
    "gradient_reduce_div_fusion": bool, "check_for_nan_in_grad": bool,
    "check_for_large_grads": bool, "nccl_ub": bool,
}  # fmt: skip


def check_switches(megatron: Mapping[str, Any], ddp: Mapping[str, Any]) -> None:
    """Refuses what is not a switch for speed or memory.

    Raises:
        UserError: Names key and value, and what may stand there.
    """
    for key, given, known in (
        ("model.megatron", megatron, TRANSFORMER_SWITCHES),
        ("model.ddp", ddp, DDP_SWITCHES),
    ):
        for name, value in given.items():
            if name not in known:
                raise UserError(
                    f"config: {key}.{name}={value!r} is none of Megatron's switches that change speed "
                    "or memory alone; what decides results has keys of mqat's own. Leave it out, or: "
                    + nearest_hint(name, known)
                )
            if type(value) is not known[name]:
                wanted = known[name].__name__
                raise UserError(f"config: {key}.{name}={value!r} must be of type {wanted}.")
    if megatron.get("deallocate_pipeline_outputs") and not torch.cuda.is_available():
        raise UserError(
            "config: model.megatron.deallocate_pipeline_outputs=true on a CPU frees outputs that gloo "
            "is still sending, which would send whatever comes to lie there; leave it out."
        )

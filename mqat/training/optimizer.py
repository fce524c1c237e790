"""DDP, distributed optimizer and learning-rate schedule, as Megatron builds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mqat.config import OptimizerConfig


def wrap_for_training(chunks: Sequence[Any]) -> list[Any]:
    """Adds Megatron's DDP: gradient buffers, reduce-scatter over data-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True
    )
    wrapped = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(
    chunks: Sequence[Any],
    settings: OptimizerConfig,
    *,
    max_steps: int,
    clip_grad: float,
    lr: float | None = None,
) -> tuple[Any, OptimizerParamScheduler]:
    """Distributed AdamW over wrapped chunks, from their present weights, and its schedule.

    Args:
        chunks: From `wrap_for_training`.
        settings: Learning rate, betas, weight decay, schedule.
        max_steps: Steps over which the cosine decays.
        clip_grad: Largest global gradient norm; 0 turns clipping off.
        lr: Overrides `settings.lr`.
    """
    dtype = next(chunks[0].parameters()).dtype
    peak = settings.lr if lr is None else lr
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=peak,
            min_lr=settings.sched.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            clip_grad=clip_grad,
        ),
        list(chunks),
    )
    cosine = settings.sched.name == "CosineAnnealing"
    scheduler = OptimizerParamScheduler(
        optimizer,
        # The first step of a warm-up already moves: Megatron counts from zero.
        init_lr=peak / (settings.sched.warmup_steps + 1),
        max_lr=peak,
        min_lr=settings.sched.min_lr,
        lr_warmup_steps=settings.sched.warmup_steps,
        lr_decay_steps=max(max_steps, 1),
        lr_decay_style="cosine" if cosine else "constant",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler

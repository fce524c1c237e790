"""DDP, distributed optimizer and learning-rate schedule, as Megatron builds them."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mqat.config import OptimizerConfig, QuantizationConfig
from mqat.parallel.learned_scales import scale_rule
from mqat.specs.megatron_options import check_switches


def wrap_for_training(
    chunks: Sequence[Any], options: Mapping[str, Any] = MappingProxyType({})
) -> list[Any]:
    """Adds Megatron's DDP: gradient buffers, reduce-scatter over data-parallel ranks.

    `options`: Megatron's, as `model.ddp`. Chunks after the first have one bucket, as their gradients
    end last.
    """
    check_switches({}, options)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, **options
    )
    wrapped = [
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        if settings.overlap_grad_reduce:  # but for the last microbatch of a step
            chunk.config.no_sync_func = [x.no_sync for x in wrapped]
            if len(wrapped) == 1:
                chunk.config.no_sync_func = wrapped[0].no_sync
    return wrapped


def _overrides(
    chunks: Sequence[Any], scales: QuantizationConfig, *, lr: float, min_lr: float
) -> dict[ParamKey, dict[str, Any]]:
    """Parameter groups: weights; vectors, without decay; LSQ's scales; PACT's, per format.

    Adam moves a parameter by about its learning rate whatever the gradient's size. PACT's rate is
    meant for the clip value alpha = scale * clip_codes, so the scale's is that many times smaller, and
    its decay per step, learning rate times decay, is kept. Megatron tells groups apart by `wd_mult` and
    `is_decoupled_lr` when it loads a checkpoint, so these differ from group to group.
    """

    def key(name: str, rule: str | None, codes: float | None = None) -> ParamKey:
        def matches(p: torch.nn.Parameter) -> bool:
            if rule is None:
                return scale_rule(p) is None and p.dim() == 1
            return scale_rule(p) == rule and codes in (None, getattr(p, "clip_codes", None))

        return ParamKey(predicate=ParamPredicate(name, matches))

    lsq_lr = lr if scales.lsq_lr is None else scales.lsq_lr
    lsq = {"max_lr": lsq_lr, "min_lr": min(min_lr, lsq_lr), "wd_mult": 0.0, "is_decoupled_lr": True}
    found: dict[ParamKey, dict[str, Any]] = {
        key("vectors", None): {"wd_mult": 0.0},
        key("lsq", "lsq"): lsq,
    }
    for codes in {p.clip_codes for c in chunks for p in c.parameters() if scale_rule(p) == "pact"}:
        found[key(f"pact {codes}", "pact", codes)] = {
            "max_lr": scales.pact_a_lr / codes,
            "min_lr": min(min_lr, scales.pact_a_lr) / codes,
            "start_wd": scales.pact_a_decay,
            "end_wd": scales.pact_a_decay,
            "wd_mult": float(codes),
            "is_decoupled_lr": True,
        }
    return found


def prepare_gradients(optimizer: Any) -> float:
    """Makes gradients ready for `step_with_gradients`; the norm over all of them, on every rank.

    Megatron's own `step` returns the norm when weights have moved already.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm() or 0.0)


def step_with_gradients(optimizer: Any, norm: float) -> None:
    """Clips what `prepare_gradients` made ready by its norm, and steps (as `ChainedOptimizer.step`)."""
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


class _Schedule(OptimizerParamScheduler):  # type: ignore[misc]
    """Megatron's, but each parameter group warms up to its own rate from below it."""

    def get_lr(self, param_group: dict[str, Any]) -> float:
        # The first step of a warm-up already moves: Megatron counts from zero.
        self.init_lr = param_group.get("max_lr", self.max_lr) / (self.lr_warmup_steps + 1)
        return float(super().get_lr(param_group))


def _moments(settings: OptimizerConfig) -> dict[str, Any]:
    """Of Megatron's precision-aware optimizer, where moments are not in float32."""
    dtypes = {key: getattr(settings, key) for key in ("exp_avg_dtype", "exp_avg_sq_dtype")}
    if set(dtypes.values()) == {"float32"}:
        return {}
    return {"use_precision_aware_optimizer": True} | {
        key: getattr(torch, dtype) for key, dtype in dtypes.items()
    }


def build_optimizer(
    chunks: Sequence[Any],
    settings: OptimizerConfig,
    *,
    max_steps: int,
    clip_grad: float,
    lr: float | None = None,
    scales: QuantizationConfig | None = None,
) -> tuple[Any, OptimizerParamScheduler]:
    """Distributed AdamW over wrapped chunks, from their present weights, and its schedule.

    Args:
        chunks: From `wrap_for_training`.
        settings: Learning rate, betas, weight decay, schedule.
        max_steps: Steps over which the cosine decays.
        clip_grad: Largest global gradient norm; 0 turns clipping off.
        lr: Overrides `settings.lr`.
        scales: Learning rates and decay of learned scales, if there are any; None: the defaults.
    """
    dtype = next(chunks[0].parameters()).dtype
    peak = settings.lr if lr is None else lr
    scales = scales or QuantizationConfig()
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
            overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
            clip_grad=clip_grad,
            **_moments(settings),
        ),
        list(chunks),
        config_overrides=_overrides(chunks, scales, lr=peak, min_lr=settings.sched.min_lr),
    )
    cosine = settings.sched.name == "CosineAnnealing"
    scheduler = _Schedule(
        optimizer,
        init_lr=0.0,  # `_Schedule` has one for each group
        max_lr=peak,
        min_lr=settings.sched.min_lr,
        lr_warmup_steps=settings.sched.warmup_steps,
        lr_decay_steps=max(max_steps, 1),
        lr_decay_style="cosine" if cosine else "constant",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A longer run has another decay; `run_directory.py` decides what a resumed run may change.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )
    return optimizer, scheduler

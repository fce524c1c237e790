"""Which optimizers Megatron's distributed optimizer shards, saves and reshards; others are refused."""

from importlib.util import find_spec

import torch

from mqat.config import OptimizerConfig
from mqat.errors import UserError, nearest_hint

NAME = "adamw"
MOMENTS = ("float32", "bfloat16")
# Where the same is called otherwise: NeMo's and torch's names.
_SAME = ("adam", "fused_adam", "distributed_fused_adam", "adamw_torch", "adamw_torch_fused")
_ONLY_ADAM = (
    "Megatron's distributed optimizer takes torch's AdamW, Transformer Engine's or Apex's FusedAdam "
    "alone, as it saves and reshards their state by name"
)
_REFUSED = {
    "adamw_8bit": (
        f"{_ONLY_ADAM}; torchao's and bitsandbytes' 8-bit AdamW are none of these, and their blocks of "
        "256 elements would cross the borders of its shards"
    ),
    "muon": (
        "Megatron's Muon refuses the distributed optimizer (it orthogonalizes whole matrices), and "
        "needs the package emerging_optimizers"
    ),
    "sgd": _ONLY_ADAM,
    "adafactor": _ONLY_ADAM,
    "lion": _ONLY_ADAM,
}
_ALIASES = {
    "adam8bit": "adamw_8bit", "adamw8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit", "dist_muon": "muon",
}  # fmt: skip


def check_optimizer(settings: OptimizerConfig) -> None:
    """Refuses what cannot be sharded, and what this machine cannot run.

    Raises:
        UserError: Names the key, the reason and what to use instead.
    """
    _check_name(settings.name.lower())
    for key in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        dtype = getattr(settings, key)
        if dtype not in MOMENTS:
            raise UserError(
                f"config: model.optim.{key}={dtype!r} is not one of: {', '.join(MOMENTS)}."
            )
        has_fused = torch.cuda.is_available() and find_spec("transformer_engine") is not None
        if dtype != "float32" and not has_fused:
            raise UserError(
                f"config: model.optim.{key}={dtype}: Megatron's precision-aware optimizer computes "
                "that with Transformer Engine's FusedAdam, on CUDA (pip install 'mqat[te]'); here use "
                "float32."
            )
    if settings.optimizer_cpu_offload:
        raise UserError(
            "config: model.optim.optimizer_cpu_offload=true: Megatron's HybridDeviceOptimizer keeps its "
            "state in optimizers inside it, which mqat does not save and reshard yet; spread the state "
            "over more data-parallel ranks, or set model.optim.exp_avg_dtype=bfloat16 (on CUDA)."
        )


def _check_name(name: str) -> None:
    if name == NAME:
        return
    if name in _SAME:
        raise UserError(
            f"config: model.optim.name={name}: the optimizer is called {NAME} here, sharded over "
            "data-parallel ranks and fused where Transformer Engine is; leave the key out."
        )
    reason = _REFUSED.get(_ALIASES.get(name, name))
    if reason is not None:
        raise UserError(f"config: model.optim.name={name}: {reason}. Use {NAME}.")
    known = (NAME, *_SAME, *_REFUSED, *_ALIASES)
    raise UserError(f"config: model.optim.name={name!r}: not known; {nearest_hint(name, known)}")

"""A PEFT directory, checked: by itself, against its checkpoint bit for bit, and on a base model.

Read by itself: nothing is shared with what writes it. Source: peft 0.17 `tuners/lora/layer.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.verify.check import same_bytes
from mqat.verify.checkpoint_linear import CheckpointLinear
from mqat.verify.facts import read_facts
from mqat.verify.served_model import read_json

CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_PLAIN = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
    "use_dora": False, "modules_to_save": None,
}  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """What is added to one module: `scale * B A x`."""

    a: Tensor
    b: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """Of inputs [..., in], in float32."""
        return x @ self.a.float().t() @ self.b.float().t() * self.scale


def read_adapter(directory: Path, problems: list[str]) -> dict[str, LowRank]:
    """Hugging Face module -> what is added to it; empty where something is wrong with the files."""
    config = read_json(directory / CONFIG, problems)
    if problems:
        return {}
    for key, wanted in _PLAIN.items():
        if config.get(key) != wanted:
            problems.append(f"{CONFIG}: {key}={config.get(key)!r}, must be {wanted!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
        problems.append(f"{CONFIG}: r={rank!r} and lora_alpha={alpha!r} must be numbers")
        return {}
    try:
        tensors = load_file(directory / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        problems.append(f"{_WEIGHTS}: missing, truncated or not safetensors ({error})")
        return {}
    found, scale = {}, float(alpha) / rank
    for name in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        a, b = (tensors.pop(f"{name}.lora_{side}.weight", None) for side in "AB")
        if a is None or b is None or a.dim() != 2 or (*a.shape[:1], *b.shape[1:]) != (rank, rank):
            problems.append(
                f"{_WEIGHTS}: {name}: needs lora_A ({rank}, in) and lora_B (out, {rank})"
            )
            continue
        if not bool(a.isfinite().all() and b.isfinite().all()):
            problems.append(f"{_WEIGHTS}: {name}: has NaN or infinity")
        found[name.removeprefix(_PREFIX)] = LowRank(a, b, scale)
    problems += [f"{_WEIGHTS}: {name}: belongs to no adapter" for name in tensors]
    problems += _target_problems(config.get("target_modules"), found)
    return found


def _target_problems(targets: Any, found: Mapping[str, LowRank]) -> list[str]:
    """A target is a module's name, or the end of it."""
    if not isinstance(targets, list) or not targets:
        return [f"{CONFIG}: target_modules={targets!r} must be a list of names"]
    missed = [n for n in found if not any(n == t or n.endswith(f".{t}") for t in targets)]
    idle = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in found)]
    return [f"{CONFIG}: target_modules leaves out {name}" for name in missed] + [
        f"{CONFIG}: target_modules has {target}, of which there is no tensor" for target in idle
    ]


def compare_adapter(found: Mapping[str, LowRank], checkpoint: CheckpointReader) -> list[str]:
    """Problems, each naming a module, of an adapter beside the checkpoint that it was made from."""
    if checkpoint.adapters is None:
        return [f"{checkpoint.path}: holds no adapters"]
    facts, wanted = read_facts(checkpoint.model.family), dict[str, LowRank]()
    scale = checkpoint.adapters.alpha / checkpoint.adapters.rank
    prefix = facts.names["hf"]["layer"]
    for layer in range(checkpoint.model.num_layers):
        for name in facts.fused:
            linear = CheckpointLinear(checkpoint, facts, layer, name)
            if linear.name not in checkpoint.adapters.names:
                continue
            a, b = (
                checkpoint.read(f"{linear.name}.adapter.linear_{side}.weight")
                for side in ("in", "out")
            )
            parts = linear.by_part(b)
            for module, roles in facts.modules["hf"].items():
                if {*roles} & parts.keys():
                    own = torch.cat([parts[role] for role in roles])
                    wanted[prefix.format(layer) + module] = LowRank(a, own, scale)
    problems = [f"{name}: is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name}: was not trained" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        pairs = zip(
            "AB", (found[name].a, found[name].b), (wanted[name].a, wanted[name].b), strict=True
        )
        problems += [
            f"{name}.lora_{side}: differs from the checkpoint's"
            for side, served, trained in pairs
            if not same_bytes(served, trained)
        ]
        if not math.isclose(found[name].scale, scale, rel_tol=1e-12):
            problems.append(
                f"{name}: is multiplied by {found[name].scale:g}, trained with {scale:g}"
            )
    return problems

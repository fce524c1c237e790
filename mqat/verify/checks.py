"""Static checks of an exported directory: no reference, no forward pass, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mqat.verify.layout import Expected, ServedConfig, expected_tensors

# Safetensors dtype names of torch dtypes.
_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}


def check_files(directory: Path, config: ServedConfig) -> list[str]:
    """Everything that can be wrong with the rank files; each problem names file and tensor."""
    problems: list[str] = []
    world = config.tp * config.pp
    wanted = {f"rank{rank}.safetensors" for rank in range(world)}
    found = {file.name for file in directory.glob("*.safetensors")}
    problems += [f"{name}: missing" for name in sorted(wanted - found)]
    problems += [f"{name}: stale file of another layout" for name in sorted(found - wanted)]
    for pp_rank in range(config.pp):
        expected = expected_tensors(config, pp_rank)
        handles = {}
        for tp_rank in range(config.tp):
            name = f"rank{pp_rank * config.tp + tp_rank}.safetensors"
            if name not in found:
                continue
            try:
                handles[name] = safe_open(directory / name, framework="pt")
            except (OSError, SafetensorError) as error:
                problems.append(f"{name}: truncated or not safetensors ({error})")
        first: dict[str, Tensor] = {}
        for file, handle in handles.items():
            names = set(handle.keys())
            problems += [f"{file}: {n} is missing" for n in sorted(expected.keys() - names)]
            problems += [f"{file}: {n} is not expected" for n in sorted(names - expected.keys())]
            for name in sorted(names & expected.keys()):
                tensor = handle.get_tensor(name)
                wrong = _tensor_problem(name, tensor, expected[name], config)
                if wrong is None and expected[name].is_replicated:
                    same = first.setdefault(name, tensor)
                    if not torch.equal(same, tensor):
                        wrong = "differs between tensor-parallel ranks, must be the same"
                if wrong is not None:
                    problems.append(f"{file}: {name} {wrong}")
        problems += _copied_heads(config, handles)
    return problems


def _tensor_problem(
    name: str, tensor: Tensor, expected: Expected, config: ServedConfig
) -> str | None:
    """What is wrong with one tensor, or None."""
    if tuple(tensor.shape) != expected.shape:
        return f"has shape {tuple(tensor.shape)}, expected {expected.shape}"
    if _NAMES.get(tensor.dtype) != expected.dtype:
        return f"has dtype {tensor.dtype}, expected {expected.dtype}"
    values = tensor.float()
    if not values.isfinite().all():
        return "holds NaN or infinity"
    if name.endswith("scaling_factor"):
        if not (values > 0).all():
            return "holds a scale that is not positive"
        if name.endswith("prequant_scaling_factor") and not (values == 1).all():
            return "is not all ones, but mqat folds smoothing into the weights"
        return None
    if tensor.dtype == torch.int8 and config.algorithm == "W8A8_SQ_PER_CHANNEL":
        if (tensor == -128).any():
            return "holds the code -128, outside -127..127"
        reach = int(tensor.abs().amax(dim=1).max())
        if reach < 64:
            return f"uses codes up to {reach} only; the scale is too large"
    if tensor.dtype == torch.float8_e4m3fn and float(values.abs().max()) < 64:
        return f"reaches only {float(values.abs().max())} of 448; the scale is too large"
    return None


def _copied_heads(config: ServedConfig, handles: dict[str, safe_open]) -> list[str]:
    """With more ranks than key/value heads, the copies of a head must be the same."""
    groups = int(config.raw["num_key_value_heads"])
    copies = config.tp // groups
    if copies < 2 or len(handles) != config.tp:
        return []
    head = int(config.raw["head_size"])
    rows = 2 * head * config.key_value_heads_per_rank
    packed = config.algorithm == "W4A16_AWQ"
    problems = []
    ordered = list(handles.items())
    for layer in range(config.layers_per_stage):
        name = f"transformer.layers.{layer}.attention.qkv.weight"
        tail = rows // 2 if packed and config.is_quantized(name.removesuffix(".weight")) else rows
        for rank, (file, handle) in enumerate(ordered):
            if rank % copies == 0:
                original = handle.get_tensor(name)[-tail:]
            elif not torch.equal(
                original.view(torch.uint8), handle.get_tensor(name)[-tail:].view(torch.uint8)
            ):
                problems.append(f"{file}: {name} copies a key/value head that differs")
    return problems

"""Static checks of an exported directory: no reference, no forward pass, one tensor at a time."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mqat.verify.expected import Expected, expected_tensors
from mqat.verify.layout import ServedConfig
from mqat.verify.values import Ranks, value_problems


def check_files(directory: Path, config: ServedConfig) -> list[str]:
    """Everything that can be wrong with the rank files; each problem names file and tensor."""
    wanted = {f"rank{rank}.safetensors" for rank in range(config.tp * config.pp)}
    found = {file.name for file in directory.glob("*.safetensors")}
    problems = [f"{name}: missing" for name in sorted(wanted - found)]
    problems += [f"{name}: stale file of another layout" for name in sorted(found - wanted)]
    if (directory / "quant_cfg.json").exists() and config.algorithm != "MIXED_PRECISION":
        problems.append("quant_cfg.json: stale, quant_algo is not MIXED_PRECISION")
    if wanted - found:
        return problems
    for pp_rank in range(config.pp):
        first = pp_rank * config.tp
        handles = {}
        for tp_rank in range(config.tp):
            name = f"rank{first + tp_rank}.safetensors"
            try:
                handles[name] = safe_open(directory / name, framework="pt")
            except (OSError, SafetensorError) as error:
                problems.append(f"{name}: truncated or not safetensors ({error})")
        if len(handles) == config.tp:
            problems += _check_stage(handles, expected_tensors(config, pp_rank), config)
    return problems


def _check_stage(
    handles: dict[str, safe_open], expected: dict[str, Expected], config: ServedConfig
) -> list[str]:
    """Headers of one stage's files, then the values of the tensors whose headers are right."""
    problems = []
    doubtful = set()
    for file, handle in handles.items():
        names = set(handle.keys())
        problems += [f"{file}: {n} is missing" for n in sorted(expected.keys() - names)]
        problems += [f"{file}: {n} is not expected" for n in sorted(names - expected.keys())]
        doubtful |= expected.keys() - names
        for name in sorted(names & expected.keys()):
            header = handle.get_slice(name)
            shape, dtype = tuple(header.get_shape()), header.get_dtype()
            if (shape, dtype) != (expected[name].shape, expected[name].dtype):
                problems.append(
                    f"{file}: {name} is {dtype} {shape}, expected {expected[name].dtype} "
                    f"{expected[name].shape}"
                )
                doubtful.add(name)
    for name in sorted(expected.keys() - doubtful, key=_layer_order):
        ranks: Ranks = {file: handle.get_tensor(name) for file, handle in handles.items()}
        problems += value_problems(name, ranks, expected[name], config)
    if not doubtful:
        problems += _shared_input_problems(handles, expected, config)
    return problems


def _layer_order(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _shared_input_problems(
    handles: dict[str, safe_open], expected: dict[str, Expected], config: ServedConfig
) -> list[str]:
    """`fc` and `gate` read the same input; fused kernels also need one per-tensor weight scale."""
    handle = next(iter(handles.values()))
    problems = []
    for name in expected:
        module, _, suffix = name.rpartition(".")
        is_fp8 = config.algorithm_of(module) == "FP8"
        shared = suffix in ("activation_scaling_factor", "weights_scaling_factor_2") or (
            suffix == "weights_scaling_factor" and is_fp8
        )
        if ".mlp.fc." not in name or not shared:
            continue
        other = name.replace(".mlp.fc.", ".mlp.gate.")
        if other in expected and not bool(
            (handle.get_tensor(name) == handle.get_tensor(other)).all()
        ):
            problems.append(f"{name} differs from {other}; fused kernels need one value")
    return problems

"""Everything to be measured on a GPU machine, in one command; a JSON file and a table.

    python tools/bench_gpu.py --json out.json
    python tools/bench_gpu.py --json out.json --device cpu        its parts, tiny, on a CPU

1. `pytest -m gpu`.
2. SHA-256 of codes, masks, values and INT8 products of fixed inputs against the CPU's.
3. Step time, peak memory, bytes kept for backward of a microbatch and the longest kernels: of Megatron's
   own layers (`baseline`, to which ratios are), of Megatron's model of Transformer Engine's layers where
   that is installed (`transformer-engine`; nothing of mqat computes in it), of mqat
   per algorithm with the modelled ratio beside it (`mqat/plan/step_model.py`), and of modelopt and
   torchao where they are installed. Each has a process of its own.

Status 1 if a test fails, a digest differs or a system could not be measured; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_model import System, arguments, batches, build, llama, start, step
from bench_peers import available, build_peer, memory
from torch.profiler import ProfilerActivity, profile

from mqat.kernels.device_check import digests
from mqat.plan.step_model import H100, estimate, linear_kernels
from mqat.quant.algorithm import ALGORITHMS as KNOWN
from mqat.quant.algorithm import named_scheme
from mqat.runtime import groups

ROOT = Path(__file__).parents[1]
ALGORITHMS = ("int8", "int8_pc_pt", "fp8", "fp8_pc_pt", "int4", "int4_w_int8_a", "nvfp4", "mxfp8")
# Sizes by device: those of the model in `mqat plan`'s estimate, and what a CPU does in seconds.
SIZES = {
    "cuda": {"hidden": 4096, "layers": 4, "tokens": 8192, "microbatches": 8, "vocab": 32000},
    "cpu": {"hidden": 128, "layers": 2, "tokens": 64, "microbatches": 2, "vocab": 256},
}
LONGEST = 12  # kernels in the table of each system


def parse(arguments_given: list[str] | None = None) -> argparse.Namespace:
    """Options; sizes default to those of the device."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--algorithms", nargs="*", choices=KNOWN, metavar="NAME")
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "ALGORITHM"), help=argparse.SUPPRESS)
    parser.set_defaults(precision="bf16", algorithms=list(ALGORITHMS), backward=["int8", "fp8"])
    known, _ = parser.parse_known_args(arguments_given)
    parser.set_defaults(**SIZES[known.device])
    return parser.parse_args(arguments_given)


def run_tests(device: str) -> dict[str, Any]:
    """`pytest -m gpu`, and its last line."""
    if device == "cpu":
        return {"passed": None, "summary": "not run: no GPU asked for"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "summary": lines[-1], "failed": failed}


def compare_digests(device: str) -> dict[str, Any]:
    """Calls whose bits differ from the CPU's."""
    expected, found = digests(torch.device("cpu")), digests(torch.device(device))
    differing = [call for call in expected if expected[call] != found[call]]
    return {"calls": len(expected), "differing": differing, "sha256": found}


def in_own_process(args: argparse.Namespace, given: list[str], *one: str) -> dict[str, Any]:
    """What `--one` prints; if it fails, the last line of its error."""
    print(*one, "...", file=sys.stderr, flush=True)
    hidden = {"CUDA_VISIBLE_DEVICES": "-1"} if args.device == "cpu" else {}
    command = [sys.executable, __file__, *given, "--one", *one]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | hidden
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def modelled_ratio(args: argparse.Namespace, name: str, algorithm: str) -> float:
    """What `mqat plan` says of these sizes on an H100."""
    model, scheme, backward = llama(args), named_scheme(algorithm), name.partition("-")[2] or "bf16"
    pairs = [
        (
            linear_kernels(scheme, args.tokens, *linear.shape(model), backward=backward),
            linear_kernels(None, args.tokens, *linear.shape(model)),
        )
        for linear in model.linears
    ]
    return estimate(pairs, args.microbatches, H100).ratio


def longest_kernels(
    system: System, data: list[dict[str, Any]], device: str
) -> list[dict[str, Any]]:
    """Name, calls and microseconds of what takes the longest in one step."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        step(system, data)
        torch.cuda.synchronize()
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda e: getattr(e, kind), reverse=True)
    return [
        {"kernel": e.key, "calls": e.count, "microseconds": round(getattr(e, kind), 1)}
        for e in events[:LONGEST]
    ]


def measure(args: argparse.Namespace, name: str, algorithm: str) -> dict[str, Any]:
    """The row of one system, in this process."""
    start(args)
    data = batches(args)
    make = build_peer if name in ("modelopt", "torchao") else build
    system = make(args, name, algorithm)
    kept = memory(system, data[:1])
    on_cuda = args.device == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step(system, data)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    seconds = seconds[1:]  # the first one warms up
    row = {
        "system": name,
        "algorithm": algorithm,
        "step_seconds": statistics.median(seconds),
        "step_seconds_range": [min(seconds), max(seconds)],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
        "kept_for_backward_bytes": kept["saved_bytes"],
        "kept_by_linears_bytes": kept["linear_saved_bytes"],
        "kernels": longest_kernels(system, data, args.device),
    }
    groups.finalize()
    return row


def systems(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Name and algorithm of what is measured, the baseline first."""
    engines = [("transformer-engine", "null")]
    if importlib.util.find_spec("transformer_engine") is None:
        print("transformer_engine is not installed: no row", file=sys.stderr)
        engines = []
    own = [("mqat", algorithm) for algorithm in ("null", *args.algorithms)]
    own += [(f"mqat-{a}", a) for a in args.algorithms if a in args.backward]
    own += [("mqat-reference", a) for a in args.algorithms if args.reference]
    return [("baseline", "null"), *engines, *own, *available()]


def measure_all(args: argparse.Namespace, given: list[str]) -> list[dict[str, Any]]:
    """Every system, with its ratio to the first."""
    rows: list[dict[str, Any]] = []
    for name, algorithm in systems(args):
        row = {"system": name, "algorithm": algorithm}
        row |= in_own_process(args, given, name, algorithm)
        base = rows[0] if rows else row
        if "step_seconds" in row and "step_seconds" in base:
            row["step_ratio"] = row["step_seconds"] / base["step_seconds"]
        if name.startswith("mqat") and name != "mqat-reference" and "error" not in row:
            row["modelled_ratio"] = modelled_ratio(args, name, algorithm)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """For people, in Markdown."""

    def cell(row: dict[str, Any], key: str, form: str, unit: float = 1.0) -> str:
        return form.format(row[key] / unit) if row.get(key) is not None else "-"

    lines = [
        "| system | algorithm | step, s | of baseline | modelled, H100 | peak GiB | kept GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['system']} | {row['algorithm']} | {row['error']} | | | | |")
            continue
        cells = [
            row["system"], row["algorithm"], cell(row, "step_seconds", "{:.4f}"),
            cell(row, "step_ratio", "{:.3f}"), cell(row, "modelled_ratio", "{:.3f}"),
            cell(row, "peak_memory_bytes", "{:.2f}", 2**30),
            cell(row, "kept_for_backward_bytes", "{:.3f}", 2**30),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kernel_table(row: dict[str, Any]) -> str:
    """The longest kernels of a system."""
    lines = [f"{row['system']} {row['algorithm']}, one step:"]
    for each in row["kernels"]:
        lines.append(f"{each['microseconds']:12.1f} us {each['calls']:6}  {each['kernel'][:100]}")
    return "\n".join(lines)


def main() -> int:
    """Measures, writes the file, prints the tables; returns the exit status."""
    given = sys.argv[1:]
    args = parse(given)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench_gpu: torch sees no CUDA device here; run it on a GPU machine, or try its parts with "
            "--device cpu",
            file=sys.stderr,
        )
        return 2
    if args.one:
        is_digests = args.one[0] == "digests"
        print(json.dumps(compare_digests(args.device) if is_digests else measure(args, *args.one)))
        return 0
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "sizes": {key: getattr(args, key) for key in SIZES["cuda"]},
        "tests": run_tests(args.device),
        "digests": in_own_process(args, given, "digests", args.device),
        "systems": measure_all(args, given),
    }
    args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    compared = result["digests"]
    print(f"{result['card']}, torch {result['torch']}, {result['sizes']}")
    print(f"pytest -m gpu: {result['tests']['summary']}")
    if "error" in compared:
        print(f"digests: {compared['error']}")
    else:
        print(
            f"digests: of {compared['calls']} calls differ from the CPU's: {compared['differing']}"
        )
    print(table(result["systems"]))
    for row in result["systems"]:
        if "kernels" in row:
            print(f"\n{kernel_table(row)}")
    is_broken = any("error" in row for row in (compared, *result["systems"]))
    return int(is_broken or bool(compared.get("differing")) or result["tests"]["passed"] is False)


if __name__ == "__main__":
    sys.exit(main())

"""Time of a QAT step against the unquantized step, interleaved in one process.

    python tools/bench_qat_step.py --tokens 256 --json
    python tools/bench_qat_step.py --tokens 1024 --algorithms int8 fp8 --backward int8 fp8
    torchrun --nproc-per-node 2 tools/bench_qat_step.py --tp 2 [--sequence-parallel]

Ratios are to `baseline`: Megatron's own layers with torch's norm and SDPA attention, unquantized, in the
same precision. `mqat null` is mqat's own unquantized model, whose norms and SwiGLU are leaner. Rank 0
reports; CPU seconds are those of its process, and less disturbed by other programs than wall seconds.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from bench_model import arguments, batches, build, start, step, systems_of

from mqat.runtime import groups


def _spread(values: list[float]) -> list[float]:
    return [round(min(values), 4), round(max(values), 4)]


def main() -> None:
    """Prints a table, or JSON."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.set_defaults(precision="bf16")
    args = parser.parse_args()
    start(args)
    systems = [build(args, *kind) for kind in systems_of(args)]
    data = batches(args)
    wall: list[list[float]] = [[] for _ in systems]
    cpu: list[list[float]] = [[] for _ in systems]
    for repeat in range(args.repeats + 1):
        for i, system in enumerate(systems):
            began, began_cpu = time.perf_counter(), time.process_time()
            step(system, data)
            if repeat:  # the first round warms up
                wall[i].append(time.perf_counter() - began)
                cpu[i].append(time.process_time() - began_cpu)
    results: list[dict[str, Any]] = []
    for system, seconds, busy in zip(systems, wall, cpu, strict=True):
        results.append(
            {
                "system": system.name,
                "algorithm": system.algorithm,
                "precision": args.precision,
                "tokens_per_microbatch": args.tokens,
                "microbatches": args.microbatches,
                "hidden": args.hidden,
                "layers": args.layers,
                "tp": args.tp,
                "pp": args.pp,
                "sequence_parallel": args.sequence_parallel,
                "step_seconds": statistics.median(seconds),
                "step_seconds_range": _spread(seconds),
                "step_ratio": statistics.median(seconds) / statistics.median(wall[0]),
                "step_ratio_of_fastest": min(seconds) / min(wall[0]),
                "step_cpu_ratio": statistics.median(busy) / statistics.median(cpu[0]),
                # Each repeat against the baseline that ran just before it.
                "step_cpu_ratio_range": _spread([b / a for a, b in zip(cpu[0], busy, strict=True)]),
            }
        )
    if groups.is_main():
        if args.json:
            print(json.dumps({"results": results}, indent=1))
        else:
            for row in results:
                print(
                    f"{row['system']:>15} {row['algorithm']:>14}  {row['step_seconds']:7.3f} s"
                    f"  x{row['step_ratio']:.3f} wall  x{row['step_cpu_ratio']:.3f} CPU"
                    f"  {row['step_cpu_ratio_range']}"
                )
    groups.finalize()


if __name__ == "__main__":
    main()

"""Latency of a model with low-precision weights against floats, by number of tokens; eager.

    python tools/bench_lowering.py --layers 2 --json

Perplexity of a lowered checkpoint: `mqat eval CKPT --text FILE --lowered`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time

import torch
from bench_model import arguments, build, start

from mqat.runtime import groups

KINDS = (("bf16", "null"), ("32", "null"), ("bf16", "int8"), ("32", "int8"), ("bf16", "int4"))


def main() -> None:
    """Prints a table, or JSON."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="*", type=int, default=[1, 16, 512])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    start(args)
    from mqat.parallel.lowering import lower_

    models = []
    for precision, algorithm in KINDS:
        own: argparse.Namespace = copy.copy(args)
        own.precision = precision
        system = build(own, "mqat", algorithm)
        (chunk,) = system.chunks
        if algorithm != "null":
            lower_(chunk)
        chunk.eval()
        models.append((f"{algorithm}/{precision}", chunk))
    results = []
    for size in args.sizes:
        tokens = torch.zeros(1, size, dtype=torch.long)
        positions = torch.arange(size)[None]
        seconds: list[list[float]] = [[] for _ in models]
        for _ in range(args.repeats + 1):
            for i, (_, chunk) in enumerate(models):
                began = time.process_time()
                with torch.no_grad():
                    chunk(tokens, positions, None)
                seconds[i].append(time.process_time() - began)
        medians = [statistics.median(values[1:]) for values in seconds]
        for (name, _), values, median in zip(models, seconds, medians, strict=True):
            results.append(
                {
                    "system": name,
                    "tokens": size,
                    "latency_cpu_seconds": median,
                    "range": [round(min(values[1:]), 5), round(max(values[1:]), 5)],
                    "speedup_over_bf16": medians[0] / median,
                    "speedup_over_fp32": medians[1] / median,
                }
            )
    if args.json:
        print(json.dumps({"results": results}, indent=1))
    else:
        for row in results:
            print(
                f"{row['tokens']:5d} tokens {row['system']:>10} {row['latency_cpu_seconds'] * 1e3:9.2f}"
                f" ms CPU  x{row['speedup_over_bf16']:.2f} of bf16  x{row['speedup_over_fp32']:.2f}"
                " of fp32"
            )
    groups.finalize()


if __name__ == "__main__":
    main()

"""Latency of a model with low-precision weights beside its perplexity: formats x modes x tokens.

    python tools/bench_lowering.py --hidden 2048 --layers 4 --json
    python tools/bench_lowering.py --packaged --kinds bf16 int8 int4_g64 --json

The first runs a random model of any size; the second SmolLM2-135M with its perplexity, of the same
lowered model, on held-out articles. All kinds of one mode take turns in one process. With `--modes
compile`, `torch.compile` translates the layers; its seconds are the first call's, less a later one's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench_model import arguments, batches, calibrate_on, llama, start
from torch import Tensor

from mqat.config import ModelConfig
from mqat.runtime import groups
from mqat.specs.policy import Policy

SEQUENCE = 512


@dataclass
class Lowered:
    """One model to measure.

    Attributes:
        kind: `bf16`, an algorithm, or an algorithm with a group size: `int4_g64`.
        mode: `eager` or `compile`.
        chunk: Evaluates in bfloat16.
        num_bytes: Of the weights of its linears.
        perplexity: On real text; None for a random model.
    """

    kind: str
    mode: str
    chunk: Any
    num_bytes: int
    perplexity: float | None


def _policy(kind: str) -> Policy:
    algorithm, _, size = kind.partition("_g")
    return Policy("null") if kind == "bf16" else Policy(
        algorithm, group_size=int(size) if size else None
    )  # fmt: skip


def _source(args: argparse.Namespace) -> tuple[Any, Any, list[dict[str, Any]], Tensor | None]:
    """Model sizes, weights, calibration microbatches and held-out rows [n, SEQUENCE + 1]."""
    from mqat.checkpoints.random_weights import RandomWeights

    if not args.packaged:
        model = llama(args)
        return model, RandomWeights(model, 1, 0.02), batches(args)[:2], None
    from mqat.checkpoints.source import open_pretrained
    from mqat.config import DataConfig
    from mqat.data.dataset import load_run_data
    from mqat.data.packaged import smollm2_gguf

    source = open_pretrained(smollm2_gguf())
    config = DataConfig(packaged="wikipedia", seq_length=SEQUENCE)
    data = load_run_data(
        config, model=source.config, source=source.tokenizer_source, checkpoint=None
    )
    rows = torch.as_tensor(data.train.tokens).long()
    every = rows[:: max(1, len(rows) // args.calibration)][: args.calibration]
    microbatches = [
        {
            "tokens": row[None, :-1].contiguous(),
            "position_ids": torch.arange(SEQUENCE)[None],
            "attention_mask": None,
        }
        for row in every
    ]
    return source.config, source, microbatches, torch.as_tensor(data.validation.tokens).long()


@torch.no_grad()
def perplexity(chunk: Any, rows: Tensor) -> float:
    """Exponential of the mean loss per token of rows [n, SEQUENCE + 1]."""
    positions, loss = torch.arange(rows.shape[1] - 1)[None], 0.0
    for row in rows:
        scores = chunk(row[None, :-1], positions, None)[0, :, : chunk.true_vocab_size]
        loss += float(torch.nn.functional.cross_entropy(scores.float(), row[1:]))
    return math.exp(loss / len(rows))


def build(kind: str, mode: str, args: argparse.Namespace) -> Lowered:
    """Calibrates, lowers, and takes the perplexity before anything is compiled."""
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.parallel.linear import decoder_linears
    from mqat.parallel.pack_weights import compile_layers_, pack_weights_
    from mqat.specs.model import build_model

    model, weights, microbatches, held_out = _source(args)
    layers = _policy(kind).schemes(model)
    (chunk,) = build_model(model, ModelConfig(), layers, torch.bfloat16)
    load_pretrained_([chunk], weights)
    num_bytes = sum(x.weight.numel() * 2 for x in decoder_linears(chunk).values())
    if layers:
        calibrate_on([chunk], microbatches)
        _, num_bytes = pack_weights_([chunk])
    chunk.eval().requires_grad_(False)
    found = None
    if held_out is not None:
        found = perplexity(chunk, held_out[:: max(1, len(held_out) // args.evaluation)])
    if mode == "compile":
        compile_layers_(chunk)
    return Lowered(kind, mode, chunk, num_bytes, found)


def latencies(
    systems: Sequence[Lowered], size: int, repeats: int, vocab: int
) -> list[dict[str, Any]]:
    """A row for each of some models that take turns with one sequence of `size` tokens."""
    tokens = torch.randint(0, vocab, (1, size), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(size)[None]
    wall: list[list[float]] = [[] for _ in systems]
    cpu: list[list[float]] = [[] for _ in systems]
    for _ in range(repeats + 2):
        for i, system in enumerate(systems):
            began, began_cpu = time.perf_counter(), time.process_time()
            with torch.no_grad():
                system.chunk(tokens, positions, None)
            cpu[i].append(time.process_time() - began_cpu)
            wall[i].append(time.perf_counter() - began)
    rows = []
    for system, seconds, busy in zip(systems, wall, cpu, strict=True):
        ratios = [a / b for a, b in zip(cpu[0][2:], busy[2:], strict=True)]
        rows.append(
            {
                "system": "mqat",
                "algorithm": system.kind,
                "mode": system.mode,
                "tokens": size,
                "latency_seconds": statistics.median(seconds[2:]),
                "latency_cpu_seconds": statistics.median(busy[2:]),
                "latency_cpu_range": [round(min(busy[2:]), 5), round(max(busy[2:]), 5)],
                "speedup_over_bf16": statistics.median(ratios),
                "speedup_range": [round(min(ratios), 2), round(max(ratios), 2)],
                "first_call_seconds": seconds[0] - statistics.median(seconds[2:]),
                "weight_bytes": system.num_bytes,
                "perplexity": system.perplexity,
            }
        )
    return rows


def table(results: Sequence[dict[str, Any]], sizes: Sequence[int]) -> str:
    """Markdown: a line for each kind and mode, CPU milliseconds and speed over bf16 by tokens."""
    heads = [f"{size} tokens" for size in sizes]
    lines = [
        f"| weights | mode | MB | perplexity | {' | '.join(heads)} | compiling |",
        "|" + "---|" * (5 + len(sizes)),
    ]
    for kind, mode in dict.fromkeys((row["algorithm"], row["mode"]) for row in results):
        own = {r["tokens"]: r for r in results if (r["algorithm"], r["mode"]) == (kind, mode)}
        first = next(iter(own.values()))
        found = first["perplexity"]
        cells = [
            f"{own[n]['latency_cpu_seconds'] * 1e3:.1f} ms (x{own[n]['speedup_over_bf16']:.2f})"
            for n in sizes
        ]
        compiling = sum(row["first_call_seconds"] for row in own.values())
        lines.append(
            f"| {kind} | {mode} | {first['weight_bytes'] / 1e6:.0f} | "
            f"{'-' if found is None else f'{found:.2f}'} | {' | '.join(cells)} | "
            f"{f'{compiling:.0f} s' if mode == 'compile' else '-'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints a table, or JSON."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument(
        "--packaged", action="store_true", help="SmolLM2-135M instead of a random model"
    )
    parser.add_argument("--kinds", nargs="*", default=["bf16", "int8", "int4"], help="bf16 first")
    parser.add_argument("--modes", nargs="*", choices=("eager", "compile"), default=["eager"])
    parser.add_argument("--sizes", nargs="*", type=int, default=[1, 16, 128, 512])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calibration", type=int, default=16, help="sequences, if --packaged")
    parser.add_argument("--evaluation", type=int, default=16, help="sequences, if --packaged")
    args = parser.parse_args()
    start(args)
    results: list[dict[str, Any]] = []
    for mode in args.modes:
        systems = [build(kind, mode, args) for kind in args.kinds]
        for size in args.sizes:
            results += latencies(systems, size, args.repeats, args.vocab)
    print(json.dumps({"results": results}, indent=1) if args.json else table(results, args.sizes))
    groups.finalize()


if __name__ == "__main__":
    main()

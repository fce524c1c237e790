"""Peak memory and time of a distillation loss: chunk by chunk, and as it is written down.

    python tools/bench_distillation.py [--tokens 2048] [--vocab 49152] [--hidden 576] [--top-k 100]

Forward KL of a student's bf16 logits to a teacher's, forward and backward, in a process of its own for
each row. `peak`: growth of the process's memory beyond the student's logits. `written down`: logits of
both models in float32, `log_softmax`, and a sum, by autograd.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.parallel.divergence import DistillationLoss, distillation_losses
from mqat.runtime import groups

WAYS = ("chunks", "written down")


def written_down(student: Tensor, teacher: Tensor, top_k: int | None) -> Tensor:
    """KL(teacher || student) of every row."""
    s, t = student.float(), teacher.float()
    if top_k is not None:
        best = t.topk(top_k, dim=1).indices
        s, t = s.gather(1, best), t.gather(1, best)
    log_t = t.log_softmax(1)
    return (log_t.exp() * (log_t - s.log_softmax(1))).sum(1)


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of one way."""
    groups.join("gloo")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    student = normal(args.tokens, args.vocab).requires_grad_()
    hidden, head = normal(args.tokens, args.hidden) / 24, normal(args.vocab, args.hidden)
    labels = torch.zeros(args.tokens, dtype=torch.long)
    loss = DistillationLoss(top_k=args.top_k)
    seconds, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(args.repeats):
        student.grad = None
        started = time.perf_counter()
        if way == "chunks":
            values, _, _ = distillation_losses(
                student, lambda a, b: torch.nn.functional.linear(hidden[a:b], head), labels, loss,
                vocab_size=args.vocab, group=dist.group.WORLD,
            )  # fmt: skip
        else:
            values = written_down(student, torch.nn.functional.linear(hidden, head), args.top_k)
        values.mean().backward()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    groups.finalize()
    return {
        "way": way, "loss": values.mean().item(), "peak_mib": peak / 1024,
        "seconds": statistics.median(seconds),
    }  # fmt: skip


def main() -> None:
    """Prints a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args)))
        return
    size = args.tokens * args.vocab * 2 / 2**20
    print(f"student's logits: {size:.0f} MiB")
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--way", way],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{way:>12}: peak {row['peak_mib']:.0f} MiB, {row['seconds']:.2f} s, "
            f"loss {row['loss']:.6f}"
        )


if __name__ == "__main__":
    main()

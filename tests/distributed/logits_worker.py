"""Run by torchrun: opens a model at some layout and saves its logits for fixed tokens."""

import argparse
from pathlib import Path

import torch

from mqat.runtime import groups
from mqat.runtime.groups import command_line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--lowered", action="store_true")
    args = parser.parse_args()
    from mqat.checkpoints.load_model import load_model
    from mqat.evaluation.forward import logits

    layout = {"tensor_parallel": args.tp, "pipeline_parallel": args.pp, "expert_parallel": args.ep}
    model = load_model(args.model, **layout, sequence_parallel=args.sp, lowered=args.lowered)
    result = logits(model.chunks, torch.load(args.tokens))
    if groups.is_main():
        torch.save(result.cpu(), args.out)
    groups.finalize()


if __name__ == "__main__":
    with command_line():
        main()

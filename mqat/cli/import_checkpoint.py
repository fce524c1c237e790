"""`mqat import`: foreign weights become a dist-checkpoint, also under torchrun."""

import argparse
from pathlib import Path

from mqat.cli.arguments import DEFAULT, add_layout
from mqat.errors import UserError

HELP = "Hugging Face directory or GGUF -> dist-checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=("bf16", "32"), default="32", help=DEFAULT)
    add_layout(parser)


def run(args: argparse.Namespace) -> None:
    """Imports `args.source`."""
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.checkpoints.load_model import load_model
    from mqat.runtime import groups

    if args.out.exists():
        raise UserError(f"{args.out} exists already; choose another path, or delete it first.")
    model = load_model(
        args.source,
        tensor_parallel=args.tensor_parallel,
        pipeline_parallel=args.pipeline_parallel,
        precision=args.precision,
    )
    save_checkpoint(
        args.out,
        model.chunks,
        model=model.config,
        layers={},
        algorithm=None,
        tokenizer=model.tokenizer,
    )
    if groups.is_main():
        print(f"{args.out}: {model.config.num_layers} layers, {args.precision}")
    groups.finalize()

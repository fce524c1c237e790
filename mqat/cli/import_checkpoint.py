"""`mqat import`: foreign weights become a dist-checkpoint, also under torchrun."""

import argparse
from pathlib import Path

from mqat.cli.arguments import DEFAULT, add_layout
from mqat.errors import UserError

HELP = "Hugging Face directory, GGUF, Megatron-LM or NeMo checkpoint -> dist-checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=("bf16", "32"), default="32", help=DEFAULT)
    parser.add_argument(
        "--config-from", type=Path, metavar="HF_DIR",
        help="Hugging Face directory that describes a Megatron checkpoint which does not say enough",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="where it is, if not with the model"
    )
    parser.add_argument("--base", type=Path, help="model that a LoRA adapter is merged into")
    add_layout(parser)


def run(args: argparse.Namespace) -> None:
    """Imports `args.source`."""
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.checkpoints.load_model import load_model
    from mqat.checkpoints.manifest import DESCRIPTION
    from mqat.checkpoints.source import open_pretrained
    from mqat.runtime import groups

    if args.out.exists():
        raise UserError(f"{args.out} exists already; choose another path, or delete it first.")
    source = None
    if not (args.source / DESCRIPTION).exists():
        source = open_pretrained(
            args.source, config_from=args.config_from, tokenizer=args.tokenizer, base=args.base
        )
    elif args.config_from or args.tokenizer or args.base:
        raise UserError(
            f"{args.source}: is a checkpoint of mqat already; leave out --config-from, --tokenizer and "
            "--base."
        )
    model = load_model(
        args.source,
        tensor_parallel=args.tensor_parallel,
        pipeline_parallel=args.pipeline_parallel,
        precision=args.precision,
        pretrained=source,
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

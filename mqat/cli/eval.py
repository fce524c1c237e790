"""`mqat eval`: the perplexity of a text under a checkpoint or an exported directory."""

import argparse
import json
import math
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from mqat.cli.arguments import DEFAULT, positive
from mqat.errors import UserError

HELP = "token perplexity of a checkpoint or an exported directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seq-length", type=positive, default=256, help=DEFAULT)
    parser.add_argument(
        "--precision", choices=("bf16", "32"), default="32", help=f"of a checkpoint; {DEFAULT}"
    )
    parser.add_argument("--lowered", action="store_true", help="run with low-precision weights")
    parser.add_argument(
        "--compile", action="store_true", help="with --lowered: torch.compile, which takes a while"
    )
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> None:
    """Prints the perplexity of `args.text`."""
    from mqat.checkpoints.archive import unpacked
    from mqat.evaluation.perplexity import checkpoint_perplexity, export_perplexity
    from mqat.verify.verify import is_export

    is_archive = args.model.suffix == ".qnemo"
    with unpacked(args.model) if is_archive else nullcontext(args.model) as model:
        if is_export(model) and (args.lowered or args.precision != "32"):
            raise UserError(
                f"{args.model}: --lowered and --precision are for checkpoints; this is an export, "
                "which is computed in float32."
            )
        if args.compile and not args.lowered:
            raise UserError("--compile goes with --lowered: other models compute as they train.")
        if is_export(model):
            found = export_perplexity(model, args.text, seq_length=args.seq_length)
        else:
            found = checkpoint_perplexity(
                model, args.text, seq_length=args.seq_length, precision=args.precision,
                lowered=args.lowered, compiled=args.compile,
            )  # fmt: skip
    result = asdict(found) | {"perplexity": math.exp(found.loss)}
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{args.model}: perplexity {result['perplexity']:.3f} over {found.tokens} tokens "
            f"({found.tokens_left_out} after the last full sequence left out)"
        )

"""`mqat report`: signal to noise, clipping and outliers of every linear, as files."""

import argparse
from pathlib import Path

from mqat.cli.arguments import DEFAULT, add_layout, positive

HELP = "signal to noise, clipping and outliers of every linear"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for quality.json, quality.html"
    )
    parser.add_argument("--seq-length", type=positive, default=256, help=DEFAULT)
    add_layout(parser)


def run(args: argparse.Namespace) -> None:
    """Writes `quality.json` and `quality.html` to `args.out`."""
    from mqat.evaluation.perplexity import checkpoint_quality
    from mqat.report.page import check_plots, write_report
    from mqat.runtime import groups

    check_plots()
    report = checkpoint_quality(
        args.checkpoint,
        args.text,
        seq_length=args.seq_length,
        tensor_parallel=args.tensor_parallel,
        pipeline_parallel=args.pipeline_parallel,
    )
    if groups.is_main():
        write_report(report, args.out, f"{args.checkpoint}: quality by linear")
        print(f"{args.out / 'quality.html'}: {len(report['linears'])} linears")
    groups.finalize()

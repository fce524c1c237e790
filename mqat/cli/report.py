"""`mqat report`: a run as a page; or every linear of a checkpoint, as JSON and a page."""

import argparse
from datetime import date
from pathlib import Path
from typing import Any

from mqat.cli.arguments import DEFAULT, add_layout, positive
from mqat.errors import UserError

HELP = (
    "a run as one HTML page; or every linear of a checkpoint: signal to noise, clipping, outliers"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("path", type=Path, help="directory of a run, or a checkpoint")
    parser.add_argument("--text", type=Path, help="of a checkpoint: what to run through it")
    parser.add_argument(
        "--out", type=Path,
        help="of a checkpoint: directory for quality.json, quality.html; "
        "of a run: the page (default: report.html in it)",
    )  # fmt: skip
    parser.add_argument(
        "--before", type=Path, metavar="QUALITY_JSON",
        help="of a checkpoint: an earlier report, such as before QAT, shown beside",
    )  # fmt: skip
    parser.add_argument("--seq-length", type=positive, default=256, help=DEFAULT)
    add_layout(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the page of a run, or the quality report of a checkpoint."""
    from mqat.report.run_page import is_run

    if is_run(args.path):
        _report_run(args)
    else:
        _report_checkpoint(args)


def _report_run(args: argparse.Namespace) -> None:
    from mqat.report.run_page import write_run_page

    if args.text is not None or args.before is not None:
        raise UserError(
            f"{args.path}: is the directory of a run; --text and --before are for one of its "
            f"checkpoints ({args.path / 'checkpoint'})."
        )
    file = args.out or args.path / "report.html"
    if file.is_dir():
        file = file / "report.html"
    write_run_page(args.path, file)
    print(file)


def _report_checkpoint(args: argparse.Namespace) -> None:
    from mqat.evaluation.perplexity import checkpoint_quality
    from mqat.report.page import read_report, write_report
    from mqat.report.plots import check_plots
    from mqat.runtime import groups

    if args.text is None or args.out is None:
        raise UserError(
            f"{args.path}: not the directory of a run (config.yaml and summary.json). For a checkpoint, "
            "give --text FILE and --out DIR."
        )
    check_plots()
    before = None if args.before is None else read_report(args.before)
    report, tokens = checkpoint_quality(
        args.path,
        args.text,
        seq_length=args.seq_length,
        tensor_parallel=args.tensor_parallel,
        pipeline_parallel=args.pipeline_parallel,
    )
    if groups.is_main():
        report |= {"about": _about(args, tokens, before)}
        write_report(report, args.out, f"{args.path}: quality by linear", before=before)
        print(f"{args.out / 'quality.html'}: {len(report['linears'])} linears")
    groups.finalize()


def _about(args: argparse.Namespace, tokens: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint says of itself; what was done to it, if the earlier report says so."""
    from mqat.checkpoints.manifest import read_description

    quantization = read_description(args.path)["quantization"] or {}
    earlier = {} if before is None else before.get("about", {})
    return {
        "algorithm": quantization.get("algorithm"),
        "checkpoint": str(args.path),
        "text": str(args.text),
        "tokens": tokens,
        "date": date.today().isoformat(),
        "calibrator": earlier.get("calibrator"),
        "recipes": earlier.get("recipes"),
    }

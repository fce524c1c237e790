"""`mqat qat`: the whole story: a baseline, PTQ, QAT, export, verification."""

import argparse

from mqat.cli import launch

HELP = "the whole story: a baseline, PTQ, QAT, export, verification"
add_arguments = launch.add_arguments


def run(args: argparse.Namespace) -> None:
    """Runs it here, or in as many processes as asked for."""
    from mqat.training.recipes import run_qat

    launch.run(args, run_qat)

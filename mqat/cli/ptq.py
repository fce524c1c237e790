"""`mqat ptq`: calibration, export, verification."""

import argparse

from mqat.cli import launch

HELP = "calibration, export, verification"
add_arguments = launch.add_arguments


def run(args: argparse.Namespace) -> None:
    """Runs it here, or in as many processes as asked for."""
    from mqat.training.recipes import run_ptq

    launch.run(args, run_ptq)

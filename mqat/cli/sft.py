"""`mqat sft`: unquantized fine-tuning, export, verification."""

import argparse

from mqat.cli import launch

HELP = "unquantized fine-tuning, export, verification"
add_arguments = launch.add_arguments


def run(args: argparse.Namespace) -> None:
    """Runs it here, or in as many processes as asked for."""
    from mqat.training.recipes import run_sft

    launch.run(args, run_sft)

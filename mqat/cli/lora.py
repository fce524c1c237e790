"""`mqat lora`: adapters on a frozen model, quantized or not; export, verification."""

import argparse

from mqat.cli import launch

HELP = "adapters (LoRA, QLoRA) on a frozen model, quantized or not; export, verification"
add_arguments = launch.add_arguments


def run(args: argparse.Namespace) -> None:
    """Runs it here, or in as many processes as asked for."""
    from mqat.training.recipes import run_lora

    launch.run(args, run_lora)

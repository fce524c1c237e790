"""`mqat inspect`: formats, bits and scales of a checkpoint or an export, as a table."""

import argparse
from pathlib import Path

HELP = "formats, bits and scales of a checkpoint or an export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("path", type=Path)


def run(args: argparse.Namespace) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    from mqat.checkpoints.archive import unpacked
    from mqat.evaluation.inspect import COLUMNS, rows

    table = Table(*COLUMNS, title=str(args.path))
    with unpacked(args.path) as path:
        for row in rows(path):
            table.add_row(*row.cells())
    Console(width=160).print(table)

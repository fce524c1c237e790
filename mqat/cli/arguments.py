"""What several commands say about their arguments."""

import argparse

DEFAULT = "default: %(default)s"


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Adds the sizes that torchrun's processes are split by."""
    parser.add_argument("--tensor-parallel", type=positive, default=1, help=DEFAULT)
    parser.add_argument("--pipeline-parallel", type=positive, default=1, help=DEFAULT)


def positive(text: str) -> int:
    """An integer of at least 1, for `argparse`."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be an integer of at least 1")
    return int(text)

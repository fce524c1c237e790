"""What several commands say about their arguments."""

import argparse

DEFAULT = "default: %(default)s"


def positive(text: str) -> int:
    """An integer of at least 1, for `argparse`."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be an integer of at least 1")
    return int(text)

"""Run by `run_ranks`: the `mqat` command with its arguments, as one of torchrun's processes."""

from mqat.cli.__main__ import main as main

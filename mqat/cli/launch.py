"""What `mqat sft`, `ptq` and `qat` share: configuration, and the processes of a job on this machine."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mqat.cli.arguments import positive
from mqat.config import RunConfig, config_to_yaml, load_config
from mqat.errors import UserError
from mqat.runtime.groups import world_size

EPILOG = (
    "Several nodes: torchrun with its own options, then -m mqat.cli and this command.\n\n"
    "All keys, with their defaults:\n\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the three commands take."""
    parser.epilog = EPILOG + config_to_yaml(RunConfig())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, help="YAML file, as in conf/; default: none")
    parser.add_argument(
        "--nproc-per-node", type=positive, default=1, metavar="N", help="processes to start here"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace, recipe: Callable[[RunConfig], Path]) -> None:
    """Runs a recipe in this process, or starts the processes that run it."""
    config = load_config(args.config, args.overrides)  # every error before a process is started
    if args.nproc_per_node == 1:
        recipe(config)
        return
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            f"--nproc-per-node {args.nproc_per_node} inside a job of {world_size()} processes: torchrun "
            "has started them; leave it out."
        )
    _launch(args.nproc_per_node)


def _launch(processes: int) -> None:
    """Starts this command in several processes; after a one-line error torchrun reports nothing more."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = sys.argv[1:]
    at = next(i for i, word in enumerate(arguments) if word.startswith("--nproc-per-node"))
    del arguments[at : at + (1 if "=" in arguments[at] else 2)]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # A signal lets the step in progress end and be saved, which may take longer than torchrun's 30 s.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    logging.disable(logging.ERROR)  # torchrun's; errors are said by the processes
    options = ["--standalone", "--nproc-per-node", str(processes), "-m", "mqat.cli"]
    try:
        torchrun.run(torchrun.parse_args([*options, *arguments]))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)

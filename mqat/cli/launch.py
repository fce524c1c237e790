"""What `mqat sft`, `ptq`, `qat`, `lora` and `run` share: configuration, and processes on a machine."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mqat.cli.arguments import positive
from mqat.config import RunConfig, config_to_yaml, load_config
from mqat.errors import UserError
from mqat.runtime.groups import world_size

EPILOG = (
    "Several nodes: torchrun with its own options, then -m mqat.cli and this command.\n\n"
    "mqat config KEY says what a key means. All keys, with their defaults:\n\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the four commands take."""
    parser.add_argument("--config", type=Path, help="YAML file, as in conf/; default: none")
    add_processes(parser)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds what these take besides a configuration, and the keys of one."""
    parser.epilog = EPILOG + config_to_yaml(RunConfig())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--nproc-per-node", type=positive, metavar="N",
        help="processes to start here; default: trainer.devices, or 1",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace, recipe: Callable[[RunConfig], Path]) -> None:
    """Runs a recipe with the configuration of `--config`."""
    start(load_config(args.config, args.overrides), args.nproc_per_node, recipe)


def start(
    config: RunConfig, nproc_per_node: int | None, recipe: Callable[[RunConfig], Path]
) -> None:
    """Runs a recipe in this process, or starts the processes that run it.

    `nproc_per_node`: None: as `trainer.devices` says, or 1; a number takes that key's place.
    """
    if "WORLD_SIZE" in os.environ:
        if nproc_per_node is not None:
            raise UserError(
                f"--nproc-per-node {nproc_per_node} inside a job of {world_size()} processes: torchrun "
                "has started them; leave it out."
            )
        recipe(config)
        return
    trainer = config.trainer
    if trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: only this node's processes could be started here; "
            f"start them on each: torchrun --nnodes {trainer.num_nodes} --nproc-per-node "
            f"{trainer.devices or 'N'} ... -m mqat.cli, and this command."
        )
    processes = nproc_per_node or trainer.devices or 1
    if processes > 1:
        _launch(processes, [] if trainer.devices is None else [f"trainer.devices={processes}"])
        return
    trainer.devices = None if trainer.devices is None else processes
    recipe(config)


def _launch(processes: int, overrides: Sequence[str]) -> None:
    """Starts this command in several processes; after a one-line error torchrun reports nothing more."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = sys.argv[1:]
    for at, word in enumerate(arguments):
        if word.startswith("--nproc-per-node"):
            del arguments[at : at + (1 if "=" in word else 2)]
            break
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # A signal lets the step in progress end and be saved, which may take longer than torchrun's 30 s.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    logging.disable(logging.ERROR)  # torchrun's; errors are said by the processes
    options = ["--standalone", "--nproc-per-node", str(processes), "-m", "mqat.cli"]
    try:
        torchrun.run(torchrun.parse_args([*options, *arguments, *overrides]))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)

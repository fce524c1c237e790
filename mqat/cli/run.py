"""`mqat run`: a recipe by name, or a configuration of one's own, with what it is for."""

import argparse

from mqat.cli import launch
from mqat.config import COMMANDS, load_config
from mqat.errors import UserError

HELP = "run a recipe or a configuration file; starts its processes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "recipe", metavar="RECIPE|FILE", help="a name that mqat recipes lists, or a YAML file"
    )
    launch.add_processes(parser)


def run(args: argparse.Namespace) -> None:
    """Runs it here, or in as many processes as it says."""
    from mqat.plan.catalogue import recipe_file

    path = recipe_file(args.recipe)
    config = load_config(path, args.overrides)
    if config.command is None:
        raise UserError(
            f"{path}: does not say what is to be done with it; add `command: qat` to it (or "
            f"{' or '.join(c for c in COMMANDS if c != 'qat')}), or start mqat qat --config {path}."
        )
    from mqat.training import recipes

    runs = {
        "sft": recipes.run_sft,
        "ptq": recipes.run_ptq,
        "qat": recipes.run_qat,
        "lora": recipes.run_lora,
    }
    launch.start(config, args.nproc_per_node, runs[config.command])

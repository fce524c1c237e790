"""`mqat recipes`: the configurations that are installed with mqat, listed, copied, checked."""

import argparse
from pathlib import Path

from mqat.cli.arguments import positive
from mqat.errors import UserError

HELP = "recipes to start from: list them, copy one, check one without weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.set_defaults(recipes=_list)
    commands = parser.add_subparsers(metavar="command", title="without a command: list them")
    copied = commands.add_parser("cp", help="copy a recipe to edit it", allow_abbrev=False)
    copied.add_argument("name", metavar="NAME")
    copied.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, help="default: NAME.yaml in this directory"
    )
    copied.set_defaults(recipes=_copy)
    checked = commands.add_parser(
        "check", help="all that can be checked without weights and data", allow_abbrev=False
    )
    checked.add_argument("recipe", metavar="NAME|FILE")
    checked.add_argument(
        "--world-size", type=positive, metavar="N",
        help="processes of the job; default: trainer.devices x trainer.num_nodes",
    )  # fmt: skip
    checked.add_argument(
        "--model-config", type=Path, metavar="FILE",
        help="config.json of the model, where its directory is not here",
    )  # fmt: skip
    checked.add_argument("overrides", nargs="*", metavar="key=value")
    checked.set_defaults(recipes=_check)


def run(args: argparse.Namespace) -> None:
    """Lists, copies or checks."""
    args.recipes(args)


def _list(args: argparse.Namespace) -> None:
    from mqat.plan.catalogue import description, recipes

    found = recipes()
    width = max(map(len, found))
    for name, path in found.items():
        print(f"{name:{width}}  {description(path)}")


def _copy(args: argparse.Namespace) -> None:
    from mqat.files import write_whole
    from mqat.plan.catalogue import recipe_file, recipes

    source = recipe_file(args.name)
    if args.name not in recipes():
        raise UserError(
            f"{args.name}: is a file, not the name of a recipe; mqat recipes lists them."
        )
    target = args.file or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target} exists already; name another file, or delete it first.")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no directory {target.parent}; make it first.")
    write_whole(target, source.read_text("utf-8"))
    print(f"{target}: edit it, then: mqat recipes check {target}, mqat run {target}")


def _check(args: argparse.Namespace) -> None:
    from mqat.cli.plan import print_plan
    from mqat.config import load_config
    from mqat.plan.catalogue import description, recipe_file
    from mqat.plan.run import make_plan, missing_data
    from mqat.plan.sizes import SizesOnly

    path = recipe_file(args.recipe)
    config = load_config(path, args.overrides)
    trainer = config.trainer
    if args.world_size is None and trainer.devices is None:
        raise UserError(f"{path}: sets no trainer.devices; say how many processes: --world-size N.")
    opener = SizesOnly(args.model_config)
    size = args.world_size or (trainer.devices or 1) * trainer.num_nodes
    plan = make_plan(config, world_size=size, opener=opener)
    print(f"{args.recipe}: {description(path)}")
    print_plan(plan)
    left = [f"{', '.join(paths)} ({key})" for key, paths in missing_data(config.model).items()]
    print(f"not looked at: {'; '.join([*opener.said, *left]) or 'nothing'}")
    print(f"fits {size} processes; start it: {_command(config.command, args.recipe)}")


def _command(command: str | None, recipe: str) -> str:
    from mqat.config import COMMANDS

    return f"mqat run {recipe}" if command else f"mqat {'|'.join(COMMANDS)} --config {recipe}"

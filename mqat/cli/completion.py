"""`mqat completion`: a script by which a shell completes commands, options, recipes and keys."""

import argparse
from pathlib import Path

from mqat.errors import UserError

HELP = "print completions for a shell: mqat completion bash > FILE"
_SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("shell", choices=_SHELLS)


def run(args: argparse.Namespace) -> None:
    """Prints the script; static, since Python takes seconds to import torch at every Tab."""
    try:
        import shtab
    except ImportError as error:
        raise UserError(
            "completions are made by shtab, which is not installed: pip install 'mqat[completion]'."
        ) from error
    from mqat.cli.__main__ import build_parser

    parser = build_parser()
    _complete(parser, shtab.FILE)
    print(shtab.complete(parser, shell=args.shell))


def _complete(parser: argparse.ArgumentParser, any_file: object) -> None:
    """Says of every argument what completes it."""
    from mqat.plan.catalogue import recipes
    from mqat.plan.config_keys import keys

    names = [key.name for key in keys() if "[]" not in key.name]
    words = {"overrides": names, "key": names, "name": list(recipes()), "recipe": list(recipes())}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete(inner, any_file)
        elif action.dest in words:
            action.choices = words[action.dest]
        elif action.type is Path:
            action.complete = any_file  # type: ignore[attr-defined]

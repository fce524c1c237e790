"""The `mqat` command: finds the file of a command and runs it.

Every command checks its input first and exits with status 2 and one line on an error that a user can
mend. `import`, `export`, `report`, `eval`, `generate`, `run`, `sft`, `ptq`, `qat` and `lora` also run
under torchrun, where ranks share the work.
"""

import argparse

from mqat import __version__
from mqat.cli import (
    completion,
    config,
    eval,
    export,
    generate,
    import_checkpoint,
    inspect,
    lora,
    plan,
    ptq,
    qat,
    recipes,
    report,
    run,
    sft,
    verify,
)
from mqat.runtime.groups import command_line

COMMANDS = {
    "import": import_checkpoint,
    "export": export,
    "verify": verify,
    "eval": eval,
    "generate": generate,
    "inspect": inspect,
    "report": report,
    "plan": plan,
    "config": config,
    "recipes": recipes,
    "run": run,
    "sft": sft,
    "ptq": ptq,
    "qat": qat,
    "lora": lora,
    "completion": completion,
}


def build_parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="mqat", description="Quantization-aware training for Megatron-Core."
    )
    parser.add_argument("--version", action="version", version=f"mqat {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name, help=command.HELP, description=command.HELP, allow_abbrev=False
        )
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser


def main() -> None:
    """Entry point of the `mqat` script."""
    parser = build_parser()
    args, rest = parser.parse_known_args()
    # argparse ends a list of `key=value` at the first option and does not know what follows.
    are_overrides = all("=" in word and not word.startswith("-") for word in rest)
    if rest and not (are_overrides and "overrides" in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    with command_line():
        args.run(args)


if __name__ == "__main__":
    main()

"""The `mqat` command: finds the file of a command and runs it.

Every command checks its input first and exits with status 2 and one line on an error that a user can
mend. `import`, `export` and `report` also run under torchrun, where ranks share the work.
"""

import argparse

from mqat.cli import eval, export, import_checkpoint, inspect, plan, report, verify
from mqat.runtime.groups import command_line

COMMANDS = {
    "import": import_checkpoint,
    "export": export,
    "verify": verify,
    "eval": eval,
    "inspect": inspect,
    "report": report,
    "plan": plan,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mqat", description="Quantization-aware training for Megatron-Core."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser


def main() -> None:
    """Entry point of the `mqat` script."""
    args = _parser().parse_args()
    with command_line():
        args.run(args)


if __name__ == "__main__":
    main()

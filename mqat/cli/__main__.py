"""The `mqat` command: finds the file of a command and runs it.

Every command checks its input first and exits with status 2 and one line on an error that a user can
mend. `import`, `export`, `report`, `sft`, `ptq` and `qat` also run under torchrun, where ranks share the
work.
"""

import argparse

from mqat import __version__
from mqat.cli import eval, export, import_checkpoint, inspect, plan, ptq, qat, report, sft, verify
from mqat.runtime.groups import command_line

COMMANDS = {
    "import": import_checkpoint,
    "export": export,
    "verify": verify,
    "eval": eval,
    "inspect": inspect,
    "report": report,
    "plan": plan,
    "sft": sft,
    "ptq": ptq,
    "qat": qat,
}


def _parser() -> argparse.ArgumentParser:
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
    args = _parser().parse_args()
    with command_line():
        args.run(args)


if __name__ == "__main__":
    main()

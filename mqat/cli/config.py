"""`mqat config`: what the keys of a configuration mean, take and default to."""

import argparse

HELP = "meaning, kind, default and choices of the keys of a configuration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "key",
        nargs="?",
        metavar="KEY",
        help="a key or a section, such as model.optim; default: all",
    )


def run(args: argparse.Namespace) -> None:
    """Prints one key, the keys of a section, or all."""
    from mqat.plan.config_keys import find_keys, keys

    for key in keys() if args.key is None else find_keys(args.key):
        facts = [key.takes]
        facts += [f"one of: {', '.join(key.choices)}"] if key.choices else []
        facts += [f"default: {key.default}"] if key.default else []
        print(f"{key.name}  ({'; '.join(facts)})")
        for text in filter(None, (key.about, key.meaning)):
            print(f"    {text}")

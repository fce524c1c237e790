"""The command line of the example scripts: `[--config FILE] [key=value ...]`."""

import argparse
from pathlib import Path

from mqat.config import RunConfig, config_to_yaml, load_config


def recipe_config(default: Path, description: str | None = None) -> RunConfig:
    """Configuration of an example script: `[--config FILE] [key=value ...]` from the command line."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="All keys, with their defaults:\n\n" + config_to_yaml(RunConfig()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=default, help=f"default: {default.name}")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    return load_config(args.config, args.overrides)

"""The `mqat` command (one file a command) and the command line of the example scripts."""

from mqat.cli.recipe import recipe_config

__all__ = ["recipe_config"]

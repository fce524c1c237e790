"""The `mqat` command: one file a command."""

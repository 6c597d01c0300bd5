"""The `tessera` command."""

from tessera.cli.main import main

__all__ = ["main"]

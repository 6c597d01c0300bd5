"""Arguments in, one function call, an exit status out."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from tessera.cli import doctor, fit, graph, learn, replay, report, serve
from tessera.errors import InputError, TesseraError, UnknownNameError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `tessera` command.

    Args:
        argv: Its words; None takes the process's.

    Returns:
        0; 1 where the work failed; 2 where the words were wrong; 130 where it was interrupted.

    Example:
        >>> main(["learn", "--recipe", "nonsense", "--quiet"])
        2
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except (InputError, UnknownNameError) as error:
        print(f"tessera: {error}", file=sys.stderr)
        return 2
    except TesseraError as error:
        print(f"tessera: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tessera",
        description="Lifelong learning for PyTorch.",
        epilog="tessera COMMAND --help has examples.",
    )
    version = importlib.metadata.version("tessera-lifelong")
    parser.add_argument("--version", action="version", version=f"tessera {version}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    learn.add_to(commands)
    fit.add_to(commands)
    serve.add_to(commands)
    replay.add_to(commands)
    report.add_to(commands)
    graph.add_to(commands)
    doctor.add_to(commands)
    return parser

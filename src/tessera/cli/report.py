"""`tessera report`: results as a page to look at."""

from __future__ import annotations

import argparse
import json
from typing import Any

import tessera.report
from tessera.errors import InputError

__all__ = ["add_to"]

_EXAMPLES = """examples:
  tessera learn --recipe er --json er.json
  tessera report er.json --out er-report        # writes er-report/index.html
  tessera report er.json der.json --out both    # the first in detail, the others beside it
  tessera learn --online --json online.json
  tessera report online.json --out online       # accuracy over the stream, drifts marked
"""


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "report",
        help="turn results of `tessera learn --json` into a self-contained HTML page",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", metavar="FILE.json", help="written by learn --json")
    parser.add_argument("--out", default="report", metavar="DIR", help="default: %(default)s")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    results: list[dict[str, Any]] = []
    for name in args.results:
        try:
            with open(name, encoding="utf-8") as f:
                main = json.load(f)
        except (OSError, ValueError) as error:
            raise InputError(f"{name} cannot be read as JSON: {error}") from error
        if not isinstance(main, dict):
            raise InputError(f"{name} is not a result of `tessera learn --json`")
        results += [main, *main.get("baselines", [])]
    kinds = {result.get("kind", "tasks") for result in results}
    if len(kinds) > 1:
        raise InputError(
            "some of these results are of `learn --online` and some are not; make two reports"
        )
    write = tessera.report.write_online if kinds == {"prequential"} else tessera.report.write
    print(write(results, args.out))
    return 0

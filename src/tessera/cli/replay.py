"""`tessera replay`: do again what a server did, and compare to the last bit."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO, final

import torch

from tessera.arch import base_hash
from tessera.cli.served import add_model, model_of
from tessera.errors import CheckpointError, InputError, MissingDataError, StorageError
from tessera.files import write_whole

__all__ = ["add_to"]

_EXAMPLES = """examples:
  tessera replay --checkpoint run1                   # all there is
  tessera replay --checkpoint run1 --since 2h --tenant acme
  tessera replay --checkpoint run1 --what fits,gates --json post-mortem.json
  tessera replay --model mypackage:build --since 2026-11-24T09:00 --all
  tessera replay --checkpoint run1 --device cuda     # of a server that had it too
"""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_WHAT = ("requests", "fits", "gates")
_SHOWN = 20
_EVERY_S = 0.1


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "replay",
        help="do again what a server did, and compare",
        description="Check the audit log's chain, the tables against the log and the deltas' "
        "files; then answer the log's requests again, fit its fits again and decide its gates "
        "again, and say of each whether it is the same to the last bit. Exit status 1 if anything "
        "is not.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    which = parser.add_argument_group("what is done again")
    which.add_argument("--since", metavar="TIME", help="30s, 15m, 2h, 3d ago, or 2026-11-24T09:00")
    which.add_argument("--tenant", metavar="NAME", help="of this one only")
    which.add_argument(
        "--what", metavar="LIST", default=",".join(_WHAT), help="some of %(default)s; default: all"
    )
    which.add_argument("--threads", type=int, default=1, help="as the server had; default: 1")
    said = parser.add_argument_group("what is said")
    said.add_argument("--all", action="store_true", help="name the identical ones too")
    said.add_argument("--json", metavar="FILE", help="all that was found, for a post-mortem")
    parser.set_defaults(run=_run)


def since(word: str | None, now_s: float) -> float | None:
    """Seconds since 1970 of a time that was told; None for none.

    Raises:
        InputError: It is no time.

    Example:
        >>> since("2m", 1000.0), since(None, 0.0)
        (880.0, None)
    """
    if word is None:
        return None
    ago = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", word)
    if ago:
        return now_s - float(ago[1]) * _UNITS[ago[2]]
    try:
        return datetime.fromisoformat(word).timestamp()
    except ValueError as error:
        raise InputError(
            f"--since is 30s, 15m, 2h or 3d ago, or a time as 2026-11-24T09:00; got {word!r}"
        ) from error


def _what(words: str) -> tuple[str, ...]:
    asked = [word.strip() for word in words.split(",")]
    if unknown := [word for word in asked if word not in _WHAT]:
        raise InputError(f"--what is some of {','.join(_WHAT)}; got {unknown[0]!r:.40}")
    return tuple(word for word in _WHAT if word in asked)


def _run(args: argparse.Namespace) -> int:
    begin, what = since(args.since, time.time()), _what(args.what)
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise InputError(f"--json: there is no folder for {args.json}; make it first")
    try:
        audits = importlib.import_module("tessera.serve.audit")
        databases = importlib.import_module("tessera.serve.database")
    except ImportError as error:
        raise MissingDataError(
            f"tessera replay needs the extra serve ({error}): pip install 'tessera-lifelong[serve]'"
        ) from error
    torch.set_num_threads(args.threads)
    model = model_of(args)
    line = _Line(sys.stderr)
    found: dict[str, Any] = {
        "at_s": time.time(),
        "since_s": begin,
        "tenant": args.tenant,
        "what": what,
        "base": base_hash(model),
    }
    with closing(databases.Database(args.db)) as database:
        audit = audits.Audit(database, time.time)
        line.show("hashing the log again")
        try:
            events = audit.verify()
        except StorageError:
            raise
        except CheckpointError as error:
            # What a log that was altered says can be compared with nothing.
            _keep(args.json, found | {"whole": False, "chain": str(error)})
            raise
        finally:
            line.clear()
        print(f"the chain is whole: {events} events")
        found |= {"whole": True, "chain": "", "head": list(audit.head())}
        found |= _state(database, line) | _files(database, args, line)
    found |= _again(model, args, begin, what, line)
    _keep(args.json, found)
    counts = [Counter(found["counts"][name]) for name in what]
    same = all(n["identical"] == n.total() for n in counts)
    return 0 if same and not found["state"] and not found["damaged"] else 1


def _state(database: Any, line: _Line) -> dict[str, Any]:
    """Compare the tables with the log."""
    line.show("comparing the tables with the log")
    differences = importlib.import_module("tessera.serve.consistency").differences
    found = list(differences(database))
    line.clear()
    _list(found)
    wrong = f"{_many(len(found), 'difference')} between the tables and the log"
    print(wrong if found else "the tables are what it says")
    return {"state": found}


def _files(database: Any, args: argparse.Namespace, line: _Line) -> dict[str, Any]:
    """Look at every byte of every delta."""
    deltas = importlib.import_module("tessera.serve.delta_files")
    blobs = importlib.import_module("tessera.serve.blobs").Blobs(args.blobs)
    files, found = deltas.delta_files(database, args.tenant), []
    for at, file in enumerate(files):
        line.show(f"deltas: {at} of {len(files)} looked at")
        if problem := deltas.problem_of(file, blobs):
            found.append(problem)
    line.clear()
    _list(found)
    print(f"{_many(len(files), 'delta')}: {f'{len(found)} damaged' if found else 'whole'}")
    return {"deltas": len(files), "damaged": found}


def _again(
    model: Any, args: argparse.Namespace, begin: float | None, what: Sequence[str], line: _Line
) -> dict[str, Any]:
    """Do everything again."""
    recorder = importlib.import_module("tessera.serve.recorder")
    batch = importlib.import_module("tessera.serve.batch")
    counts = {name: Counter[str]() for name in what}
    kept = []
    for one, share in _replayed(model, args, begin, what, line):
        counts[one.what][one.verdict] += 1
        done = sum(n.total() for n in counts.values())
        line.show(f"{share:4.0%}: {done} done again")
        odd = one.verdict != "identical"
        if odd or args.all:
            kept.append(asdict(one))
        if args.all or (odd and counts[one.what][one.verdict] <= _SHOWN):
            when = datetime.fromtimestamp(one.time_s).isoformat(" ", "milliseconds")
            line.clear()
            print(
                f"{one.seq:>8}  {when}  {one.tenant:<16} {one.what[:-1]} {one.name:<36.36} "
                f"{one.verdict}{': ' + one.detail if one.detail else ''}"
            )
    line.clear()
    for name, n in counts.items():
        told = ", ".join(f"{k} {verdict}" for verdict, k in sorted(n.items())) or "none"
        print(f"{_many(n.total(), name[:-1])}: {told}")
    machine = recorder.fingerprint(batch.device_of(model))
    return {"counts": counts, "events": kept, "machine": machine}


def _replayed(
    model: Any, args: argparse.Namespace, begin: float | None, what: Sequence[str], line: _Line
) -> Iterator[tuple[Any, float]]:
    """What `replay` yields, and how far in the log that is."""
    past = importlib.import_module("tessera.serve.past")
    registries = importlib.import_module("tessera.serve.registry")
    blobs = importlib.import_module("tessera.serve.blobs").Blobs(args.blobs)
    with closing(registries.Registry(args.db, blobs, base_hash=base_hash(model))) as registry:
        audit = registry.audit
        line.show("reading the log")
        last = max(1, audit.head()[0])
        for one in past.replay(
            model, audit, blobs, registry.load, since_s=begin, tenant=args.tenant, what=what
        ):
            yield one, min(1.0, one.seq / last)


def _list(lines: Sequence[str]) -> None:
    for line in lines[:_SHOWN]:
        print(line)
    if len(lines) > _SHOWN:
        print(f"... and {len(lines) - _SHOWN} more")


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _keep(path: str | None, found: dict[str, Any]) -> None:
    if path:
        write_whole(path, json.dumps(found, indent=1).encode() + b"\n")


@final
class _Line:
    """A line of a terminal that is written over again and again; elsewhere nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._on, self._next = stream, stream.isatty(), 0.0
        self._there = False

    def show(self, text: str) -> None:
        if self._on and (now := time.monotonic()) >= self._next:
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()
            self._next, self._there = now + _EVERY_S, True

    def clear(self) -> None:
        if self._there:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._next, self._there = 0.0, False

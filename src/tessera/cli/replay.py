"""`tessera replay`: compute what a server answered again, and compare to the last bit."""

from __future__ import annotations

import argparse
import importlib
import re
import time
from collections import Counter
from datetime import datetime
from typing import Any

import torch

from tessera.arch import base_hash
from tessera.cli.served import add_model, model_of
from tessera.errors import CheckpointError, DeltaError, InputError, MissingDataError

__all__ = ["add_to"]

_EXAMPLES = """examples:
  tessera replay --checkpoint run1                   # all there is
  tessera replay --checkpoint run1 --since 2h --tenant acme
  tessera replay --model mypackage:build --since 2026-11-24T09:00 --all
"""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SHOWN = 20


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "replay",
        help="compute past answers of a server again, and compare",
        description="Check the audit log's chain and the deltas' files, run the log's requests "
        "again, and say of each whether the answer is the same to the last bit. Exit status 1 if "
        "any is not.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    which = parser.add_argument_group("which requests")
    which.add_argument("--since", metavar="TIME", help="30s, 15m, 2h, 3d ago, or 2026-11-24T09:00")
    which.add_argument("--tenant", metavar="NAME", help="of this one only")
    which.add_argument("--all", action="store_true", help="print the identical ones too")
    which.add_argument("--threads", type=int, default=1, help="as the server had; default: 1")
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


def _run(args: argparse.Namespace) -> int:
    begin = since(args.since, time.time())
    try:
        replaying = importlib.import_module("tessera.serve.past")
        registries = importlib.import_module("tessera.serve.registry")
        blobs = importlib.import_module("tessera.serve.blobs").Blobs
    except ImportError as error:
        raise MissingDataError(
            f"tessera replay needs the extra serve ({error}): pip install 'tessera-lifelong[serve]'"
        ) from error
    torch.set_num_threads(args.threads)
    model = model_of(args)
    store = blobs(args.blobs)
    registry = registries.Registry(args.db, store, base_hash=base_hash(model))
    try:
        print(f"the chain is whole: {registry.audit.verify()} events")
        found: Counter[str] = Counter()
        damaged = 0
        for one in replaying.replay(
            model, registry.audit, store, registry.load, since_s=begin, tenant=args.tenant
        ):
            found[one.verdict] += 1
            odd = one.verdict != "identical"
            if args.all or (odd and found[one.verdict] <= _SHOWN):
                when = datetime.fromtimestamp(one.time_s).isoformat(" ", "milliseconds")
                print(
                    f"{one.seq:>8}  {when}  {one.tenant:<16} {one.request:<36} {one.verdict}"
                    f"{': ' + one.detail if one.detail else ''}"
                )
        for tenant in [args.tenant] if args.tenant else [t.name for t in registry.tenants()]:
            for record in registry.deltas(tenant):
                try:
                    registry.load(record.hash, tenant=tenant)
                except (CheckpointError, DeltaError, MissingDataError) as error:
                    damaged += 1
                    print(f"a delta of {tenant} is damaged: {error}")
    finally:
        registry.close()
    total = sum(found.values())
    told = ", ".join(f"{n} {verdict}" for verdict, n in sorted(found.items())) or "none"
    print(f"{total} requests: {told}")
    return 0 if found["identical"] == total and not damaged else 1

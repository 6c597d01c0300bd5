"""What `tessera learn` does with tasks or without: settings, results, and an interruption."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from tessera import recipes
from tessera.errors import InputError
from tessera.files import write_whole

__all__ = ["interrupted", "told", "words", "write_json"]

Settings = recipes.Settings | recipes.OnlineSettings
S = TypeVar("S", recipes.Settings, recipes.OnlineSettings)
_OPTIONS = {"num_tasks": "tasks", "num_classes": "classes"}


def told(args: argparse.Namespace, default: S, saved: Callable[[str], S | None]) -> S:
    """What was said, over what the checkpoint to resume says, over `default`.

    Raises:
        InputError: Resume, but from where?
    """
    said = {f.name: v for f in fields(default) if (v := getattr(args, f.name, None)) is not None}
    if args.resume and not args.checkpoint:
        raise InputError("--resume needs --checkpoint DIR, the folder of the run to go on with")
    before = saved(args.checkpoint) if args.resume else None
    return replace(before if before is not None else default, **said)


def words(settings: Settings, default: Settings, always: Sequence[str]) -> list[str]:
    """The options that turn `default` into `settings`, those named in `always` in any case."""
    found: list[str] = []
    for f in fields(settings):
        value = getattr(settings, f.name)
        if value != getattr(default, f.name) or f.name in always:
            option = _OPTIONS.get(f.name, f.name).replace("_", "-")
            found += [f"--{option}", str(value)]
    return found


def interrupted(args: argparse.Namespace) -> int:
    """Say how to go on; the exit status."""
    hint = ""
    if args.checkpoint:
        online = "--online " if args.online else ""
        folder = shlex.quote(args.checkpoint)
        hint = f"; go on with: tessera learn {online}--checkpoint {folder} --resume"
    print(f"\ntessera: interrupted{hint}", file=sys.stderr)
    return 130


def write_json(path: str, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    text = json.dumps(result, indent=1, allow_nan=False)
    write_whole(path, text.encode(), advice="Make room or give --json another path")

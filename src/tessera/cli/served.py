"""The model that a server serves, and where its registry lies: options of several commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from tessera import recipes
from tessera.cli.bases import base_of_function
from tessera.errors import InputError

__all__ = ["add_model", "model_of"]


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model, and where its registry lies.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_model(parser)
        >>> parser.parse_args(["--model", "a:b"]).data
        'tessera-data'
    """
    what = parser.add_argument_group("which model")
    what.add_argument("--checkpoint", metavar="DIR", help="of tessera learn --checkpoint DIR")
    what.add_argument("--model", metavar="PKG:FUNC", help="or FILE.py:FUNC, which returns it")
    what.add_argument("--model-args", metavar="JSON", help="its arguments by name")
    kept = parser.add_argument_group("where things are kept")
    kept.add_argument("--data", metavar="DIR", default="tessera-data", help="default: tessera-data")
    kept.add_argument("--db", metavar="URL", help="default: sqlite:///DIR/registry.db")
    kept.add_argument("--blobs", metavar="DIR|URL", help="default: DIR/blobs; or s3://bucket/...")


def model_of(args: argparse.Namespace) -> nn.Module:
    """The model, in eval mode; `args.db` and `args.blobs` get their defaults.

    Raises:
        InputError: Not exactly one of --checkpoint and --model was given.
        CheckpointError: The checkpoint is damaged.
        UnknownNameError: There is no such function.
    """
    args.db = args.db or f"sqlite:///{Path(args.data) / 'registry.db'}"
    args.blobs = args.blobs or str(Path(args.data) / "blobs")
    if (args.checkpoint is None) == (args.model is None):
        raise InputError("say which model: --checkpoint DIR or --model PKG:FUNC, one of them")
    if args.checkpoint is not None:
        if args.model_args:
            raise InputError("--model-args goes with --model; a checkpoint knows its own")
        return recipes.trained_model(args.checkpoint)
    model: Any = base_of_function(args.model, args.model_args, 0).model
    found: nn.Module = model
    return found.eval()

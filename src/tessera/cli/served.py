"""The model that a server serves, and where its registry lies: options of several commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tessera import recipes
from tessera.cli.bases import base_of_function
from tessera.errors import InputError

__all__ = ["add_model", "build", "model_of"]


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
    what.add_argument("--device", default="cpu", help="where it computes, as cuda; default: cpu")
    kept = parser.add_argument_group("where things are kept")
    kept.add_argument("--data", metavar="DIR", default="tessera-data", help="default: tessera-data")
    kept.add_argument("--db", metavar="URL", help="default: sqlite:///DIR/registry.db")
    kept.add_argument("--blobs", metavar="DIR|URL", help="default: DIR/blobs; or s3://bucket/...")


def model_of(args: argparse.Namespace) -> nn.Module:
    """The model, in eval mode on its device; `args.db` and `args.blobs` get their defaults.

    Raises:
        InputError: Not exactly one of --checkpoint and --model was given; there is no such device.
        CheckpointError: The checkpoint is damaged.
        UnknownNameError: There is no such function.
    """
    args.db = args.db or f"sqlite:///{Path(args.data) / 'registry.db'}"
    args.blobs = args.blobs or str(Path(args.data) / "blobs")
    device = _device(args.device)
    return build(args.checkpoint, args.model, args.model_args).to(device)


def build(
    checkpoint: str | None = None, model: str | None = None, model_args: str | None = None
) -> nn.Module:
    """The model that these options name, in eval mode: here, or again in another process.

    Args:
        checkpoint: Of `tessera learn`.
        model: A function, ``PKG:FUNC`` or ``FILE.py:FUNC``.
        model_args: Its arguments by name, a JSON object.

    Raises:
        InputError: Not exactly one of `checkpoint` and `model` was given.
        CheckpointError: The checkpoint is damaged.
        UnknownNameError: There is no such function.

    Example:
        >>> build(model="torch.nn:Identity")
        Identity()
    """
    if checkpoint is not None and model is None:
        if model_args:
            raise InputError("--model-args goes with --model; a checkpoint knows its own")
        return recipes.trained_model(checkpoint)
    if checkpoint is not None or model is None:
        raise InputError("say which model: --checkpoint DIR or --model PKG:FUNC, one of them")
    found: Any = base_of_function(model, model_args, 0).model
    whole: nn.Module = found
    return whole.eval()


def _device(name: str) -> torch.device:
    try:
        found = torch.device(name)
        torch.empty(1, device=found).cpu()
    except (RuntimeError, AssertionError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise InputError(
            f"--device {name[:40]} is none that PyTorch has here ({said}); tessera doctor says "
            "what there is, and without --device the processor is taken"
        ) from error
    return found

"""A fit in the audit log: all that is needed to do it again, and the way back from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tessera import trees
from tessera.errors import CheckpointError, InputError
from tessera.serve.blobs import Blobs
from tessera.serve.fitting_run import Fitted, Order
from tessera.serve.fitting_values import FitSettings, Rehearsal

__all__ = ["order_of", "settings_told", "told"]

_MOST_BYTES = 64 << 10
_X, _Y = "x.", "y"
_KNOWN = {f.name for f in fields(FitSettings)}


def told(
    order: Order,
    fitted: Fitted,
    *,
    hash: str,
    blobs: Blobs,
    keep: str,
    machine: Mapping[str, str],
) -> dict[str, Any]:
    """The body of the event ``delta.fit``; whoever appends it adds who asked for the fit.

    Args:
        order: What was fitted. Where the server keeps inputs its shots, and those of its
            rehearsal, become a blob each.
        fitted: What became of it.
        hash: Of the delta.
        blobs: Where shots are kept.
        keep: As of `Recorder`: "inputs", or only hashes are told.
        machine: Where it was fitted: `Fitter.machine`.

    Raises:
        StorageError: The shots could not be kept.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from tessera.serve.fitting import Fitter
        >>> shots = {"input": torch.eye(3)[:2]}
        >>> how = FitSettings(r=1, steps=3)
        >>> order = Order(tenant="acme", inputs=shots, labels=torch.tensor([0, 1]), settings=how)
        >>> fitter = Fitter(nn.Linear(3, 2), registry=None)
        >>> fitted = fitter.submit(order).result()
        >>> fitter.close()
        >>> blobs = Blobs(tempfile.mkdtemp())
        >>> kept = {"hash": fitted.delta.hash, "blobs": blobs, "keep": "inputs"}
        >>> said = told(order, fitted, **kept, machine=fitter.machine)
        >>> said["rows"], said["steps"], said["settings"]["r"], blobs.has(said["shots_blob"])
        (2, 3, 1, True)
        >>> order_of(said, "acme", blobs).labels
        tensor([0, 1])
    """
    hashed, blob = _kept(order.inputs, order.labels, blobs, keep)
    rehearsal: dict[str, Any] | None = None
    if order.rehearsal is not None:
        old = order.rehearsal
        old_hash, old_blob = _kept(old.inputs, old.labels, blobs, keep)
        rehearsal = {"shots": old_hash, "shots_blob": old_blob, "rows": _rows(old.inputs)}
        rehearsal |= {"rho": old.rho, "lam": old.lam}
    return {
        "delta": hash,
        "kind": fitted.delta.kind,
        "rows": _rows(order.inputs),
        "steps": fitted.steps,
        "stopped_by": fitted.stopped_by,
        "first_loss": fitted.losses[0],
        "last_loss": fitted.losses[-1],
        "ms": round(fitted.spent.ms, 3),
        "joules": fitted.spent.joules,
        "joules_source": fitted.spent.joules_source,
        "parent": order.settings.parent,
        "settings": settings_told(order.settings),
        "shots": hashed,
        "shots_blob": blob,
        "rehearsal": rehearsal,
        "base": fitted.delta.base_hash,
        "machine": dict(machine),
    }


def settings_told(how: FitSettings) -> dict[str, Any]:
    """Settings as plain JSON; what is None is left out.

    Raises:
        InputError: They are too long for the log, or no JSON.

    Example:
        >>> settings_told(FitSettings(sites=("0",), steps=5))["sites"]
        ['0']
    """
    said: dict[str, Any] = {}
    for name in sorted(_KNOWN):
        value = getattr(how, name)
        if isinstance(value, Mapping):
            said[name] = dict(value)
        elif value is not None:
            said[name] = value if isinstance(value, str | int | float) else list(value)
    try:
        size = len(json.dumps(said, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"the settings of a fit are plain values, finite ones: {error}") from error
    if size > _MOST_BYTES:
        raise InputError(
            f"the settings of a fit may take {_MOST_BYTES} bytes as JSON, these take {size}; name "
            "fewer sites, or a pattern"
        )
    return said


def order_of(body: Mapping[str, Any], tenant: str, blobs: Blobs) -> Order:
    """The order that gives the same delta again: as many steps as were taken, and no other cap.

    Args:
        body: Of the event ``delta.fit``, with its shots kept.
        tenant: Whose.
        blobs: Where its shots are.

    Raises:
        CheckpointError: Shots do not fit their hash, or the event is none of a fit.
        MissingDataError: They are lost.
    """
    try:
        said, old = dict(body["settings"]), body["rehearsal"]
        if unknown := set(said) - _KNOWN:
            raise CheckpointError(
                f"the fit has a setting {min(unknown)!r:.60} that this Tessera does not know. "
                "Upgrade with: pip install -U tessera-lifelong"
            )
        how = replace(FitSettings(**said), steps=int(body["steps"]), budget={})
        rehearsal = None
        if old is not None:
            inputs, labels = _read(old, blobs)
            rehearsal = Rehearsal(
                inputs=inputs, labels=labels, rho=float(old["rho"]), lam=float(old["lam"])
            )
        inputs, labels = _read(body, blobs)
        return Order(tenant=tenant, inputs=inputs, labels=labels, settings=how, rehearsal=rehearsal)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"this is no event of a fit: {error!r:.200}") from error


def _kept(
    inputs: Mapping[str, Tensor], labels: Tensor | None, blobs: Blobs, keep: str
) -> tuple[str, str]:
    """The hash of some shots, and their blob, "" where none is kept."""
    shots = {_X + name: tensor for name, tensor in inputs.items()}
    if labels is not None:
        shots[_Y] = labels
    hashed = trees.sha256(shots)
    if keep != "inputs":
        return hashed, ""
    # Clones: safetensors takes no two tensors that share their memory, as parts of one do.
    return hashed, blobs.put(save({n: t.cpu().contiguous().clone() for n, t in shots.items()}))


def _read(said: Mapping[str, Any], blobs: Blobs) -> tuple[dict[str, Tensor], Tensor | None]:
    blob = str(said["shots_blob"])
    try:
        shots = load(blobs.get(blob))
    except SafetensorError as error:
        raise CheckpointError(f"the blob {blob} holds no shots: {error}") from error
    if trees.sha256(shots) != said["shots"]:
        raise CheckpointError(f"the shots in the blob {blob} do not fit their hash")
    labels = shots.pop(_Y, None)
    return {name.removeprefix(_X): tensor for name, tensor in shots.items()}, labels


def _rows(inputs: Mapping[str, Tensor]) -> int:
    return len(next(iter(inputs.values())))

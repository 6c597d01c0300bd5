"""What the server and its process for fits say to each other: JSON, tensors, deltas' files.

A message is the length of a JSON object (8 bytes, little endian), the object, and behind it the
parts whose lengths it lists under ``parts``: `read` checks every length before it takes memory.
Nothing is pickled, and an error crosses as its name and its message.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import IO, Any, final

import safetensors.torch
from torch import Tensor

from tessera import errors
from tessera.arch import Delta
from tessera.errors import CheckpointError, InputError, TesseraError
from tessera.profiler import Measurement
from tessera.serve.fitting_run import Fitted, FitterSettings, Order
from tessera.serve.fitting_values import FitSettings, Rehearsal
from tessera.serve.packing import pack, unpack

__all__ = [
    "Message",
    "error_of",
    "fitted_of",
    "of_error",
    "of_fitted",
    "of_order",
    "order_of",
    "plain",
    "read",
    "settings_of",
    "write",
]

_MAX_WORDS = 16 << 20
_MAX_PART = 1 << 30
_MAX_PARTS = 2


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Message:
    """One message.

    Attributes:
        said: What JSON has words for.
        parts: Bytes beside it.

    Example:
        >>> Message(said={"kind": "ready"}).parts
        ()
    """

    said: Mapping[str, Any]
    parts: Sequence[bytes] = ()


def write(pipe: IO[bytes], message: Message) -> None:
    """Send a message.

    Raises:
        InputError: JSON has no words for what it says, or it is too large.
        OSError: Nobody reads any more.

    Example:
        >>> import io
        >>> pipe = io.BytesIO()
        >>> write(pipe, Message(said={"a": 1}, parts=[b"xy"]))
        >>> _ = pipe.seek(0)
        >>> found = read(pipe)
        >>> found.said["a"], found.parts
        (1, [b'xy'])
    """
    sizes = [len(part) for part in message.parts]
    try:
        words = json.dumps({**message.said, "parts": sizes}).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"a fit's settings are plain values: {error}") from error
    if len(words) > _MAX_WORDS or len(sizes) > _MAX_PARTS or max(sizes, default=0) > _MAX_PART:
        raise InputError(f"a fit of {len(words) + sum(sizes)} bytes is too large for its process")
    pipe.write(struct.pack("<Q", len(words)) + words)
    for part in message.parts:
        pipe.write(part)
    pipe.flush()


def read(pipe: IO[bytes]) -> Message | None:
    """The next message; None where the other side has ended.

    Raises:
        CheckpointError: What comes is no message.

    Example:
        >>> import io
        >>> read(io.BytesIO()) is None
        True
        >>> read(io.BytesIO(b"x" * 99))
        Traceback (most recent call last):
        tessera.errors.CheckpointError: a message of 8680820740569200760 bytes is none of ours
    """
    head = pipe.read(8)
    if len(head) < 8:
        return None
    (length,) = struct.unpack("<Q", head)
    if length > _MAX_WORDS:
        raise CheckpointError(f"a message of {length} bytes is none of ours")
    words = pipe.read(length)
    if len(words) < length:
        return None
    try:
        said = json.loads(words)
        sizes = said.pop("parts")
        if len(sizes) > _MAX_PARTS or not all(0 <= size <= _MAX_PART for size in sizes):
            raise ValueError(f"parts of {sizes} bytes")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"a message is damaged: {error}") from error
    parts = []
    for size in sizes:
        parts.append(pipe.read(size))
        if len(parts[-1]) < size:
            return None
    return Message(said=said, parts=parts)


def plain(value: FitSettings | FitterSettings) -> dict[str, Any]:
    """A settings' fields as JSON has them.

    Example:
        >>> plain(FitSettings(r=2))["r"]
        2
    """
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    return {n: dict(v) if isinstance(v, Mapping) else v for n, v in found.items()}


def settings_of(said: Mapping[str, Any]) -> FitterSettings:
    """The settings that `plain` was given.

    Example:
        >>> settings_of(plain(FitterSettings(rows=7))).rows
        7
    """
    return FitterSettings(**said)


# --- there -----------------------------------------------------------------------------------


def of_order(order: Order, parent: Delta | None) -> Message:
    """The message of an order and of the delta that it goes on from."""
    old = order.rehearsal
    tensors = _named("new", order.inputs, order.labels)
    if old is not None:
        tensors |= _named("old", old.inputs, old.labels)
    said = {
        "tenant": order.tenant,
        "settings": plain(order.settings),
        "rehearsal": None if old is None else {"rho": old.rho, "lam": old.lam},
    }
    parts = [safetensors.torch.save(tensors)]
    return Message(said=said, parts=parts if parent is None else [*parts, pack(parent)])


def order_of(message: Message) -> tuple[Order, Delta | None]:
    """The order in a message, and the delta it goes on from."""
    tensors, said = safetensors.torch.load(message.parts[0]), message.said
    inputs, labels = _split("new", tensors)
    rehearsal = None
    if said["rehearsal"] is not None:
        old, old_labels = _split("old", tensors)
        rehearsal = Rehearsal(inputs=old, labels=old_labels, **said["rehearsal"])
    order = Order(
        tenant=said["tenant"],
        inputs=inputs,
        labels=labels,
        settings=FitSettings(**said["settings"]),
        rehearsal=rehearsal,
    )
    return order, unpack(message.parts[1]) if len(message.parts) > 1 else None


def _named(whose: str, inputs: Mapping[str, Tensor], labels: Tensor | None) -> dict[str, Tensor]:
    found = {f"{whose}.inputs.{name}": tensor for name, tensor in inputs.items()}
    if labels is not None:
        found[f"{whose}.labels"] = labels
    # Views of the body that they came in, perhaps; the file has each on its own.
    return {name: t.detach().cpu().contiguous().clone() for name, t in found.items()}


def _split(whose: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    prefix = f"{whose}.inputs."
    inputs = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return inputs, tensors.get(f"{whose}.labels")


# --- and back --------------------------------------------------------------------------------


def of_fitted(fitted: Fitted) -> Message:
    """The message of what a fit brought."""
    spent = fitted.spent
    said = {
        "steps": fitted.steps,
        "stopped_by": fitted.stopped_by,
        "losses": fitted.losses,
        "spent": {"ms": spent.ms, "joules": spent.joules, "joules_source": spent.joules_source},
    }
    return Message(said=said, parts=[pack(fitted.delta)])


def fitted_of(message: Message) -> Fitted:
    """What a fit brought.

    Raises:
        TesseraError: The message is of an error: this one.
        CheckpointError: The delta in it is damaged.
    """
    said = message.said
    if "error" in said:
        raise error_of(said)
    return Fitted(
        delta=unpack(message.parts[0]),
        steps=said["steps"],
        stopped_by=said["stopped_by"],
        losses=tuple(said["losses"]),
        spent=Measurement(**said["spent"]),
    )


def of_error(error: BaseException) -> Message:
    """The message of an error: its name and its words.

    Example:
        >>> of_error(InputError("labels: no")).said
        {'error': 'labels: no', 'type': 'InputError'}
    """
    return Message(said={"error": str(error), "type": type(error).__name__})


def error_of(said: Mapping[str, Any]) -> Exception:
    """The error again, where it is of Tessera's tree; else one that is a fault of the server.

    Example:
        >>> error_of({"error": "labels: no", "type": "InputError"})
        InputError('labels: no')
        >>> error_of({"error": "'a'", "type": "KeyError"})
        RuntimeError("a fit failed: KeyError: 'a'")
    """
    message, name = str(said["error"]), str(said["type"])
    kind = getattr(errors, name, None) if name in errors.__all__ else None
    if isinstance(kind, type) and issubclass(kind, TesseraError):
        return kind(message)
    return RuntimeError(f"a fit failed: {name}: {message}")

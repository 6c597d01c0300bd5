"""Reading a fit over HTTP: shots as the Open Inference Protocol has tensors, and how to fit."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from tessera.errors import InputError
from tessera.serve.datatypes import DATATYPES, from_json
from tessera.serve.fitting_values import FitSettings
from tessera.serve.oip import length_of, parts_of
from tessera.serve.oip_read import only_known, read_tensors
from tessera.serve.settings import Limits

__all__ = ["SCHEMA", "Asked", "read_asked", "read_settings"]

_TEXT = ("kind", "parent")
_NAMES = ("sites", "feedforward", "head")
_WHOLE = ("r", "tokens", "steps", "seed")
_NUMBERS = ("alpha", "lr")
_HOW = {*_TEXT, *_NAMES, *_WHOLE, *_NUMBERS, "budget"}
_LABELS = "labels"
_MOST_NAMES = 1000

_WORDS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_TENSOR = {
    "type": "object",
    "required": ["shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {"type": "string", "enum": list(DATATYPES)},
        "data": {"type": "array"},
        "parameters": {"type": "object"},
    },
}
# The fields of shots and of how to fit, as OpenAPI has them.
SCHEMA: dict[str, Any] = {
    "inputs": {"type": "array", "items": _TENSOR},
    "labels": {"anyOf": [{"type": "array", "items": {"type": "integer"}}, _TENSOR]},
    "kind": {"type": "string", "enum": ["lora", "ia3", "mask", "prefix", "prompt"]},
    "r": {"type": "integer", "minimum": 1},
    "alpha": {"type": "number"},
    **dict.fromkeys(_NAMES, _WORDS),
    "tokens": {"type": "integer", "minimum": 1, "maximum": 512},
    "parent": {"type": "string", "description": "The hash of a delta to go on from."},
    "steps": {"type": "integer", "minimum": 1, "default": 20},
    "lr": {"type": "number", "default": 5e-3},
    "seed": {"type": "integer", "default": 0},
    "budget": {
        "type": "object",
        "properties": {
            "ms": {"type": "number"},
            "joules": {"type": "number"},
            "steps": {"type": "integer", "minimum": 1},
        },
    },
}


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """A body with shots in it.

    Attributes:
        inputs: By name; empty: there are no shots in it.
        labels: Of the shots, int64; None: none were given.
        settings: How to fit.
        rest: The other fields, as JSON had them.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None
    settings: FitSettings
    rest: dict[str, Any]


def read_asked(
    body: bytes, header_length: bytes | None, allowed: frozenset[str], limits: Limits
) -> Asked:
    """Read a body: JSON, and behind it the bytes of the tensors that say ``binary_data_size``.

    Args:
        body: All of it.
        header_length: What the header Inference-Header-Content-Length says; None: all is JSON.
        allowed: Fields beside those of shots and of how to fit.
        limits: Of the tensors.

    Raises:
        InputError: A field is not as it should be; the message names it.

    Example:
        >>> asked = read_asked(
        ...     b'{"inputs": [{"name": "x", "shape": [2, 1], "datatype": "FP32", "data": [1, 2]}],'
        ...     b' "labels": [0, 1], "steps": 5, "ttl_s": 60}',
        ...     None, frozenset({"ttl_s"}), Limits(),
        ... )
        >>> asked.labels, asked.settings.steps, asked.rest
        (tensor([0, 1]), 5, {'ttl_s': 60})
    """
    said, binary = parts_of(body, length_of(header_length), limits)
    only_known(said, frozenset({"inputs", _LABELS, *_HOW}) | allowed, "the request")
    listed, labels = said.get("inputs", []), said.get(_LABELS)
    if type(listed) is not list:
        raise InputError(f"inputs must be a list of tensors, it is {_shown(listed)}")
    if labels is not None and any(type(t) is dict and t.get("name") == _LABELS for t in listed):
        raise InputError("labels are given twice: among the inputs, for the model, and beside them")
    if type(labels) is dict:  # a tensor, whose bytes come after those of the inputs
        listed = [*listed, {**labels, "name": _LABELS}]
    found = read_tensors(listed, "inputs", binary, limits)
    own = found.pop(_LABELS, None) if type(labels) is dict else _plain(labels)
    if own is not None and (own.is_floating_point() or own.dtype == torch.bool):
        raise InputError(f"labels must be whole numbers, INT64; they are {own.dtype}")
    rest = {n: v for n, v in said.items() if n in allowed}
    return Asked(
        inputs=found,
        labels=None if own is None else own.to(torch.int64),
        settings=read_settings({n: v for n, v in said.items() if n in _HOW and v is not None}),
        rest=rest,
    )


def _plain(labels: object) -> Tensor | None:
    if labels is None:
        return None
    if type(labels) is not list:
        raise InputError(f"labels must be a list or a tensor, they are {_shown(labels)}")
    return from_json(labels, [len(labels)], "INT64", _LABELS)


def read_settings(said: dict[str, Any]) -> FitSettings:
    """How to fit, from plain values by the names of `FitSettings`.

    Raises:
        InputError: One of them is not as it should be; the message names it.

    Example:
        >>> read_settings({"r": 8, "budget": {"ms": 200}}).r
        8
    """
    for name in _TEXT:
        _require(name, said.get(name, ""), type(said.get(name, "")) is str, "text")
    for name in _WHOLE:
        # As far as every generator of random numbers takes a seed.
        value = said.get(name, 0)
        fits = type(value) is int and abs(value) < 1 << 62
        _require(name, value, fits, "a whole number")
    for name in _NUMBERS:
        value = said.get(name, 0)
        _require(name, value, type(value) in (int, float), "a number")
    for name in _NAMES:
        value = said.get(name, "")
        listed = type(value) is list and all(type(v) is str for v in value)
        fits = type(value) is str or (listed and 0 < len(value) <= _MOST_NAMES)
        _require(name, value, fits, "a name or a list of names")
    budget = said.get("budget", {})
    _require("budget", budget, type(budget) is dict, "an object")
    return FitSettings(**said)


def _require(name: str, value: object, fits: bool, what: str) -> None:
    if not fits:
        raise InputError(f"{name} must be {what}, it is {_shown(value)}")


def _shown(value: object) -> str:
    return "missing" if value is None else reprlib.repr(value)

"""Names for the tensors a function closes over: `model.0.weight`, `anchor.fisher.0.weight`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = ["closed_over", "printable"]

_DEPTH = 5  # anchors.0.fisher.0.weight is four deep
_MAX_ITEMS = 1000


def closed_over(fn: Callable[..., Any]) -> dict[str, Tensor]:
    """Name -> tensor for all that `fn` can reach: cells, globals it names, defaults, self.

    The first name a tensor is met under counts; the order is that of the code.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in _reached(fn, _DEPTH):
        _walk(value, name, _DEPTH, found, seen)
    return found


def printable(name: str) -> str:
    """`name` with everything but letters, digits, dots and underscores replaced."""
    return re.sub(r"[^\w.]+", "_", name, flags=re.ASCII) or "_"


def _reached(fn: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything a callable refers to; functions it calls included."""
    if depth == 0:
        return
    if isinstance(fn, functools.partial):
        yield from _reached(fn.func, depth)
        yield from ((f"arg{i}", v) for i, v in enumerate(fn.args))
        yield from fn.keywords.items()
    elif isinstance(fn, MethodType):
        yield "self", fn.__self__
        yield from _reached(fn.__func__, depth)
    elif isinstance(fn, FunctionType):
        values = dict(zip(fn.__code__.co_freevars, _contents(fn), strict=True))
        values |= {n: fn.__globals__[n] for n in _globals(fn.__code__) if n in fn.__globals__}
        code = fn.__code__
        defaults = fn.__defaults__ or ()
        names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
        values |= dict(zip(names, defaults, strict=True))
        values |= fn.__kwdefaults__ or {}
        yield from values.items()
        for value in values.values():
            if isinstance(value, FunctionType | MethodType | functools.partial):
                yield from _reached(value, depth - 1)
    else:
        yield "self", fn


def _contents(fn: FunctionType) -> Iterator[Any]:
    for cell in fn.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            yield None


def _globals(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a lambda or function inside
            yield from _globals(constant)


def _walk(value: Any, name: str, depth: int, found: dict[str, Tensor], seen: set[int]) -> None:
    if id(value) in seen or depth == 0:
        return
    if isinstance(value, Tensor):
        seen.add(id(value))
        label, count = printable(name), 1
        while label in found:
            label, count = f"{printable(name)}_{count}", count + 1
        found[label] = value
        return
    if isinstance(value, type | ModuleType | str | bytes | int | float | FunctionType | None):
        return
    seen.add(id(value))
    for key, item in _items(value):
        _walk(item, f"{name}.{key}" if key else name, depth - 1, found, seen)


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        return [*value.named_parameters(), *value.named_buffers()]
    if hasattr(value, "_named_parts"):  # what a value calls its parts, where fields do not say it
        return list(value._named_parts())
    if isinstance(value, Mapping):
        return [(str(k), v) for k, v in list(value.items())[:_MAX_ITEMS]]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return [(str(i), v) for i, v in enumerate(value[:_MAX_ITEMS])]
    if is_dataclass(value):
        return [(f.name, getattr(value, f.name, None)) for f in fields(value)]
    slots = [n for n in getattr(type(value), "__slots__", ()) if isinstance(n, str)]
    named = [(n, getattr(value, n, None)) for n in slots]
    return [*named, *getattr(value, "__dict__", {}).items()]

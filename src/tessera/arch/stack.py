"""Many deltas in one tensor, a row for each: what a batch gathers from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, final

import torch
from torch import Tensor

from tessera.arch.delta import Delta, split
from tessera.errors import DeltaError, InputError

__all__ = ["Layout", "Stack"]

_SHARED_INPUT = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
)  # siblings that a transformer calls with one and the same input
_GROWING = ("A", "B", "prefix", "prompt")  # a smaller rank, fewer tokens: zeros fill it up
_ROLES = {name: (family, at) for family in _SHARED_INPUT for at, name in enumerate(family)}


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """What a stack has room for, and hence what is computed for each row.

    Attributes:
        shapes: Name of a tensor -> the shape that holds it; B as [r, out].
        sites: "prefix", "prompt" -> the modules that take it; none in a transformers model.
        dtype: Of the values, e.g. "float32".

    Example:
        >>> Layout(shapes={"fc.A": (8, 16), "fc.B": (8, 4)}, sites={}).dtype
        'float32'
    """

    shapes: Mapping[str, Sequence[int]]
    sites: Mapping[str, Sequence[str]]
    dtype: str = "float32"


@final
class Stack:
    """Deltas side by side, so that each row of a batch can have its own.

    ``values[s]`` is all of delta s, its tensors one behind the other, so that attaching a delta is
    writing one row. The A of siblings that share their input (query, key and value) lie together,
    so that one product shrinks for all. Lower ranks, and what a delta does not have, are filled up
    with what changes nothing. The last row is no delta: the base.

    Args:
        deltas: The deltas; copied. Any kinds. Slots are counted from 0 in this order.
        slots: Room for at least so many deltas; further ones are `put`.
        room: Another stack's `layout`: room for at least what that has.
        device: Where the values are, if there is no delta yet to say so.
        trainable: Keep the scales apart and make `values` a leaf, to fit all at once.

    Raises:
        InputError: There is no delta.
        DeltaError: They are of different bases, or do not lie over a site in the same way.

    Example:
        >>> def of(change):
        ...     tensors = {"A": torch.ones(1, 2), "B": torch.full((1, 1), change)}
        ...     return Delta(kind="lora", tensors=tensors, scales={"": 1.0})
        >>> stack = Stack([of(1.0), of(2.0)], slots=4)
        >>> len(stack), stack.slots, stack.values.shape
        (2, 4, torch.Size([5, 3]))
    """

    def __init__(
        self,
        deltas: Sequence[Delta],
        *,
        slots: int = 0,
        room: Layout | None = None,
        device: torch.device | str = "cpu",
        trainable: bool = False,
    ) -> None:
        if not (deltas or (room and slots)) or not all(isinstance(d, Delta) for d in deltas):
            raise InputError("a stack needs at least one arch.Delta, or room and slots for some")
        self.slots = max(slots, len(deltas))
        self.trainable = trainable
        self.base_hash = next((d.base_hash for d in deltas if d.base_hash), "")
        self.shapes = dict(_shapes(deltas, room.shapes if room else {}))
        self.sites = dict(room.sites) if room else {}
        self.places: dict[str, int] = {}
        total = 0
        for name in sorted(self.shapes, key=_order):
            self.places[name] = total
            total += math.prod(self.shapes[name])
        every = [t for d in deltas for t in d.tensors.values() if t.is_floating_point()]
        dtype = getattr(torch, room.dtype) if room else every[0].dtype
        for tensor in every:
            dtype = torch.promote_types(dtype, tensor.dtype)
        self._base = torch.zeros(total, dtype=dtype, device=every[0].device if every else device)
        for name in self.shapes:
            if split(name)[1] in ("gain_in", "gain_out"):
                self._view(self._base, name).fill_(1.0)
        self.values = self._base.repeat(self.slots + 1, 1)
        self.deltas: list[Delta | None] = [None] * self.slots
        self.scales: dict[str, float] = {}
        # How many virtual tokens each slot has; the base has none.
        self.tokens = {k: [0] * (self.slots + 1) for k in ("prefix", "prompt") if k in self.shapes}
        for slot, delta in enumerate(deltas):
            self.put(slot, delta)
        self.values.requires_grad_(trainable)

    @property
    def layout(self) -> Layout:
        """What there is room for."""
        dtype = str(self.values.dtype).removeprefix("torch.")
        return Layout(shapes=dict(self.shapes), sites=dict(self.sites), dtype=dtype)

    def __len__(self) -> int:
        """How many slots hold a delta."""
        return sum(delta is not None for delta in self.deltas)

    def __repr__(self) -> str:
        return f"Stack({len(self)} deltas, {self.slots} slots, {self.values.shape[1]} values each)"

    def _view(self, row: Tensor, name: str) -> Tensor:
        shape = self.shapes[name]
        piece = row.narrow(-1, self.places[name], math.prod(shape))
        return piece.view(*row.shape[:-1], *shape)

    def siblings(self, name: str) -> list[str]:
        """Of an A: the names of those that lie beside it, itself included; shrunk together."""
        (parent, _, family, *_), wide = _order(name), self.shapes[name][1]
        return [
            other
            for other in self.places
            if _order(other)[:3] == (parent, "A", family) and self.shapes[other][1] == wide
        ]

    def has_room(self, delta: Delta) -> bool:
        """Whether `put` would take it."""
        try:
            for name, tensor in delta.tensors.items():
                self._check(name, tensor, delta)
        except DeltaError:
            return False
        return True

    def put(self, slot: int, delta: Delta) -> None:
        """Write a delta into a slot, over what was there; no call may be using that slot.

        The slot keeps the delta as it is now: one that can still be trained is copied.

        Raises:
            InputError: There is no such slot.
            DeltaError: It is of another base, or has a site, rank or kind this stack has no room
                for. Nothing was written.
        """
        if isinstance(slot, bool) or not isinstance(slot, int) or not 0 <= slot < self.slots:
            raise InputError(f"the stack has slots 0 .. {self.slots - 1}, got {slot!r}")
        if delta.base_hash and self.base_hash and delta.base_hash != self.base_hash:
            raise DeltaError(
                f"{delta!r} is of another base ({delta.base_hash[:12]}...) than the stack "
                f"({self.base_hash[:12]}...)"
            )
        whole = len(delta.tensors) == len(self.shapes)
        for name, tensor in delta.tensors.items():
            whole &= self._check(name, tensor, delta)
        for kind in self.tokens:
            if kind in delta.tensors:
                self.sites[kind] = tuple(delta.info.get("sites", ()))
        with torch.no_grad():
            row = self.values[slot]
            if not whole:
                row.copy_(self._base)
            for name, tensor in delta.tensors.items():
                self._write(row, name, tensor, delta)
        for kind, counts in self.tokens.items():
            counts[slot] = len(delta.tensors[kind]) if kind in delta.tensors else 0
        # What is computed delta by delta is computed from the delta itself (arch.rowwise).
        self.deltas[slot] = delta.snapshot() if delta.parameters() else delta

    def _check(self, name: str, tensor: Tensor, delta: Delta) -> bool:
        """Raise unless there is room for a tensor; whether it fills all of it."""
        shape = self.shapes.get(name)
        if shape is None or tensor.device != self.values.device:
            self._no_room(name, tensor)
        site, part = split(name)
        if part in ("values", "mask"):
            return True  # stays with the delta: see arch.rowwise
        if part in ("prefix", "prompt"):
            sites = tuple(delta.info.get("sites", ()))
            if self.sites.get(part, sites) != sites:
                raise DeltaError(
                    f"the stack's {part} lies over {self.sites[part]}, this one over {sites}"
                )
        own = (tensor.shape[1], tensor.shape[0]) if part == "B" else tuple(tensor.shape)
        if own == shape:
            fills = True
        else:
            fills = False
            grows = part in _GROWING
            if own[grows:] != shape[grows:] or (grows and own[0] > shape[0]):
                self._no_room(name, tensor)
        if part == "B" and self.trainable:
            scale = delta.scales[site]
            if self.scales.setdefault(site, scale) != scale:
                raise DeltaError(
                    f"deltas that are fitted together need one scale at {site!r}, got {scale} and "
                    f"{self.scales[site]}"
                )
        return fills

    def _write(self, row: Tensor, name: str, tensor: Tensor, delta: Delta) -> None:
        site, part = split(name)
        if part in ("values", "mask"):
            return
        place = self._view(row, name)
        if part in _GROWING:
            place = place[: tensor.shape[1] if part == "B" else tensor.shape[0]]
        if part != "B":
            place.copy_(tensor)
            return
        turned = (tensor if tensor.dim() == 2 else tensor.flatten(1)).mT
        if self.trainable or delta.scales[site] == 1.0:
            place.copy_(turned)
        else:
            torch.mul(turned, delta.scales[site], out=place)

    def _no_room(self, name: str, tensor: Tensor) -> NoReturn:
        shape = self.shapes.get(name)
        raise DeltaError(
            f"the stack has no room for {name!r} {tuple(tensor.shape)} on {tensor.device}: "
            + (f"it keeps {shape} on {self.values.device}" if shape else "no delta in it has that")
            + ". Make a new stack that has all of them"
        )

    def clear(self, slot: int) -> None:
        """Take a delta out; its slot computes what the base does."""
        if not 0 <= slot < self.slots:
            raise InputError(f"the stack has slots 0 .. {self.slots - 1}, got {slot!r}")
        with torch.no_grad():
            self.values[slot].copy_(self._base)
        self.deltas[slot] = None
        for counts in self.tokens.values():
            counts[slot] = 0

    def fill(self, wholes: Mapping[str, Tensor]) -> None:
        """Give slots without a head of their own the base's parameters, by "<parameter>.full"."""
        with torch.no_grad():
            for name, value in wholes.items():
                self._view(self._base, name).copy_(value)
                for slot, delta in enumerate([*self.deltas, None]):
                    if delta is None or name not in delta.tensors:
                        self._view(self.values[slot], name).copy_(value)

    def unpack(self, slot: int) -> dict[str, Tensor]:
        """Of a trainable stack the tensors of the delta in `slot`, shaped as the delta has them."""
        delta = self.deltas[slot]
        found = {}
        for name, tensor in (delta.tensors if delta is not None else {}).items():
            part = split(name)[1]
            if part in ("values", "mask"):
                continue
            value = self._view(self.values[slot].detach(), name)
            if part in _GROWING:
                value = value[: tensor.shape[1] if part == "B" else len(tensor)]
            found[name] = value.mT.reshape(tensor.shape) if part == "B" else value
        return found


def _order(name: str) -> tuple[str, str, tuple[str, ...], int, str]:
    """A before B, and the A of siblings that share their input beside each other."""
    site, part = split(name)
    parent, _, own = site.rpartition(".")
    family, at = _ROLES.get(own, ((own,), 0))
    return parent, part, family, at, site


def _shapes(
    deltas: Sequence[Delta], least: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name -> the shape that holds the tensor of every delta; B turned to [r, out]."""
    found = {name: [tuple(shape)] for name, shape in least.items()}
    for delta in deltas:
        for name, tensor in delta.tensors.items():
            part = split(name)[1]
            shape = tuple(tensor.shape)
            if part == "B":
                shape = (tensor.shape[1], tensor.shape[0])
            elif part in ("values", "mask"):
                shape = (0,)  # these stay with their delta: see arch.rows
            found.setdefault(name, []).append(shape)
    for name, shapes in found.items():
        part = split(name)[1]
        grows = part in _GROWING
        if len({s[grows:] for s in shapes}) != 1:
            raise DeltaError(
                f"the deltas do not have {name!r} in common shapes: {sorted(set(shapes))[:4]}"
            )
        most = max(s[0] for s in shapes) if shapes[0] else 0
        yield name, ((most, *shapes[0][1:]) if grows else shapes[0])

"""One forward over the rows of several requests, each under its delta; and the same again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.arch import Delta, Layout, Stack, StackedModel
from tessera.arch.conditioning import backbone
from tessera.errors import InputError

__all__ = ["Bank", "Form", "Part", "Plan", "device_of", "form_of", "run"]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """The rows of one request in a batch.

    Attributes:
        inputs: Name -> [rows, ...].
        delta: Hash of its delta; "" for the base.
        rows: How many.
        length: Of its sequences; 0 where the model has none.
    """

    inputs: Mapping[str, Tensor]
    delta: str
    rows: int
    length: int


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """All that the bits of a batch's answers depend on, but the inputs of the row in question.

    Attributes:
        bucket: Length that sequences are padded to; 0 where the model has none.
        parts: (delta's hash, rows) of each request, in order.
        room: The bank's layout: which sites are computed, and at what rank; None: it was empty.
    """

    bucket: int
    parts: Sequence[tuple[str, int]]
    room: Layout | None

    def json(self) -> dict[str, Any]:
        """As plain values, for the log."""
        room = None
        if self.room is not None:
            shapes = {name: list(shape) for name, shape in self.room.shapes.items()}
            sites = {kind: list(sites) for kind, sites in self.room.sites.items()}
            room = {"shapes": shapes, "sites": sites, "dtype": self.room.dtype}
        return {"bucket": self.bucket, "parts": [list(p) for p in self.parts], "room": room}

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> Plan:
        """What `json` gave.

        Raises:
            InputError: It is something else.

        Example:
            >>> plan = Plan(bucket=16, parts=[("", 2)], room=None)
            >>> Plan.parse(plan.json()).json() == plan.json()
            True
        """
        try:
            room = said["room"]
            if room is not None:
                room = Layout(
                    shapes={str(n): tuple(map(int, s)) for n, s in room["shapes"].items()},
                    sites={str(n): tuple(map(str, s)) for n, s in room["sites"].items()},
                    dtype=_dtype(room["dtype"]),
                )
            return cls(
                bucket=int(said["bucket"]),
                parts=[(str(d), int(n)) for d, n in said["parts"]],
                room=room,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"a plan of a batch is damaged: {error!r}") from error


def _dtype(said: Any) -> str:
    if said not in ("float32", "float64", "float16", "bfloat16"):
        raise ValueError(f"{said!r} is no type of a delta")
    return str(said)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Form:
    """How a model takes a batch.

    Attributes:
        padding: Inputs [rows, length] that are padded, and with what; empty: none is.
        limit: Longest sequence, virtual tokens included; 0: no limit is known.
    """

    padding: Mapping[str, int]
    limit: int


def form_of(model: nn.Module) -> Form:
    """What is known of a model: transformers models take sequences that can be padded.

    Example:
        >>> dict(form_of(nn.Linear(1, 1)).padding)
        {}
    """
    name = backbone(model)
    if name is None:
        return Form(padding={}, limit=0)
    config: Any = model.get_submodule(name).config
    pad = getattr(config, "pad_token_id", None)
    limit = getattr(config, "max_position_embeddings", None)
    padding = {"input_ids": 0 if pad is None else int(pad), "attention_mask": 0}
    return Form(padding={**padding, "token_type_ids": 0}, limit=int(limit or 0))


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: where its parameters are.

    Example:
        >>> device_of(nn.Linear(2, 1))
        device(type='cpu')
    """
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@final
class Bank:
    """The slots of the deltas in use, over one model. For one thread.

    A delta that is not in it is written over the one that was not used for the longest time. One
    that does not fit, for a new site or a higher rank, makes a new, wider bank.

    Args:
        model: The base.
        slots: Most deltas at a time.
        room: Room for at least this.
    """

    def __init__(self, model: nn.Module, slots: int, room: Layout | None = None) -> None:
        self._model, self._slots, self._room = model, slots, room
        self._where: dict[str, int] = {}  # in the order of use
        self._stack: Stack | None = None
        self._stacked: StackedModel | None = None
        self.device = device_of(model)
        if room is not None:
            self._widen({})

    @property
    def room(self) -> Layout | None:
        """The layout; None while no delta has been in it."""
        return None if self._stack is None else self._room

    def resident(self) -> list[str]:
        """Hashes of the deltas in it, the one used last at the end."""
        return list(self._where)

    def drop(self, name: str) -> None:
        """Empty the slot of a delta, if it has one."""
        slot = self._where.pop(name, None)
        if slot is not None and self._stack is not None:
            self._stack.clear(slot)

    def seat(self, deltas: Mapping[str, Delta]) -> dict[str, int]:
        """Slots of these deltas, at most as many as there are; they are written where needed."""
        if len(deltas) > self._slots:
            raise InputError(f"a batch of {len(deltas)} deltas, and {self._slots} slots")
        if self._stack is None or not all(
            name in self._where or self._fits(d) for name, d in deltas.items()
        ):
            self._widen(deltas)
        assert self._stack is not None
        for name, delta in deltas.items():
            slot = self._where.pop(name, None)
            if slot is None:
                slot = self._free(deltas)
                self._stack.put(slot, self._here(delta))
            self._where[name] = slot
        return {name: self._where[name] for name in deltas}

    def _here(self, delta: Delta) -> Delta:
        return delta if self.device.type == "cpu" else delta.to(self.device)

    def _fits(self, delta: Delta) -> bool:
        assert self._stack is not None
        return self._stack.has_room(self._here(delta))

    def _free(self, needed: Iterable[str]) -> int:
        assert self._stack is not None
        used = set(self._where.values())
        for slot in range(self._slots):
            if slot not in used:
                return slot
        last = next(name for name in self._where if name not in set(needed))
        return self._where.pop(last)

    def _widen(self, deltas: Mapping[str, Delta]) -> None:
        kept: dict[str, Delta] = {}
        for name, slot in self._where.items():
            delta = None if self._stack is None else self._stack.deltas[slot]
            if delta is not None and name not in deltas:
                kept[name] = delta
        spare = self._slots - len(deltas)
        kept = dict(list(kept.items())[-spare:] if spare else [])
        every = {**kept, **deltas}
        self._stack = Stack(
            [self._here(d) for d in every.values()],
            slots=self._slots,
            room=self._room,
            device=self.device,
        )
        self._room = self._stack.layout
        self._stacked = StackedModel(self._model, self._stack)
        self._where = {name: slot for slot, name in enumerate(every)}

    def __call__(self, inputs: Mapping[str, Tensor], rows: Tensor) -> Any:
        """The model's answer, row i under the delta of slot ``rows[i]``."""
        if self._stacked is None:
            return self._model(**inputs)
        return self._stacked(**inputs, rows=rows)


def run(
    bank: Bank, form: Form, parts: Sequence[Part], deltas: Mapping[str, Delta], bucket: int
) -> list[dict[str, Tensor]]:
    """One forward; the outputs of each part.

    One more row goes along with every batch: so no product has a single row, which is computed in
    another way than several, and there is padding in every mask, without which attention takes
    another path. What a row gets then depends on its place in the plan, not on the others' values.

    Args:
        bank: Of the model.
        form: Of the model.
        parts: The requests, of equal input names and shapes but for rows and length.
        deltas: By hash, those the parts name.
        bucket: Length to pad to.

    Raises:
        InputError: The model gave something that has no rows.
    """
    slots = bank.seat({p.delta: deltas[p.delta] for p in parts if p.delta}) if deltas else {}
    rows = [slots[p.delta] if p.delta else -1 for p in parts for _ in range(p.rows)]
    inputs = {
        name: _joined(name, form, parts, bucket).to(bank.device) for name in _names(form, parts)
    }
    with torch.inference_mode():
        outputs = _named(bank(inputs, torch.tensor([*rows, -1], device=bank.device)))
        outputs = {name: value.cpu() for name, value in outputs.items()}  # at once, not by part
    found, first = [], 0
    for part in parts:
        virtual = _virtual(deltas[part.delta]) if part.delta else 0
        own = {}
        for name, value in outputs.items():
            if value.dim() < 1 or len(value) != len(rows) + 1:
                raise InputError(f"the model's output {name!r} {tuple(value.shape)} has no rows")
            mine = value[first : first + part.rows]
            if bucket and mine.dim() > 1 and mine.shape[1] >= bucket:
                mine = mine[:, : part.length + virtual]
            own[name] = mine.clone()
        found.append(own)
        first += part.rows
    return found


def _virtual(delta: Delta) -> int:
    return len(delta.tensors["prompt"]) if "prompt" in delta.tensors else 0


def _names(form: Form, parts: Sequence[Part]) -> list[str]:
    names = sorted(parts[0].inputs)
    if form.padding and "attention_mask" not in names:
        names.append("attention_mask")
    return names


def _joined(name: str, form: Form, parts: Sequence[Part], bucket: int) -> Tensor:
    """The input of all parts, padded, and one more row of padding behind them."""
    pieces = []
    for part in parts:
        value = part.inputs.get(name)
        if value is None:  # the mask, where none was given: all is there
            value = torch.ones(part.rows, part.length, dtype=torch.int64)
        if name in form.padding and bucket > value.shape[1]:
            value = F.pad(value, (0, bucket - value.shape[1]), value=form.padding[name])
        pieces.append(value)
    last = pieces[0][:1]
    ballast = torch.full_like(last, form.padding.get(name, 0))
    if name == "attention_mask":
        ballast[:, :1] = 1  # attention to nothing at all is not a number
    return torch.cat([*pieces, ballast])


def _named(output: Any) -> dict[str, Tensor]:
    """The tensors of a model's answer, by name."""
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        return {str(n): t for n, t in output.items() if isinstance(t, Tensor)}
    if isinstance(output, tuple | list):
        return {f"output_{i}": t for i, t in enumerate(output) if isinstance(t, Tensor)}
    raise InputError(f"the model gave a {type(output).__name__}, which holds no tensors by name")

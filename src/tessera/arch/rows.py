"""A batch in which each row names its delta."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from tessera.arch.base import named
from tessera.arch.delta import split
from tessera.arch.overlay import Seats, placed, require_width, seat_virtual, shadow_tree
from tessera.arch.rowwise import Call, by_rows, by_segments, inside
from tessera.arch.stack import Stack
from tessera.arch.terms import gather_terms, owner
from tessera.errors import DeltaError, InputError, UnknownNameError
from tessera.ops.registry import transformed

__all__ = ["StackedModel"]


@final
class StackedModel:
    """A model in whose batches each row has a delta of its own: `peft.apply` of a stack.

    Any number of threads may call it; each call has a shadow of its own.

    Example:
        >>> from tessera.arch import Delta
        >>> tensors = {"A": torch.ones(1, 2), "B": torch.ones(1, 1)}
        >>> stack = Stack([Delta(kind="lora", tensors=tensors, scales={"": 1.0})])
        >>> base = nn.Linear(2, 1, bias=False)
        >>> model, x = StackedModel(base, stack), torch.ones(2, 2)
        >>> (model(x, rows=torch.tensor([0, -1])) - base(x)).round().tolist()
        [[2.0], [0.0]]
    """

    def __init__(self, model: nn.Module, stack: Stack) -> None:
        self._stack = stack
        self._model = shadow_tree(model, {})  # keeps the base's tensors, not the base
        self._seats: dict[str, partial[nn.Module]] = {}
        self._turns: set[str] = set()
        self._plan(model)
        self._first = self._shadow()
        self._free = [self._first]

    @property
    def module(self) -> nn.Module:
        """One of the shadows, to look at or to change before the first call."""
        return self._first[1]

    def __call__(self, *args: Any, rows: Tensor, **kwargs: Any) -> Any:
        """What the model gives, row i under the delta of slot ``rows[i]``.

        Args:
            *args: The model's own; tensors begin with the batch.
            rows: int64 [batch]: slots of the stack, -1 for the base alone.
            **kwargs: The model's own.

        Raises:
            InputError: `rows` is no int64 vector, or names a slot without a delta.
        """
        if transformed():
            call, module = self._first  # a tracer runs what is around it by itself
            call.start(rows)
            return module(*args, **kwargs)
        self._check(rows)
        try:
            call, module = self._free.pop()
        except IndexError:
            call, module = self._shadow()
        try:
            call.start(rows)
            return module(*args, **kwargs)
        finally:
            call.end()
            self._free.append((call, module))

    def _check(self, rows: Tensor) -> None:
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
            got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows)
            raise InputError(f"rows= must be int64 [batch], got {got}")
        for slot in set(rows.tolist()):
            known = -1 <= slot < self._stack.slots
            if not known or (slot >= 0 and self._stack.deltas[slot] is None):
                raise InputError(
                    f"rows= names slot {slot}, where the stack holds no delta; it has "
                    f"{len(self._stack)} in {self._stack.slots} slots, and -1 is the base"
                )

    def _plan(self, model: nn.Module) -> None:
        """Decide for each site how its rows are computed, and check every delta on the way."""
        stack = self._stack
        here = [None if d is None else placed(d, model) for d in stack.deltas]
        both = zip(here, stack.deltas, strict=True)
        if any(h and d and set(h.tensors) != set(d.tensors) for h, d in both):
            raise DeltaError("a stack must be laid over the whole its deltas were made for")
        for delta in here:
            if delta is not None:
                gather_terms(model, [(delta, 1.0)])  # every tensor fits its module
        require_width(model, [d for d in here if d is not None])
        # What there is room for is computed, whether a delta has it now or is put there later.
        parts: dict[str, set[str]] = {}
        for name in stack.shapes:
            if split(name)[1] not in ("prefix", "prompt"):
                parts.setdefault(owner(name), set()).add(split(name)[1])
        for site, has in parts.items():
            if site not in named(model):
                raise UnknownNameError(f"{stack!r} lies over {site!r}, which this model lacks")
            if "values" in has or not _plain(model.get_submodule(site)):
                self._turns.add(site)
            # What is in an attention layer is read by it, not called.
            self._turns.update(_attention_above(model, site))
        wholes: dict[str, Tensor] = {}
        for site in sorted(self._turns):
            if any(inside(site, other) for other in self._turns):
                continue
            if stack.trainable:
                raise DeltaError(
                    f"deltas over {site!r}, a {type(model.get_submodule(site)).__name__}, cannot "
                    "be fitted together; fit them one by one"
                )
            self._seats[site] = partial(by_segments, site=site)
        for site, has in parts.items():
            if any(inside(site, other) is not None for other in self._turns):
                continue
            for name in stack.shapes:
                if owner(name) == site and split(name)[1] == "full":
                    own = split(split(name)[0])[1]
                    wholes[name] = model.get_submodule(site).get_parameter(own)
                    has.add(f"full.{own}")
            self._seats[site] = partial(by_rows, site=site, parts=frozenset(has))
        stack.fill(wholes)

    def _shadow(self) -> tuple[Call, nn.Module]:
        call = Call(self._stack)
        seats: Seats = {n: [partial(seat, call=call)] for n, seat in self._seats.items()}
        kinds: dict[str, Sequence[str]] = {
            kind: self._stack.sites.get(kind, ()) for kind in self._stack.tokens
        }
        seat_virtual(self._model, kinds, _RowTokens(call), seats, self._turns)
        for name, module in self._model.named_modules():
            # PyTorch's fused encoder reads weights, and these differ from row to row.
            if isinstance(module, nn.TransformerEncoderLayer):
                seats.setdefault(name, []).append(partial(_set, activation_relu_or_gelu=0))
            elif isinstance(module, nn.TransformerEncoder):
                seats.setdefault(name, []).append(partial(_set, enable_nested_tensor=False))
        return call, shadow_tree(self._model, seats)


def _set(twin: nn.Module, **values: Any) -> nn.Module:
    twin.__dict__.update(values)
    return twin


def _plain(module: nn.Module) -> bool:
    """Whether all rows of a module are computed at once: a linear layer as PyTorch has it."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _attention_above(model: nn.Module, site: str) -> list[str]:
    parent = site.rpartition(".")[0]
    over = site and isinstance(model.get_submodule(parent), nn.MultiheadAttention)
    return [parent] if over else []


@final
class _RowTokens:
    """Virtual tokens of the rows of the running call."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def _rows(self, kind: str) -> tuple[Tensor, Tensor | None] | None:
        call, stack = self._call, self._call.stack
        if kind not in stack.tokens:
            return None
        counts = torch.tensor(stack.tokens[kind], device=call.rows.device)[call.rows]
        tokens = call.of_rows(kind)
        if transformed():
            return tokens, counts
        most, least = int(counts.max()), int(counts.min())
        if not most:
            return None
        return tokens[:, :most], None if most == least else counts

    def prefix(self, rows: int) -> tuple[Tensor, Tensor | None] | None:
        return self._rows("prefix")

    def prompt(self, rows: int) -> tuple[Tensor, Tensor | None] | None:
        return self._rows("prompt")

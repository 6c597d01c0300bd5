"""The modules of a batch in which each row names its delta."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import ops as T
from tessera.arch.conditioning import conditioned
from tessera.arch.delta import Delta, split
from tessera.arch.overlaid import bare_copy, base_parameter, overlaid
from tessera.arch.overlay import Seats, Tokens, shadow_tree
from tessera.arch.stack import Stack
from tessera.arch.terms import Terms, add_term, owner
from tessera.errors import DeltaError, InputError
from tessera.ops.registry import transformed

__all__ = ["Call", "by_rows", "by_segments", "inside"]


@final
class Call:
    """What one call of a shadow carries to its modules."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.rows = torch.empty(0, dtype=torch.int64)
        self.shrunk: tuple[str, Tensor, Tensor] | None = None
        self.groups: list[tuple[int, Tensor]] | None = None
        self.pieces: dict[str, Tensor] = {}
        # name -> (the piece of `values` it is gathered with, where in it, shape)
        self.where: dict[str, tuple[str, int, tuple[int, ...]]] = {}
        self.sizes: dict[str, int] = {}
        for name, shape in stack.shapes.items():
            group = stack.siblings(name) if split(name)[1] == "A" else [name]
            first = min(group, key=stack.places.__getitem__)
            self.where[name] = (first, stack.places[name] - stack.places[first], shape)
            self.sizes[first] = sum(math.prod(stack.shapes[n]) for n in group)

    def start(self, rows: Tensor) -> None:
        """Begin a call."""
        self.rows = torch.where(rows < 0, self.stack.slots, rows)
        self.shrunk = self.groups = None
        if self.stack.trainable:
            # One split has one backward; a slice for each piece would have as many, each full-size.
            order = sorted(self.sizes, key=self.stack.places.__getitem__)
            parts = torch.split(self.stack.values, [self.sizes[n] for n in order], 1)
            self.pieces = dict(zip(order, parts, strict=True))

    def piece(self, first: str) -> Tensor:
        """[n, size]: a piece of the delta of each row.

        Gathered where it is used and not kept: a block of memory that is still in the cache is
        written several times faster than a new one.
        """
        whole = self.pieces.get(first)
        if whole is None:
            stack = self.stack
            whole = stack.values.narrow(1, stack.places[first], self.sizes[first])
        return whole.index_select(0, self.rows)

    def of_rows(self, name: str) -> Tensor:
        """[n, ...]: a tensor of the delta of each row; A [n, r, in], B [n, r, out]."""
        first, at, shape = self.where[name]
        return torch.unflatten(self.piece(first).narrow(1, at, math.prod(shape)), 1, shape)

    def grouped(self) -> list[tuple[int, Tensor]]:
        """(slot, indices of its rows) for each slot in the batch."""
        if transformed():
            raise DeltaError(
                "a batch of masks, or of deltas over something else than Linear layers, is "
                "computed delta by delta, and how many there are is known only when it runs: such "
                "a stack cannot be captured or compiled"
            )
        if self.groups is None:
            slots = torch.unique(self.rows).tolist()
            self.groups = [(s, torch.nonzero(self.rows == s)[:, 0]) for s in slots]
        return self.groups

    def end(self) -> None:
        """Let go of the call's tensors."""
        self.rows = self.rows[:0]
        self.shrunk = self.groups = None
        self.pieces = {}


# --- Linear: grouped products ----------------------------------------------------------------


def by_rows(twin: nn.Module, *, site: str, parts: frozenset[str], call: Call) -> nn.Module:
    """Turn a private copy of a Linear into one that computes all rows at once, by grouped products.

    Args:
        twin: The copy.
        site: Its name.
        parts: What the stack's deltas have there: "A", "gain_out", "full.weight", ...
        call: Of the shadow it is in.
    """
    twin.__dict__.update(call=call, site=site, parts=parts, plain=type(twin))
    twin.__dict__["dot"] = f"{site}." if site else ""
    twin.__class__ = _rows_class(cast(Any, type(twin)))
    return twin


@cache
def _rows_class(cls: Any) -> type[nn.Module]:
    inside: dict[str, Any] = {"forward": _rows_linear, "weight": property(_refuse)}
    return type(f"Rows{cls.__name__}", (cls,), inside)


def _refuse(module: Any) -> Tensor:
    raise DeltaError(
        f"a module reads the weight of {module.site!r} instead of calling it, and in this batch "
        "every row has another one; apply these deltas one by one"
    )


def _rows_linear(module: Any, input: Tensor) -> Tensor:
    call: Call = module.call
    parts, dot = module.parts, module.dot
    if len(input) != len(call.rows) or input.dim() < 2:
        raise _other_batch(call, module.site, input)
    x = input if input.dim() == 3 else input.reshape(len(input), -1, input.shape[-1])
    scaled = x * call.of_rows(f"{dot}gain_in")[:, None] if "gain_in" in parts else x
    weight, bias = base_parameter(module, "weight"), base_parameter(module, "bias")
    assert weight is not None
    scale = call.stack.scales.get(module.site, 1.0)
    lowrank = "A" in parts
    if "full.weight" in parts or "full.bias" in parts:
        output = _own_weights(call, dot, parts, scaled, weight, bias)
    elif lowrank and transformed() and not parts & {"gain_in", "gain_out"}:
        A, B = call.of_rows(f"{dot}A"), call.of_rows(f"{dot}B")
        output, lowrank = T.delta_apply(x, weight, bias, A, B.mT, scale), False
    else:
        output = F.linear(scaled, weight, bias)
    if "gain_out" in parts:
        output = output * call.of_rows(f"{dot}gain_out")[:, None]
    if lowrank:
        B = call.of_rows(f"{dot}B")
        # In place: the sum is then made where the product already is.
        output.baddbmm_(_shrink(call, f"{dot}A", input, x), B, alpha=scale)
    return output.reshape(*input.shape[:-1], output.shape[-1])


def _other_batch(call: Call, site: str, given: Tensor) -> InputError:
    return InputError(
        f"rows= has {len(call.rows)} rows, and {site!r} got an input {tuple(given.shape)}: rows= "
        "needs one entry a row, and the model's batch must be the first dimension there"
    )


def _own_weights(
    call: Call, dot: str, parts: frozenset[str], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """A linear layer whose weight or bias every row has for itself: a head."""
    if "full.weight" in parts:
        output = torch.bmm(x, call.of_rows(f"{dot}weight.full").mT)
    else:
        output = F.linear(x, weight)
    if "full.bias" in parts:
        return output + call.of_rows(f"{dot}bias.full")[:, None]
    return output if bias is None else output + bias


def _shrink(call: Call, name: str, input: Tensor, x: Tensor) -> Tensor:
    """``x A^T`` [n, s, r]; computed once for siblings that are called with the same tensor."""
    first, at, (rank, wide) = call.where[name]
    if call.shrunk is None or call.shrunk[0] != first or call.shrunk[1] is not input:
        A = torch.unflatten(call.piece(first), 1, (-1, wide))
        call.shrunk = (first, input, torch.bmm(x, A.mT))
    return call.shrunk[2].narrow(2, at // wide, rank)


# --- everything else: the rows of each delta in turn -------------------------------------------


def by_segments(twin: nn.Module, *, site: str, call: Call) -> nn.Module:
    """Turn a private copy of any module into one that runs the rows of each delta in turn."""
    twin.__dict__.update(call=call, site=site, alone=bare_copy(twin), under={})
    if isinstance(twin, nn.MultiheadAttention):
        twin.__dict__["_qkv_same_embed_dim"] = False  # keeps PyTorch's fused layers off this one
    twin.__class__ = _segments_class(cast(Any, type(twin)))
    return twin


@cache
def _segments_class(cls: Any) -> type[nn.Module]:
    return type(f"Segments{cls.__name__}", (cls,), {"forward": _segments})


def _segments(module: Any, *args: Any, **kwargs: Any) -> Any:
    call: Call = module.call
    batch = 1 if isinstance(module, nn.MultiheadAttention) and not module.batch_first else 0
    given = [*args, *kwargs.values()][0]
    if given.dim() <= batch or given.shape[batch] != len(call.rows):
        raise _other_batch(call, module.site, given)
    outputs, order = [], []
    for slot, index in call.grouped():
        take = partial(_take, index=index, n=len(call.rows), dim=batch)
        own, named = map(take, args), {name: take(a) for name, a in kwargs.items()}
        outputs.append(_under(module, call.stack, slot)(*own, **named))
        order.append(index)
    back = torch.argsort(torch.cat(order))
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs, batch).index_select(batch, back)
    return tuple(  # attention: the output and, batch first, the weights
        None if parts[0] is None else torch.cat(parts, dim).index_select(dim, back)
        for dim, parts in zip((batch, 0), zip(*outputs, strict=True), strict=True)
    )


def _under(module: Any, stack: Stack, slot: int) -> nn.Module:
    """The module, and what is in it, under the delta that is in `slot` now."""
    delta = stack.deltas[slot] if slot < stack.slots else None
    alone: nn.Module = module.__dict__["alone"]
    if delta is None:
        return alone
    known: dict[int, tuple[Delta, nn.Module]] = module.under
    found = known.get(id(delta))
    if found is None:
        terms: dict[str, Terms] = {}
        for name in delta.tensors:
            inner = inside(owner(name), module.site)
            if inner is not None and split(name)[1] not in ("prefix", "prompt"):
                part = alone.get_submodule(inner)
                add_term(terms.setdefault(inner, Terms()), part, name, delta, 1.0)
        if len(known) > 2 * stack.slots:
            known.clear()
        seats: Seats = {inner: [partial(overlaid, terms=t)] for inner, t in terms.items()}
        if "prefix" in delta.tensors and module.site in delta.info.get("sites", ()):
            layer = delta.info["sites"].index(module.site)
            seat = partial(conditioned, virtual=Tokens([(delta, 1.0)]), layer=layer)
            seats.setdefault("", []).append(seat)
        found = known[id(delta)] = (delta, shadow_tree(alone, seats))
    return found[1]


def inside(name: str, site: str) -> str | None:
    """`name` as seen from `site`, "" for itself; None where it is not in there.

    Example:
        >>> inside("layer.attn.out_proj", "layer.attn"), inside("layer.fc", "layer.attn")
        ('out_proj', None)
    """
    if name == site:
        return ""
    start = f"{site}." if site else ""
    return name.removeprefix(start) if name.startswith(start) else None


def _take(value: Any, *, index: Tensor, n: int, dim: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == n:
        return value.index_select(dim, index)
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == n:
        return value.index_select(0, index)  # a padding mask has its batch in front
    return value

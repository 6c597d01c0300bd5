"""Which labels a Fisher is an expectation over, and the blocks of examples it is summed in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tessera import random
from tessera.errors import AnchorError, InputError

__all__ = ["blocks", "cotangents", "resolve"]

MAX_EXACT_CLASSES = 32


def resolve(estimator: str, z: Tensor) -> str:
    """The estimator that "auto" stands for, given one block of logits."""
    if z.dim() < 2 or z.shape[-1] < 2 or not z.is_floating_point():
        raise AnchorError(
            "arch.anchor_from needs logits [n, C] with C >= 2 classes, and the model gave "
            f"{tuple(z.shape)} {z.dtype}. Map its output with logits=, e.g. "
            "logits=lambda out: torch.cat([-out, out], -1) / 2 for one binary logit"
        )
    if estimator == "auto":
        return "exact" if z.dim() == 2 and z.shape[1] <= MAX_EXACT_CLASSES else "sampled"
    if estimator == "exact" and z.dim() != 2:
        raise AnchorError(
            f'arch.anchor_from: estimator="exact" needs logits [n, C], got {tuple(z.shape)}; '
            'for sequences of labels use estimator="sampled"'
        )
    return estimator


def cotangents(
    estimator: str, z: Tensor, y: Tensor | None, first: int, seed: int
) -> Iterator[Tensor]:
    """Gradients of ``log p(y|x)`` at the logits; their squares summed are one block's Fisher.

    Args:
        estimator: "exact", "sampled" or "empirical".
        z: Logits [n, ..., C], detached.
        y: Labels [n, ...] for "empirical".
        first: Position of the block's first example, which keys the sampled labels.
        seed: Of the sampled labels.
    """
    p = torch.softmax(z if z.dtype == torch.float64 else z.float(), -1)
    if not bool(torch.isfinite(p).all()):
        raise InputError(
            f"arch.anchor_from: the model's logits for examples {first} .. "
            f"{first + len(z) - 1} are not finite"
        )
    if estimator == "exact":
        for c in range(z.shape[1]):
            if bool((p[:, c] > 0).any()):
                v = -p
                v[:, c] += 1
                yield (p[:, c : c + 1].sqrt() * v).to(z.dtype)
        return
    labels = _sampled(p, first, seed) if estimator == "sampled" else _given(z, y)
    v = -p
    v.scatter_add_(-1, labels.unsqueeze(-1), torch.ones_like(p[..., :1]))
    yield v.to(z.dtype)


def _sampled(p: Tensor, first: int, seed: int) -> Tensor:
    """One label from p for each example (and position), whatever block it is in."""
    width = p[0].numel() // p.shape[-1]
    raw = random.bits(random.key(seed, "fisher"), first * width, len(p) * width)
    u = torch.from_numpy((raw >> 11).astype("float64") * 2.0**-53).reshape(p.shape[:-1])
    below = p.double().cumsum(-1) <= u.to(p.device).unsqueeze(-1)
    return below.sum(-1).clamp_(max=p.shape[-1] - 1)


def _given(z: Tensor, y: Tensor | None) -> Tensor:
    if y is None or y.shape != z.shape[:-1] or y.dtype != torch.int64:
        got = "no y" if y is None else f"y {tuple(y.shape)} {y.dtype}"
        raise InputError(
            'arch.anchor_from: estimator="empirical" needs int64 labels '
            f"{tuple(z.shape[:-1])} beside the inputs, got {got}"
        )
    if bool((y < 0).any()) or bool((y >= z.shape[-1]).any()):
        raise InputError(
            f"arch.anchor_from: labels span {int(y.min())} .. {int(y.max())}, the model has "
            f"{z.shape[-1]} classes"
        )
    return y.to(z.device)


def blocks(
    data: Iterable[Any], samples: int | None, size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The examples in blocks of exactly `size` (the last may be smaller), however they came.

    Equal blocks make the Fisher bit-identical for every batch size of `data`. Only where the
    examples' shape changes is a block cut short.
    """
    if isinstance(data, Tensor) or hasattr(data, "_fields"):
        raise InputError(
            f"arch.anchor_from: data is one {type(data).__name__}, not batches; pass data=[batch]"
        )
    held: list[tuple[Tensor, Tensor | None]] = []
    count, left = 0, samples
    for x, y in map(_pair, data, itertools.count()):
        if left is not None:
            x, y = x[:left], y[:left] if y is not None else None
            left -= len(x)
        changed = held and (
            x.shape[1:] != held[0][0].shape[1:] or (y is None) != (held[0][1] is None)
        )
        if changed:
            yield _join(held)
            held, count = [], 0
        while count + len(x) >= size:
            cut = size - count
            yield _join([*held, (x[:cut], y[:cut] if y is not None else None)])
            x, y = x[cut:], y[cut:] if y is not None else None
            held, count = [], 0
        if len(x):
            held.append((x, y))
            count += len(x)
        if left == 0:
            break
    if held:
        yield _join(held)


def _pair(batch: Any, index: int) -> tuple[Tensor, Tensor | None]:
    items = batch if isinstance(batch, tuple | list) else (batch,)
    x = items[0] if items else None
    y = items[1] if len(items) > 1 else None
    if not isinstance(x, Tensor) or x.dim() == 0 or not isinstance(y, Tensor | None):
        raise InputError(
            f"arch.anchor_from: batch {index} of data is {type(batch).__name__} of "
            f"{[type(i).__name__ for i in items][:3]}; give (x, y) pairs of tensors, or x alone"
        )
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise InputError(f"arch.anchor_from: batch {index} of data holds NaN or Inf in x")
    if y is not None and len(y) != len(x):
        raise InputError(f"arch.anchor_from: batch {index} has {len(x)} inputs, {len(y)} labels")
    return x, y


def _join(held: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    ys = [y for _, y in held if y is not None]
    x = torch.cat([x for x, _ in held]) if len(held) > 1 else held[0][0]
    return x, torch.cat(ys) if ys else None

"""Sums of deltas as one delta: weighted, or with the conflicts between them resolved (TIES)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tessera.arch import Delta
from tessera.errors import DeltaError, InputError

__all__ = ["ties", "weighted_sum"]

Weighted = list[tuple[Delta, float]]


def weighted_sum(
    deltas: Sequence[Delta], weights: Sequence[float], *, rank: int | None = None
) -> Delta:
    """One delta whose change of every weight is ``sum w_i change_i``.

    - "lora": ranks are laid end to end, ``A = [A_1; A_2; ..]``, ``B = [w_1 s_1 B_1, ..]``: the
      sum to rounding, not an average of factors. Above the layer's own rank, or `rank`, it is cut
      to the best approximation (Eckart & Young).
    - "ia3": ``l = 1 + sum w_i (l_i - 1)``.
    - "mask": ``sum w_i values_i`` where any of them changes a weight.
    - ``<parameter>.full``: ``sum w_i full_i``, where the weights add up to 1 and all have it.

    Equal to ``peft.apply(model, deltas, weights=weights)``, at the cost of one delta. Deltas of
    weight 0 are left out; the order does not matter, to the last bit.

    Args:
        deltas: At least one, of one kind and one base.
        weights: One for each, finite.
        rank: "lora" only: at most this rank at every site; None: as many as the sum needs.

    Returns:
        A trainable delta.

    Raises:
        DeltaError: Deltas of different kinds or bases or shapes; prefixes or prompts, which are
            read in order by attention, so that no sum of them is what both do.
        InputError: The number of weights is not that of the deltas, all are 0, or one is not
            finite; `rank` out of range, or not for "lora"; heads with weights that do not sum to 1.

    Source:
        Ilharco et al. 2023, "Editing models with task arithmetic" (arXiv:2212.04089).

    Example:
        >>> def delta(a, b):
        ...     tensors = {"0.A": torch.tensor([[a, 0.0]]), "0.B": torch.tensor([[b], [0.0]])}
        ...     return Delta(kind="lora", tensors=tensors, scales={"0": 2.0})
        >>> both = weighted_sum([delta(1.0, 1.0), delta(3.0, 1.0)], [0.5, 1.0])
        >>> (both.tensors["0.B"] @ both.tensors["0.A"] * both.scales["0"]).tolist()
        [[7.0, 0.0], [0.0, 0.0]]
    """
    who = "peft.weighted_sum"
    several = _checked(deltas, weights, who)
    kind = several[0][0].kind
    if rank is not None:
        _require_rank(rank, kind, who)
    tensors = _heads(several, who)
    scales: dict[str, float] = {}
    if kind == "lora":
        for site in _sites(several, "A"):
            A, B, scales[site] = _laid_end_to_end(several, site)
            tensors[_at(site, "A")], tensors[_at(site, "B")] = _cut(A, B, rank)
    elif kind == "ia3":
        for name in _names(several, ("gain_in", "gain_out")):
            changes = [w * (d.tensors[name].double() - 1) for d, w in several if name in d.tensors]
            tensors[name] = (1 + _total(changes)).to(_dtype(several, name))
    else:
        for parameter in _sites(several, "values"):
            here = [(d, w) for d, w in several if _at(parameter, "values") in d.tensors]
            change = _total([w * _dense(d, parameter) for d, w in here])
            _put_values(tensors, several, parameter, change)
    return _made(several, tensors, scales)


def ties(
    deltas: Sequence[Delta],
    weights: Sequence[float] | None = None,
    *,
    density: float = 0.2,
    rank: int | None = None,
) -> Delta:
    """One delta of several, with their conflicts resolved: trim, elect a sign, average who agrees.

    Of the changes ``tau_i`` of all weights together: keep of each the `density` largest in
    magnitude; elect for each weight the sign of ``sum_i tau_i``; and average the ``w_i tau_i`` of
    the deltas that kept it with that sign. Deltas of weight 0 are left out.

    For "lora" the change is ``scale B A``, not A and B by themselves: these are no change of
    anything, (c A, B / c) being the same adapter. The result is brought back to `rank` by a
    singular value decomposition, which is an approximation; with a `rank` as large as the layer's
    it is exact. PEFT calls this "ties_svd", and trims every module by itself; here, as in the
    paper, `density` is over all modules of a delta.

    Args:
        deltas: At least one, of one kind ("lora", "ia3", "mask") and one base.
        weights: One for each, finite; None: all 1.
        density: How much of each delta is kept, in (0, 1].
        rank: "lora" only, of the result; None: the largest among the deltas at that site.

    Returns:
        A trainable delta. The order of the deltas does not matter, to the last bit.

    Raises:
        DeltaError: As for `weighted_sum`; also for heads (``<parameter>.full``), whose change only
            the base could tell.
        InputError: As for `weighted_sum`; or `density` is out of range.

    Source:
        Yadav et al. 2023, "TIES-Merging", section 3 (arXiv:2306.01708); its scale lambda is a
        common factor of `weights`.

    Example:
        >>> def delta(*gains):
        ...     return Delta(kind="ia3", tensors={"0.gain_out": 1 + torch.tensor(gains)})
        >>> both = ties([delta(0.5, -0.5, 0.1), delta(0.25, 1.0, -0.2)], density=2 / 3)
        >>> [round(l, 4) for l in both.tensors["0.gain_out"].tolist()]
        [1.375, 2.0, 1.0]
    """
    who = "peft.ties"
    shares = [1.0] * len(deltas) if weights is None else weights
    several = _checked(deltas, shares, who)
    kind = several[0][0].kind
    if not isinstance(density, int | float) or not 0 < density <= 1:
        raise InputError(f"{who} needs a density in (0, 1], got {density!r}")
    if rank is not None:
        _require_rank(rank, kind, who)
    heads = [n for d, _ in several for n in d.tensors if n.endswith(".full")]
    if heads:
        raise DeltaError(
            f"{who}: {heads[0]!r} replaces a parameter; how it differs from the base's, a delta "
            "does not say. Merge the deltas without their heads"
        )
    changes = [(_trimmed(_changes(d), float(density)), w) for d, w in several]
    merged = {}
    for name in sorted({name for change, _ in changes for name in change}):
        merged[name] = _agreed([(c[name], w) for c, w in changes if name in c])
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for name, change in merged.items():
        if kind == "lora":
            most = max(len(d.tensors[_at(name, "A")]) for d, _ in several if name in d.scales)
            tensors[_at(name, "A")], tensors[_at(name, "B")] = _factored(
                change, several, name, rank or most
            )
            scales[name] = 1.0
        elif kind == "ia3":
            tensors[name] = (1 + change).to(_dtype(several, name))
        else:
            _put_values(tensors, several, name, change)
    return _made(several, tensors, scales)


def _checked(deltas: Sequence[Delta], weights: Sequence[float], who: str) -> Weighted:
    """The deltas that count, with their weights, in an order of their own."""
    deltas = list(deltas)
    if not deltas or not all(isinstance(d, Delta) for d in deltas):
        raise InputError(f"{who} needs at least one arch.Delta, got {deltas!r:.80}")
    shares = [float(w) for w in weights]
    if len(shares) != len(deltas):
        raise InputError(f"{who} got {len(deltas)} deltas and {len(shares)} weights")
    if not all(map(math.isfinite, shares)) or not any(shares):
        raise InputError(f"{who} needs finite weights, not all 0, got {shares}")
    first = deltas[0]
    for d in deltas:
        if d.kind in ("prefix", "prompt"):
            raise DeltaError(
                f"{who}: {d!r} is virtual tokens, which attention reads one by one: a sum of two "
                "does what neither does. Lay them end to end: peft.apply(model, [a, b])"
            )
        if d.kind != first.kind:
            raise DeltaError(f"{who} needs deltas of one kind, got {first!r} and {d!r}")
        if d.base_hash != first.base_hash:
            raise DeltaError(
                f"{who} needs deltas of one base, got {first!r} of {first.base_hash[:12]!r} and "
                f"{d!r} of {d.base_hash[:12]!r}; delta.of(model) says which base it is for"
            )
    # Sums in floating point depend on their order: theirs is told by the content.
    several = [(d, w) for d, w in zip(deltas, shares, strict=True) if w]
    several.sort(key=lambda pair: (pair[0].hash, pair[1]))
    _require_shapes(several, who)
    return several


def _require_shapes(several: Weighted, who: str) -> None:
    seen: dict[str, torch.Size] = {}
    for d, _ in several:
        for name, tensor in d.tensors.items():
            part = name.rpartition(".")[2]
            if part == "values" and f"{name.removesuffix('values')}mask" in d.tensors:
                name, tensor = name, d.tensors[f"{name.removesuffix('values')}mask"]
            elif part == "mask":
                continue
            shape = tensor.shape[1:] if part == "A" else tensor.shape
            shape = tensor.shape[:1] if part == "B" else shape
            if seen.setdefault(name, shape) != shape:
                raise DeltaError(
                    f"{who}: {name!r} has shape {tuple(shape)} in {d!r} and "
                    f"{tuple(seen[name])} in another; these are deltas of different models"
                )


def _require_rank(rank: object, kind: str, who: str) -> None:
    if kind != "lora":
        raise InputError(f"{who}: only a lora delta has a rank=, these are {kind}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"{who} needs a whole rank >= 1, got {rank!r}")


def _at(site: str, part: str) -> str:
    """The name of a tensor; the site of the model itself is ""."""
    return f"{site}.{part}" if site else part


def _names(several: Weighted, parts: tuple[str, ...]) -> list[str]:
    found = {n for d, _ in several for n in d.tensors if n.rpartition(".")[2] in parts}
    return sorted(found)


def _sites(several: Weighted, part: str) -> list[str]:
    return [name.rpartition(".")[0] for name in _names(several, (part,))]


def _dtype(several: Weighted, name: str) -> torch.dtype:
    found = [d.tensors[name].dtype for d, _ in several if name in d.tensors]
    dtype = found[0]
    for other in found[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _total(changes: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(changes)).sum(0)


def _heads(several: Weighted, who: str) -> dict[str, Tensor]:
    """``sum w full``: with weights of sum 1, the base, ``(1 - sum w) theta``, drops out."""
    names = _names(several, ("full",))
    if not names:
        return {}
    total = math.fsum(w for _, w in several)
    if abs(total - 1) > 1e-9:
        raise InputError(
            f"{who}: {names[0]!r} replaces a parameter, so that the weights must add up to 1 (else "
            f"the base's own counts, which a delta does not hold); they add up to {total:g}"
        )
    out = {}
    for name in names:
        if not all(name in d.tensors for d, _ in several):
            raise DeltaError(f"{who}: {name!r} replaces a parameter in some of the deltas only")
        total_ = _total([w * d.tensors[name].detach().double() for d, w in several])
        out[name] = total_.to(_dtype(several, name))
    return out


def _laid_end_to_end(several: Weighted, site: str) -> tuple[Tensor, Tensor, float]:
    """A, B and scale; with one scale for all it stays, and a delta of weight 1 keeps its bits."""
    pairs = [(d, w) for d, w in several if site in d.scales]
    dtype, scales = _dtype(several, _at(site, "A")), {d.scales[site] for d, _ in pairs}
    scale = scales.pop() if len(scales) == 1 else 1.0
    A = torch.cat([d.tensors[_at(site, "A")].detach().to(dtype) for d, _ in pairs])
    factors = []
    for d, w in pairs:
        factor = w if scale == d.scales[site] else w * d.scales[site] / scale
        factors.append(factor * d.tensors[_at(site, "B")].detach().double())
    return A, torch.cat(factors, 1).to(dtype), scale


def _cut(A: Tensor, B: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """B A of at most `rank`, and at most the layer's: untouched where it is that already."""
    wide, out = A[0].numel(), len(B)
    most = min(wide, out, rank or wide)
    if len(A) <= most:
        return A, B
    # The product of triangles of the ranks' size has the singular values of B A.
    Q_out, R_out = torch.linalg.qr(B.flatten(1).double())
    Q_in, R_in = torch.linalg.qr(A.flatten(1).double().T)
    U, S, V = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
    return _shaped(Q_out @ U, S, V @ Q_in.T, most, A, B)


def _factored(change: Tensor, several: Weighted, site: str, rank: int) -> tuple[Tensor, Tensor]:
    """The best A and B of `rank` for a change [out, in * window]."""
    like = next(d for d, _ in several if site in d.scales)
    U, S, V = torch.linalg.svd(change, full_matrices=False)
    A, B = like.tensors[_at(site, "A")], like.tensors[_at(site, "B")]
    A, B = A.to(_dtype(several, _at(site, "A"))), B.to(_dtype(several, _at(site, "B")))
    return _shaped(U, S, V, min(rank, len(S)), A, B)


def _shaped(
    U: Tensor, S: Tensor, V: Tensor, rank: int, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of ``U S V`` cut to `rank`, shaped and typed as A and B are, with signs fixed."""
    U, S, V = U[:, :rank], S[:rank], V[:rank]
    # A decomposition leaves the sign of each pair open: the largest entry of V is positive.
    sign = V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
    root = S.sqrt()
    left, right = U * (root * sign[:, 0]), V * (root[:, None] * sign)
    B_shape = (len(B), rank, *B.shape[2:])
    return right.reshape(rank, *A.shape[1:]).to(A.dtype), left.reshape(B_shape).to(B.dtype)


def _changes(delta: Delta) -> dict[str, Tensor]:
    """Site or tensor or parameter -> the change it stands for, float64."""
    found = {}
    for name, tensor in delta.tensors.items():
        owner, _, part = name.rpartition(".")
        value = tensor.detach().double()
        if part == "A":
            B = delta.tensors[_at(owner, "B")].detach().double()
            found[owner] = delta.scales[owner] * (B.flatten(1) @ value.flatten(1))
        elif part in ("gain_in", "gain_out"):
            found[name] = value - 1
        elif part == "values":
            found[owner] = _dense(delta, owner)
    return found


def _trimmed(changes: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """The changes, 0 but for the `density` largest of all of them together."""
    sizes = torch.cat([change.abs().flatten() for _, change in sorted(changes.items())])
    kept = max(1, int(density * len(sizes) + 1e-9))
    if kept >= len(sizes):
        return dict(changes)
    # Of equals at the border the first by name and place stay, so that exactly `kept` do.
    order = torch.sort(sizes, descending=True, stable=True).indices[:kept]
    stays = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    stays[order] = True
    out, start = {}, 0
    for name, change in sorted(changes.items()):
        here = stays[start : start + change.numel()].reshape(change.shape)
        out[name], start = change * here, start + change.numel()
    return out


def _agreed(changes: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The mean, over those of the elected sign, of what each says times its weight."""
    stacked = torch.stack([change for change, _ in changes])
    elected = stacked.sum(0).sign()
    # With no majority, a tie of two opposites, nobody agrees: no change.
    agree = (stacked.sign() == elected) & (stacked != 0)
    weights = torch.tensor([w for _, w in changes], dtype=stacked.dtype, device=stacked.device)
    total = (stacked * agree * weights.reshape(-1, *(1,) * (stacked.dim() - 1))).sum(0)
    return total / agree.sum(0).clamp(min=1)


def _dense(delta: Delta, parameter: str) -> Tensor:
    """The values of a mask in the parameter's shape, float64, 0 elsewhere."""
    values = delta.tensors[_at(parameter, "values")].detach().double()
    mask = delta.tensors.get(_at(parameter, "mask"))
    if mask is None:
        return values
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
        mask, values
    )


def _put_values(
    tensors: dict[str, Tensor], several: Weighted, parameter: str, change: Tensor
) -> None:
    """Enter a mask delta's values; packed, with the union of the masks, where all have one."""
    here = [d for d, _ in several if _at(parameter, "values") in d.tensors]
    change = change.to(_dtype(several, _at(parameter, "values")))
    masks = [d.tensors.get(_at(parameter, "mask")) for d in here]
    if any(mask is None for mask in masks):
        tensors[_at(parameter, "values")] = change
        return
    union = torch.stack([m for m in masks if m is not None]).any(0)
    tensors[_at(parameter, "values")], tensors[_at(parameter, "mask")] = change[union], union


def _made(several: Weighted, tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> Delta:
    first = several[0][0]
    shared = {
        key: value
        for key, value in first.info.items()
        if all(key in d.info and d.info[key] == value for d, _ in several)
    }
    types: dict[str, Any] = {}
    for d, _ in several:
        said = d.info.get("layer_types")
        types.update(said if isinstance(said, dict) else {})
    if types:
        shared["layer_types"] = types
    return Delta(
        kind=first.kind,
        tensors={n: t.requires_grad_(t.is_floating_point()) for n, t in tensors.items()},
        scales=scales,
        base_hash=first.base_hash,
        info=shared,
        _home=list(first._home),
    )

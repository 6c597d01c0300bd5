"""Orthogonal gradients: no step may change what a layer does to the inputs of past tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import AnchorError, InputError, unknown_name
from tessera.graph import Transform
from tessera.ops import kernels

__all__ = ["ogd"]

SAMPLES = 4096  # examples of a task looked at, at most, spread evenly over its data
_ROWS = 1024  # inputs of a layer taken from one block of examples, at most


def ogd(project: str = "orthogonal", *, rank: int = 24, threshold: float = 0.95) -> Transform:
    """Keep every step away from what past tasks use: ``dW -= (dW M) M^T``.

    Each layer has an orthonormal basis M of the inputs it met in past tasks. After the optimizer
    has stepped, the part of its *update* (not of the gradient, which Adam and momentum would turn
    back) that acts on M is taken out, so the layer's answer to every input in the span of M stays
    what it was. An anchor with data, ``arch.anchor_from(model, "task1", data=batches)``, closes a
    task: what its inputs add to M is found by a forward on a private copy, in eval mode.

    A rule exists for `nn.Linear` and, over its patches, for `nn.Conv2d` without groups. The input
    of a layer with a bias is ``[a, 1]``: weight and bias are projected together, and a frozen one
    of the two stays frozen. All other parameters (norms, embeddings, other and derived layers) are
    free; a network that has them is protected layer by layer, not as a whole.

    The bases take about ``rank / out_features`` of a layer's size; while a step is at work there
    is also a copy of the protected weights. A multiple of 8 is the fastest `rank`. Before the first
    anchor nothing is done at all.

    Args:
        project: "orthogonal", the only way there is.
        rank: Directions kept of one layer, >= 1, over all tasks. Where the tasks need more, those
            with the least energy, every task counting alike, are given up.
        threshold: Share in (0, 1] of the energy of a task's inputs (their summed squares) that M
            should hold. Directions are added until it does.

    Returns:
        A transform for ``tg.Adam(..., plugin=...)`` or ``tg.SGD(..., plugin=...)``. Keep it when a
        new optimizer is built for the next task, so that past tasks stay protected.

    Raises:
        InputError: `rank` or `threshold` is out of range; `project` is unknown.
        AnchorError: When an anchor is taken: it has no data, or an input is not finite.

    Source:
        Saha, Garg & Roy 2021 (arXiv:2103.09762); Farajtabar et al. 2020 (arXiv:1910.07104).

    Example:
        >>> from tessera import arch, graph as tg
        >>> model, seen = nn.Linear(2, 1), torch.tensor([[1.0, 0.0]])
        >>> optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=ogd())
        >>> before = model(seen)
        >>> _ = arch.anchor_from(model, "task1", fisher=None, data=[seen])
        >>> model(torch.tensor([[1.0, 1.0]])).sum().backward()  # wants all weights to move
        >>> optimizer.step()
        >>> torch.allclose(model(seen), before)
        True
    """
    if project != "orthogonal":
        raise unknown_name("project", project, ["orthogonal"])
    if rank < 1:
        raise InputError(f"opt.ogd needs rank >= 1, got {rank}")
    if not 0 < threshold <= 1:
        raise InputError(f"opt.ogd needs threshold in (0, 1], got {threshold}")
    return _OGD(rank, threshold)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Basis:
    """What is protected of one layer.

    Attributes:
        bias: Position of the layer's bias among the optimizer's parameters; -1 for none.
        directions: Orthonormal columns [in, r], or [in + 1, r] for a layer with a bias; the rows
            lie a multiple of 8 floats apart, with zeros between, as `kernels.project` wants them.
        energies: [r], the share of the tasks' inputs along each, summed over tasks.
    """

    bias: int
    directions: Tensor
    energies: Tensor


@final
class _OGD(Transform):
    wants_data = True

    def __init__(self, rank: int, threshold: float) -> None:
        self._rank = rank
        self._threshold = threshold
        self._bases: dict[int, _Basis] = {}  # by the position of the layer's weight
        self._next: dict[int, _Basis] = {}
        self._before: dict[int, Tensor] = {}

    def attach(self, params: Sequence[nn.Parameter]) -> None:
        moved = self.params and [id(p) for p in self.params] != [id(p) for p in params]
        if moved or not _fit(self._bases, params):
            raise AnchorError(
                "this opt.ogd already protects what other parameters do; make a new one for "
                "another model"
            )
        self.params = params
        self._bases = {i: _like(b, params[i]) for i, b in self._bases.items()}

    def before_anchor(
        self, model: nn.Module, names: Mapping[int, str], inputs: Iterable[Tensor] | None
    ) -> None:
        if inputs is None:
            raise AnchorError(
                "opt.ogd learns what to protect from the inputs of the task just learned; pass its "
                "batches: arch.anchor_from(model, name, data=batches), with fisher=None if the "
                "anchor needs no Fisher"
            )
        layers = self._layers(model, names)
        self._next = dict(self._bases)
        for i, gram in _grams(model, {m: w for m, (w, _) in layers.items()}, inputs).items():
            if not bool(torch.isfinite(gram).all()):
                name = names[id(self.params[i])]
                raise AnchorError(f"opt.ogd: the inputs of {name!r} hold NaN or Inf on the data")
            bias = next(b for w, b in layers.values() if w == i)
            grown = _grown(self._bases.get(i), gram, bias, (self._rank, self._threshold))
            self._next[i] = _like(grown, self.params[i])

    def on_anchor(self, names: Mapping[int, str]) -> dict[str, Any]:
        self._bases, self._next = _for_good(self._next), {}
        return {}

    def _layers(
        self, model: nn.Module, names: Mapping[int, str]
    ) -> dict[nn.Module, tuple[int, int]]:
        """Layers with a rule -> the positions of their weight and bias in the optimizer."""
        positions = {names[id(p)]: i for i, p in enumerate(self.params) if id(p) in names}
        named = {id(p): n for n, p in model.named_parameters()}
        found: dict[nn.Module, tuple[int, int]] = {}
        biases: dict[int, Tensor | None] = {}
        for m in model.modules():
            ruled = type(m) is nn.Linear or (type(m) is nn.Conv2d and m.groups == 1)
            if not ruled or named.get(id(m.weight)) not in positions:
                continue
            assert isinstance(m, nn.Linear | nn.Conv2d)
            weight = positions[named[id(m.weight)]]
            if biases.setdefault(weight, m.bias) is not m.bias:
                raise AnchorError(
                    f"opt.ogd: two layers share the weight {named[id(m.weight)]!r} and not the "
                    "bias, so their inputs have no common basis; share both, or neither"
                )
            bias = positions.get(named[id(m.bias)], -1) if m.bias is not None else -1
            found[m] = weight, bias
        return found

    def before_step(self) -> None:
        both = [i for w, basis in self._bases.items() for i in (w, basis.bias) if i >= 0]
        # Copies: on a CPU a detached tensor is the weight itself and would move with it.
        self._before = {i: self.params[i].detach().clone() for i in dict.fromkeys(both)}

    @torch.no_grad()
    def after_step(self) -> None:
        before, self._before = self._before, {}
        pairs = {i: (p, b) for i, b in before.items() if (p := self.params[i]).requires_grad}
        for i, basis in self._bases.items():
            if before:
                _project(pairs.get(i), pairs.get(basis.bias), basis)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weight": list(self._bases),
            "bias": [b.bias for b in self._bases.values()],
            "directions": [b.directions for b in self._bases.values()],
            "energies": [b.energies for b in self._bases.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        columns = (state["weight"], state["bias"], state["directions"], state["energies"])
        saved = {
            w: _Basis(bias=b, directions=m.detach().clone(), energies=e.detach().clone())
            for w, b, m, e in zip(*columns, strict=True)
        }
        if self.params:
            if not _fit(saved, self.params):
                raise InputError("opt.ogd: the saved state is of parameters of other shapes")
            saved = {i: _like(b, self.params[i]) for i, b in saved.items()}
        self._bases = _for_good(saved)


def _for_good(bases: dict[int, _Basis]) -> dict[int, _Basis]:
    """The same; from now on every step is projected in one way, so that bits can be compared."""
    if bases:
        kernels.available(wait_s=60)
    return bases


def _fit(bases: Mapping[int, _Basis], params: Sequence[nn.Parameter]) -> bool:
    """Whether each basis is of as many inputs as the weight at its place has."""
    return all(
        max(i, b.bias) < len(params)
        and params[i].dim() > 1
        and len(b.directions) - params[i][0].numel() in (0, 1)
        and (b.bias < 0 or params[b.bias].shape == params[i].shape[:1])
        for i, b in bases.items()
    )


def _like(basis: _Basis, weight: Tensor) -> _Basis:
    """The basis where its weight is; in its precision, but no less than float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows, r = basis.directions.shape
    padded = torch.zeros(rows, -(-r // 8) * 8, device=weight.device, dtype=wide)
    padded[:, :r] = basis.directions
    moved = padded[:, :r]
    return _Basis(bias=basis.bias, directions=moved, energies=basis.energies.to(weight.device))


def _spread(inputs: Iterable[Tensor]) -> list[Tensor]:
    """At most SAMPLES examples at equal distances, in one pass over data of unknown length."""
    kept: list[Tensor] = []
    seen, stride = 0, 1
    for x in inputs:
        kept.append(x[-seen % stride :: stride].clone())
        seen += len(x)
        while sum(map(len, kept)) > SAMPLES:
            stride, place, halved = 2 * stride, 0, []
            for x in kept:
                halved.append(x[place % 2 :: 2].clone())
                place += len(x)
            kept = halved
    if not seen:
        raise AnchorError("arch.anchor_from: data held no example; pass the task's batches")
    return kept


def _grams(
    model: nn.Module, layers: Mapping[nn.Module, int], inputs: Iterable[Tensor]
) -> dict[int, Tensor]:
    """Position of a layer's weight -> the sum of ``a a^T`` over its inputs, in float64."""
    grams: dict[int, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        a = _rows(module, args[0] if args else given["input"]).double()
        if module.bias is not None:
            a = F.pad(a, (0, 1), value=1.0)
        i = layers[module]
        grams[i] = grams[i] + a.T @ a if i in grams else a.T @ a

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in layers]
    try:
        with torch.no_grad():
            for x in _spread(inputs):
                if len(x):
                    model(x)
    finally:
        for h in handles:
            h.remove()
    return grams


def _rows(module: nn.Linear | nn.Conv2d, a: Tensor) -> Tensor:
    """What the weight is multiplied with: [n, in], a part of it where there is much."""
    if isinstance(module, nn.Conv2d):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        a = F.pad(a, module._reversed_padding_repeated_twice, mode=mode)
        a = F.unfold(a, module.kernel_size, module.dilation, 0, module.stride).transpose(-1, -2)
    a = a.detach().reshape(-1, a.shape[-1])
    # An odd stride does not fall into step with the rows and columns of an image.
    return a[:: max(1, len(a) // _ROWS) | 1]


def _grown(old: _Basis | None, gram: Tensor, bias: int, limits: tuple[int, float]) -> _Basis:
    """The basis with what a new task's inputs add to it, within the rank and the threshold."""
    rank, threshold = limits
    gram = gram / gram.trace().clamp(min=torch.finfo(gram.dtype).tiny)
    size = len(gram)
    m = old.directions.to(gram) if old is not None else gram.new_zeros(size, 0)
    rest = gram - m @ (m.T @ gram)
    rest = rest - (rest @ m) @ m.T
    values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    held_before = (m * (gram @ m)).sum() + values.cumsum(0) - values
    noise = size * torch.finfo(gram.dtype).eps
    added = int(((held_before < threshold) & (values > noise)).sum())
    both = torch.cat([m, vectors[:, :added]], 1)
    both = both - m @ (m.T @ both - torch.eye(m.shape[1], both.shape[1]).to(m)) if added else both
    basis = torch.linalg.qr(both)[0]
    # Energies of all tasks in the new coordinates; the span is the same until the rank cuts it.
    small = basis.T @ gram @ basis
    if old is not None:
        past = basis.T @ m
        small = small + (past * old.energies.to(gram)) @ past.T
    energies, turn = torch.linalg.eigh((small + small.T) / 2)
    best = energies.argsort(descending=True)[:rank]
    return _Basis(bias=bias, directions=basis @ turn[:, best], energies=energies[best])


def _project(
    weight: tuple[Tensor, Tensor] | None, bias: tuple[Tensor, Tensor] | None, basis: _Basis
) -> None:
    """Take back what an update does to the protected inputs.

    Args:
        weight: The weight as it is and as it was; None where it is frozen.
        bias: The same of the bias; None where it is frozen, or there is none.
        basis: The layer's.
    """
    directions = basis.directions
    if weight is None:
        if bias is not None:  # every protected input holds the same 1
            bias[0].copy_(bias[1])
        return
    w = weight[0]
    size = w.numel() // len(w)
    if bias is None and len(directions) > size:
        # The weight alone must leave the answers as they are.
        directions = torch.linalg.qr(directions[:size])[0]
    if kernels.project(weight, bias, directions):
        return
    top = directions[:size]
    along = (weight[1] - w).flatten(1).to(top.dtype) @ top
    if bias is not None:
        along.addr_((bias[1] - bias[0]).to(top.dtype), directions[size])
        bias[0].add_(along @ directions[size])
    w.add_((along @ top.T).view_as(w))

"""Hypernetworks: one forward from a task's embedding to a low-rank delta."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import random
from tessera.arch.base import base_hash, placement, root_of
from tessera.arch.delta import Delta
from tessera.arch.peft_names import layer_types
from tessera.arch.sites import Sites, select
from tessera.arch.terms import family
from tessera.errors import InputError
from tessera.meta.encoder import TaskEncoder, linear, require_size
from tessera.meta.fast import fastweights

__all__ = ["HyperNet", "Hypernetwork"]


@final
class HyperNet(nn.Module):
    """Embedding -> LoRA delta: ``W + B(e) A(e) / r`` at each site, with B(e) = 0 at the start.

    A trunk reads the embedding together with a learned vector of the site; sites of equal shape
    share the two layers that write ``A = A_0 + L_A h`` and ``B = L_B h``. A_0 starts as in LoRA,
    L_A and L_B at zero: before training every delta is, to the last bit, the base. Deltas have the
    weights' dtype, whatever this module has. The model is no part of it: neither saved with it nor
    among its parameters.

    Args:
        model: The base, or a part of it (see `arch.root`). It is not changed.
        sites: Linear, Conv, Embedding or MultiheadAttention modules: the modules, their names,
            globs, or ends of names. None: query and value projections in a transformers model,
            every Linear in any other.
        rank: r, >= 1; of a layer whose smaller side is below, that side.
        embed_dim: Length of the embedding.
        width: Of the layers within.
        seed: Of the starting values.

    Raises:
        InputError: A size is out of range, or a module cannot be a site.
        UnknownNameError: A name means no module.

    Source:
        Ha, Dai & Le 2017, section 3 (arXiv:1609.09106); low-rank: Charakorn et al. 2025, section 3
        (arXiv:2506.06105).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> net = HyperNet(model, rank=2, embed_dim=8)
        >>> fast = net(torch.randn(8))
        >>> fast, fast.tensors["0.A"].requires_grad, fast.tensors["0.B"].abs().max().item()
        (Delta('lora', 2 sites, 24 values), True, 0.0)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int,
        embed_dim: int,
        sites: Sites = None,
        width: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise InputError(f"HyperNet needs a torch.nn.Module, got {type(model).__name__}")
        for name, value in {"rank": rank, "embed_dim": embed_dim, "width": width}.items():
            require_size("HyperNet", name, value)
        names = select(model, sites, lambda m: family(m) != "other", "meta.HyperNet")
        whole = root_of(model)
        at = placement(model, whole)
        whole, dot = (whole, f"{at}." if at else "") if at is not None else (model, "")
        self.embed_dim = embed_dim
        self._base = weakref.ref(whole)  # a module here would be a part of this one
        draw = random.generator(seed, "meta.HyperNet")
        groups: dict[_Shape, list[str]] = {}
        for name in names:
            shape = _shape(model.get_submodule(name), name, rank)
            groups.setdefault(shape, []).append(f"{dot}{name}".rstrip("."))
        self.sites = tuple(site for group in groups.values() for site in group)
        self._scales = {n: 1 / s[0][0] for s, group in groups.items() for n in group}
        self._types = layer_types(whole, self.sites)
        self.norm = nn.LayerNorm(embed_dim)
        self.trunk = linear(embed_dim, width, draw)
        self.place = nn.Parameter(torch.randn(len(self.sites), width, generator=draw))
        self.deep = linear(width, width, draw)
        self.even = nn.LayerNorm(width)
        self.heads = nn.ModuleList(
            _Head(shape, group, width, draw) for shape, group in groups.items()
        )
        self.to(next(model.parameters()).device)

    def forward(self, embedding: Tensor) -> Delta:
        """The delta of one task, with its graph: a backward through it reaches this module.

        Args:
            embedding: [embed_dim].

        Returns:
            A delta of the base as that is now; ``.snapshot()`` to keep, ``.save(path)`` to serve.

        Raises:
            InputError: The embedding has another shape, or the base is gone.
        """
        self._check(embedding, (self.embed_dim,))
        return self._delta(dict(self._written(embedding)), self._whole())

    def many(self, embeddings: Tensor) -> list[Delta]:
        """The deltas of several tasks in one pass, for `arch.Stack` or one by one.

        Args:
            embeddings: [tasks, embed_dim], tasks >= 1.
        """
        tasks = len(embeddings) if isinstance(embeddings, Tensor) and embeddings.dim() == 2 else 1
        self._check(embeddings, (max(tasks, 1), self.embed_dim))
        written, whole = dict(self._written(embeddings)), self._whole()
        return [self._delta({n: t[i] for n, t in written.items()}, whole) for i in range(tasks)]

    def _written(self, embedding: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name, each with the leading dimensions of `embedding`."""
        e = self.trunk(self.norm(embedding.to(self.place.dtype)))
        h = self.even(F.gelu(self.deep(F.gelu(e[..., None, :] + self.place))))
        heads = cast("Sequence[_Head]", self.heads)
        parts = h.split([len(head.sites) for head in heads], -2)
        for head, part in zip(heads, parts, strict=True):
            yield from head.tensors(part)

    def _delta(self, tensors: dict[str, Tensor], whole: nn.Module) -> Delta:
        return Delta(
            kind="lora",
            tensors=tensors,
            scales=self._scales,
            base_hash=base_hash(whole),
            info={"layer_types": self._types} if self._types else {},
            _home=[weakref.ref(whole)],
        )

    def _whole(self) -> nn.Module:
        whole = self._base()
        if whole is None:
            raise InputError("the model this HyperNet was made for is gone; keep it as long")
        return whole

    def _check(self, embedding: Any, wanted: tuple[int, ...]) -> None:
        if not isinstance(embedding, Tensor) or tuple(embedding.shape) != wanted:
            got = tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding)
            raise InputError(
                f"HyperNet takes an embedding [{self.embed_dim}], and many() of them "
                f"[tasks, {self.embed_dim}]; got {got}"
            )


_Shape = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, str]  # of A, of B; family


def _shape(module: Any, name: str, rank: int) -> _Shape:
    """What A and B look like over a module, as `Delta` says."""
    kind = family(module)
    weight: Tensor | None = module.in_proj_weight if kind == "attention" else module.weight
    if weight is None:
        raise InputError(
            f"HyperNet: {name!r} is a MultiheadAttention with query, key and value of different "
            "widths, which keeps no single in_proj_weight; leave it out of sites="
        )
    out, wide = weight.shape[:2]
    if kind in ("conv1d", "embedding"):
        out, wide = wide, out
    window = tuple(weight.shape[2:]) if kind == "conv" else ()
    rank = min(rank, out, wide * math.prod(window))
    dtype = weight.dtype if weight.is_floating_point() else torch.float32  # packed weights
    return (rank, wide, *window), (out, rank, *(1,) * len(window)), dtype, kind


@final
class _Head(nn.Module):
    """What writes the A and B of sites that have one shape."""

    def __init__(self, shape: _Shape, sites: list[str], width: int, draw: torch.Generator) -> None:
        super().__init__()
        self.sites = sites
        self._A, self._B, self._dtype, kind = shape
        many = (len(sites), *self._A)
        if kind == "embedding":
            start = torch.randn(many, generator=draw)
        else:
            bound = 1 / math.sqrt(math.prod(self._A[1:]))
            start = (2 * torch.rand(many, generator=draw) - 1) * bound
        self.A_start = nn.Parameter(start)
        self.A = nn.Parameter(torch.zeros(math.prod(self._A), width))
        self.B = nn.Parameter(torch.zeros(math.prod(self._B), width))

    def tensors(self, h: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name -> tensor, from h [..., sites, width]."""
        A = self.A_start + torch.unflatten(F.linear(h, self.A), -1, self._A)
        B = torch.unflatten(F.linear(h, self.B), -1, self._B)
        axis = h.dim() - 2
        for i, site in enumerate(self.sites):
            dot = f"{site}." if site else ""
            yield f"{dot}A", A.select(axis, i).to(self._dtype)
            yield f"{dot}B", B.select(axis, i).to(self._dtype)


@final
class Hypernetwork(nn.Module):
    """A task encoder and a hypernetwork over one base: a few examples -> fast weights.

    ``fast = net.hypernet(net.task_encoder(context))``, then ``with net.fastweights(model, fast):``.

    Args:
        model: The base, or a part of it (see `arch.root`). It is no part of the module.
        in_dim: Values of one example.
        num_classes: Labels are 0 .. num_classes - 1.
        embed_dim: Length of the embedding between the two.
        rank: Of the deltas, at most.
        sites: As in `HyperNet`.
        seed: Of the starting values.

    Raises:
        InputError: A size is out of range, or a module cannot be a site.
        UnknownNameError: A name means no module.

    Example:
        >>> from tessera.data import Batch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> meta = Hypernetwork(model, in_dim=4, num_classes=3)
        >>> context = Batch(torch.randn(5, 4), torch.tensor([0, 1, 2, 2, 0]))
        >>> fast = meta.hypernet(meta.task_encoder(context))
        >>> with meta.fastweights(model, fast):
        ...     inside = model(context.x)
        >>> torch.equal(inside, model(context.x))  # it is not trained yet
        True
    """

    fastweights = staticmethod(fastweights)

    def __init__(
        self,
        model: nn.Module,
        *,
        in_dim: int,
        num_classes: int,
        embed_dim: int = 64,
        rank: int = 4,
        sites: Sites = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.task_encoder = TaskEncoder(in_dim, num_classes, embed_dim=embed_dim, seed=seed)
        self.hypernet = HyperNet(model, rank=rank, embed_dim=embed_dim, sites=sites, seed=seed)
        self.to(self.hypernet.place.device)

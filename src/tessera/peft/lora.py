"""LoRA: a low-rank change beside each chosen layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tessera import random
from tessera.arch import Delta
from tessera.arch.sites import Sites, select
from tessera.arch.terms import family
from tessera.errors import InputError
from tessera.peft.making import Head, made, without_head

__all__ = ["lora"]


def lora(
    model: nn.Module,
    r: int,
    alpha: float | None = None,
    *,
    sites: Sites = None,
    head: Head = None,
    seed: int = 0,
) -> Delta:
    """A fresh LoRA: ``y = W x + b + (alpha / r) B A x``, with B = 0, so that nothing changes yet.

    Args:
        model: The base, or a part of it (see `arch.root`).
        r: Rank, 1 .. the smaller side of every site.
        alpha: Of the scale ``alpha / r``; None: r, a scale of 1.
        sites: Linear, Conv, Embedding or MultiheadAttention modules: the modules, their names,
            globs, or ends of names. None: query and value projections in a transformers model,
            every Linear in any other.
        head: Modules that are trained whole along with it, as names or patterns; they are no sites
            unless `sites` says so.
        seed: Of A, uniform in +-1/sqrt(in) as `nn.Linear` starts; normal for an embedding.

    Returns:
        A trainable delta. Its tensors have the dtype of the weights, or float32 under half
        precision.

    Raises:
        InputError: r or alpha is out of range, r is larger than a layer, or a site can be none.
        UnknownNameError: A name means no module.

    Source:
        Hu et al. 2022, section 4.1 (arXiv:2106.09685).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> delta = lora(model, r=2, alpha=4, sites="0")
        >>> {name: tuple(t.shape) for name, t in delta.tensors.items()}, dict(delta.scales)
        ({'0.A': (2, 4), '0.B': (3, 2)}, {'0': 2.0})
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise InputError(f"peft.lora needs a whole rank r >= 1, got {r!r}")
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(f"peft.lora needs a finite alpha > 0, got {alpha!r}")
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    names = select(model, sites, lambda m: family(m) != "other", "peft.lora") if modules else []
    if sites is None:
        names = without_head(model, names, head)
    tensors: dict[str, Tensor] = {}
    for name in names:
        A, B = _start(modules[name], name, r, seed)
        dot = f"{name}." if name else ""
        tensors[f"{dot}A"], tensors[f"{dot}B"] = A, B
    scale = (r if alpha is None else alpha) / r
    return made(model, "lora", tensors, scales=dict.fromkeys(names, scale), head=head)


def _start(module: Any, name: str, r: int, seed: int) -> tuple[Tensor, Tensor]:
    kind = family(module)
    weight: Tensor = module.in_proj_weight if kind == "attention" else module.weight
    if weight is None:
        raise InputError(
            f"peft.lora: {name!r} is a MultiheadAttention with query, key and value of different "
            "widths, which keeps no single in_proj_weight"
        )
    out, wide = weight.shape[:2]
    if kind in ("conv1d", "embedding"):
        out, wide = wide, out
    window = weight.shape[2:] if kind == "conv" else ()
    most = min(out, wide * math.prod(window))
    if r > most:
        raise InputError(
            f"peft.lora: rank {r} is larger than the layer {name!r} [{out}, {wide}]; choose "
            f"r <= {most}, or leave the layer out of sites="
        )
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    draw = random.generator(seed, "peft.lora", name)
    if kind == "embedding":
        A = torch.randn(r, wide, generator=draw, dtype=dtype)
    else:
        bound = 1 / math.sqrt(wide * math.prod(window))
        A = (2 * torch.rand(r, wide, *window, generator=draw, dtype=dtype) - 1) * bound
    return A.to(weight.device), torch.zeros(
        out, r, *(1,) * len(window), dtype=dtype, device=weight.device
    )

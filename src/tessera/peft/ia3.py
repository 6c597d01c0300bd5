"""IA3: a gain for each feature of a few layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tessera.arch import Delta
from tessera.arch.conditioning import backbone
from tessera.arch.sites import Sites, matching, select
from tessera.arch.terms import family
from tessera.errors import InputError
from tessera.peft.making import Head, made

__all__ = ["ia3"]

# Keys, values and the inner activations of the feed-forward part, as the paper has it; what
# transformers models call them, with how the feed-forward's second layer is told from attention's.
_KEY_VALUE = ("key", "value", "k_proj", "v_proj", "k_lin", "v_lin", "k", "v", "c_attn")
_SECOND = ("output.dense", "down_proj", "fc2", "wo", "lin2", "mlp.c_proj")


def ia3(
    model: nn.Module, *, sites: Sites = None, feedforward: Sites = None, head: Head = None
) -> Delta:
    """A fresh IA3: ``y = l * (W x + b)``, and ``y = W (l * x) + b`` at `feedforward`; l = 1.

    Args:
        model: The base, or a part of it (see `arch.root`).
        sites: Linear or Conv modules whose output is scaled: modules, names, globs, ends of names.
            None: keys and values in a transformers model, every Linear in any other.
        feedforward: Modules whose input is scaled. None: second layers of the feed-forward parts
            in a transformers model if `sites` is None too; else none.
        head: Modules that are trained whole along with it.

    Raises:
        InputError: A module can be no site.
        UnknownNameError: A name means no module.

    Source:
        Liu et al. 2022, section 3.3 (arXiv:2205.05638).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> delta = ia3(model, sites="0", feedforward="2")
        >>> {name: tuple(t.shape) for name, t in delta.tensors.items()}
        {'2.gain_in': (3,), '0.gain_out': (3,)}
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"peft.ia3 needs a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    if sites is None and feedforward is None and backbone(model) is not None:
        linear = [n for n, m in modules.items() if _accepts(m)]
        sites = [n for n in linear if n.rpartition(".")[2] in _KEY_VALUE] or None
        second = [n for end in _SECOND for n in matching(linear, end)]
        feedforward = [n for n in dict.fromkeys(second) if "attention.output" not in n]
    inner = [] if feedforward is None else select(model, feedforward, _accepts, "peft.ia3")
    outer = select(model, sites, _accepts, "peft.ia3") if sites is not None or not inner else []
    tensors: dict[str, Tensor] = {}
    for part, names in (("gain_in", inner), ("gain_out", outer)):
        for name in names:
            if part == "gain_out" and name in inner:
                continue
            tensors[f"{name}.{part}" if name else part] = _ones(modules[name], part)
    return made(model, "ia3", tensors, head=head)


def _accepts(module: nn.Module) -> bool:
    return family(module) in ("linear", "conv1d", "conv")


def _ones(module: Any, part: str) -> Tensor:
    weight: Tensor = module.weight
    out, wide = weight.shape[:2] if family(module) != "conv1d" else weight.shape[:2][::-1]
    if part == "gain_in" and getattr(module, "groups", 1) > 1:
        raise InputError(
            "peft.ia3: the input of a grouped convolution cannot be scaled by its weight"
        )
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    return torch.ones(wide if part == "gain_in" else out, dtype=dtype, device=weight.device)

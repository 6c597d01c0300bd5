"""Prefix and prompt: virtual tokens that are learned instead of written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tessera import random
from tessera.arch import Delta
from tessera.arch.conditioning import backbone, heads_of, prefix_sites
from tessera.errors import InputError
from tessera.peft.making import Head, made

__all__ = ["prefix", "prompt"]


def prefix(model: nn.Module, num_tokens: int, *, head: Head = None, seed: int = 0) -> Delta:
    """Learned keys and values, `num_tokens` of them, before those of the sequence in every layer.

    Unlike other kinds a fresh one changes the output: attention is shared with the new tokens.

    Args:
        model: A transformers model, or any with `nn.MultiheadAttention`.
        num_tokens: Virtual tokens, >= 1.
        head: Modules that are trained whole along with it.
        seed: Of the start, normal with deviation 0.02.

    Returns:
        A trainable delta with one tensor ``prefix`` [num_tokens, layers * 2 * width].

    Raises:
        InputError: `num_tokens` is out of range, or the model has no attention known here.

    Source:
        Li & Liang 2021, equation 3 (arXiv:2101.00190), without the reparametrization.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> prefix(layer, 3).tensors["prefix"].shape
        torch.Size([3, 16])
    """
    _require_tokens("prefix", num_tokens)
    name = backbone(model)
    if name is not None:
        body = model.get_submodule(name)
        layers, heads, size = heads_of(body)
        like, width = next(body.parameters()), layers * 2 * heads * size
        info: dict[str, Any] = {"layers": layers, "heads": heads}
    else:
        sites = prefix_sites(model)
        each: list[Any] = [model.get_submodule(s) for s in sites]
        widths: set[int] = {attention.embed_dim for attention in each}
        if len(widths) != 1:
            raise InputError(
                "peft.prefix needs a transformers model, or nn.MultiheadAttention modules of one "
                f"width; {type(model).__name__} has {len(sites)} of them, widths {sorted(widths)}"
            )
        like, width = next(model.parameters()), len(sites) * 2 * widths.pop()
        info = {"layers": len(sites), "heads": each[0].num_heads, "sites": sites}
    values = 0.02 * _normal((num_tokens, width), like, seed, "peft.prefix")
    return made(model, "prefix", {"prefix": values}, info=info, head=head)


def prompt(
    model: nn.Module, vecs_or_num_tokens: Tensor | int, *, head: Head = None, seed: int = 0
) -> Delta:
    """Learned vectors before the embedded sequence.

    Args:
        model: A transformers model, or any with one `nn.Embedding`; there the first counts.
        vecs_or_num_tokens: [tokens, width] to start from, e.g. embeddings of a text; or how many:
            rows of the embedding, drawn by `seed`.
        head: Modules that are trained whole along with it.
        seed: Of the draw.

    Returns:
        A trainable delta with one tensor ``prompt`` [tokens, width].

    Raises:
        InputError: The number or the vectors do not fit, or the model embeds nothing.

    Source:
        Lester et al. 2021, section 2 (arXiv:2104.08691).

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        >>> prompt(model, 3).tensors["prompt"].shape
        torch.Size([3, 4])
    """
    name = backbone(model)
    info: dict[str, Any] = {}
    if name is not None:
        body: Any = model.get_submodule(name)
        table: Tensor = body.get_input_embeddings().weight
    else:
        sites = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)][:1]
        if not sites:
            raise InputError(f"peft.prompt: {type(model).__name__} has no nn.Embedding")
        table, info = model.get_parameter(f"{sites[0]}.weight".lstrip(".")), {"sites": sites}
    if isinstance(vecs_or_num_tokens, Tensor):
        start = vecs_or_num_tokens.detach().clone()
        if start.dim() != 2 or len(start) < 1 or start.shape[1] != table.shape[1]:
            raise InputError(
                f"peft.prompt needs vectors [tokens, {table.shape[1]}], got {tuple(start.shape)}"
            )
        if not start.is_floating_point() or not bool(start.isfinite().all()):
            raise InputError("peft.prompt needs finite floating vectors")
    else:
        _require_tokens("prompt", vecs_or_num_tokens)
        draw = random.generator(seed, "peft.prompt")
        rows = torch.randint(len(table), (vecs_or_num_tokens,), generator=draw)
        start = table.detach()[rows.to(table.device)].clone()
    return made(model, "prompt", {"prompt": start}, info=info, head=head)


def _require_tokens(kind: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"peft.{kind} needs a whole number of virtual tokens >= 1, got {count!r}")


def _normal(shape: tuple[int, ...], like: Tensor, seed: int, who: str) -> Tensor:
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    draw = torch.randn(*shape, generator=random.generator(seed, who), dtype=dtype)
    return draw.to(like.device)

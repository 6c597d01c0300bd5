"""Prefixes and prompts: virtual tokens before a sequence, in any model that has a place for them.

A transformers model takes a prefix as ``past_key_values`` and a prompt as ``inputs_embeds``; other
models take a prefix in every `nn.MultiheadAttention` and a prompt behind their `nn.Embedding`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.arch.base import named
from tessera.errors import DeltaError, InputError

__all__ = ["Virtual", "backbone", "conditioned", "heads_of", "prefix_sites"]


class Virtual(Protocol):
    """Where virtual tokens come from: one set for all rows, or one for each."""

    def prefix(self, rows: int) -> tuple[Tensor, Tensor | None] | None:
        """[rows, P, width] and, where rows differ, how many of the P each has; None for none."""

    def prompt(self, rows: int) -> tuple[Tensor, Tensor | None] | None:
        """The same for prompts."""


def backbone(model: nn.Module) -> str | None:
    """Name of the transformers model in `model` that owns the layers; None where there is none.

    Told by what it offers, so that nothing has to be installed to ask.

    Example:
        >>> backbone(nn.Linear(1, 1)) is None
        True
    """
    modules = named(model)
    names = {id(module): name for name, module in modules.items()}
    module: Any
    for module in modules.values():
        if callable(getattr(module, "get_input_embeddings", None)) and hasattr(module, "config"):
            found: str = names.get(id(getattr(module, "base_model", module)), names[id(module)])
            return found
    return None


def heads_of(model: Any) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and numbers of a head, of a transformers model."""
    config: Any = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, size


def prefix_sites(model: nn.Module) -> list[str]:
    """Names of the `nn.MultiheadAttention` modules, in order.

    Example:
        >>> prefix_sites(nn.Sequential(nn.MultiheadAttention(4, 2)))
        ['0']
    """
    return [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]


def conditioned(twin: nn.Module, virtual: Virtual, layer: int = 0) -> nn.Module:
    """Turn a private copy of a module into one that sees the virtual tokens.

    Args:
        twin: A transformers model, an `nn.MultiheadAttention`, or an `nn.Embedding`.
        virtual: Where they come from.
        layer: Which layer's share of a prefix a `MultiheadAttention` takes.

    Raises:
        InputError: It is no module that could.
    """
    twin.__dict__["virtual"], twin.__dict__["virtual_layer"] = virtual, layer
    if isinstance(twin, nn.MultiheadAttention):
        twin.__dict__["_qkv_same_embed_dim"] = False  # keeps PyTorch's fused layers off this one
    twin.__class__ = _conditioned_class(cast(Any, type(twin)))
    return twin


@cache
def _conditioned_class(cls: Any) -> type[nn.Module]:
    if issubclass(cls, nn.MultiheadAttention):
        forward: Callable[..., Any] = _attend
    elif issubclass(cls, nn.Embedding):

        def forward(module: nn.Module, input: Tensor) -> Tensor:
            return _before(module, cls.forward(module, input))
    else:
        names = [n for n in inspect.signature(cls.forward).parameters if n != "self"]
        if not {"inputs_embeds", "attention_mask"} <= set(names):
            raise InputError(
                f"virtual tokens need a transformers model, MultiheadAttention or Embedding; "
                f"{cls.__name__} takes {names[:4]}"
            )

        def forward(module: nn.Module, *args: Any, **inputs: Any) -> Any:
            inputs.update(zip(names, args, strict=False))
            return cls.forward(module, **_inputs(module, names, inputs))

    return type(f"Conditioned{cls.__name__}", (cls,), {"forward": forward})


def _before(module: Any, embedded: Tensor) -> Tensor:
    found = module.virtual.prompt(len(embedded))
    if found is None:
        return embedded
    prompt, lengths = found
    if lengths is not None:
        raise InputError(
            "rows with prompts of different lengths need a model with an attention mask; here all "
            f"rows must have equally many virtual tokens, got {sorted(set(lengths.tolist()))}"
        )
    return torch.cat([prompt.to(embedded.dtype), embedded], 1)


def _inputs(module: Any, names: Sequence[str], inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a transformers model with virtual tokens in them."""
    given = next(
        (inputs[n] for n in ("input_ids", "inputs_embeds") if inputs.get(n) is not None), None
    )
    if given is None:
        raise InputError("the model needs input_ids or inputs_embeds, got neither")
    prompt, prefix = module.virtual.prompt(len(given)), module.virtual.prefix(len(given))
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise InputError(
            f"virtual tokens need an attention_mask [batch, sequence], got {tuple(mask.shape)}"
        )
    if prompt is not None:
        inputs = _with_prompt(module, inputs, *prompt)
    if prefix is not None:
        if "past_key_values" not in names:
            raise InputError(
                f"{type(module).__mro__[1].__name__} takes no prefix (past_key_values)"
            )
        if inputs.get("past_key_values") is not None:
            raise DeltaError(
                "a prefix is itself past_key_values, and the call brings its own: leave these out "
                "(to generate token by token, use a LoRA)"
            )
        inputs = _with_prefix(module, names, inputs, *prefix)
    return inputs


def _with_prompt(
    module: Any, inputs: dict[str, Any], prompt: Tensor, lengths: Tensor | None
) -> dict[str, Any]:
    embeds = inputs.get("inputs_embeds")
    if embeds is None:
        embeds = module.get_input_embeddings()(inputs["input_ids"])
    (rows, count), size = prompt.shape[:2], embeds.shape[1]
    mask, types = inputs.get("attention_mask"), inputs.get("token_type_ids")
    embeds = torch.cat([prompt.to(embeds.dtype), embeds], 1)
    if mask is not None or lengths is not None:
        if mask is None:
            mask = torch.ones(rows, size, dtype=torch.int64, device=embeds.device)
        mask = torch.cat([_present(rows, count, lengths, mask), mask], 1)
    if types is not None:
        types = torch.cat([types.new_zeros(rows, count), types], 1)
    if lengths is not None:
        # Padding goes behind: positions, and whoever looks at the first token, see what they would
        # have seen with this row alone.
        j, own = torch.arange(count + size, device=embeds.device), lengths[:, None]
        order = torch.where(j < own, j, torch.where(j < own + size, j + count - own, j - size))
        embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[2]))
        mask = None if mask is None else mask.gather(1, order)
        types = None if types is None else types.gather(1, order)
    changed = {"input_ids": None, "inputs_embeds": embeds, "attention_mask": mask}
    if types is not None:
        changed["token_type_ids"] = types
    if inputs.get("position_ids") is not None:
        changed["position_ids"] = None  # they count without the virtual tokens
    return {**inputs, **changed}


def _present(rows: int, count: int, lengths: Tensor | None, mask: Tensor) -> Tensor:
    """[rows, count]: 1 where a row has a virtual token."""
    if lengths is None:
        return mask.new_ones(rows, count)
    return (torch.arange(count, device=mask.device) < lengths[:, None]).to(mask.dtype)


def _with_prefix(
    module: Any,
    names: Sequence[str],
    inputs: dict[str, Any],
    prefix: Tensor,
    lengths: Tensor | None,
) -> dict[str, Any]:
    from transformers import DynamicCache

    layers, heads, size = heads_of(module)
    rows, count, _ = prefix.shape
    given = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    length = given.shape[1]
    past = DynamicCache()
    each = prefix.reshape(rows, count, 2 * layers, heads, size).permute(2, 0, 3, 1, 4)
    for layer in range(layers):
        past.update(each[2 * layer], each[2 * layer + 1], layer)
    mask = inputs.get("attention_mask")
    changed: dict[str, Any] = {"past_key_values": past}
    if mask is None and lengths is not None:
        mask = torch.ones(rows, length, dtype=torch.int64, device=given.device)
    if mask is not None:
        changed["attention_mask"] = torch.cat([_present(rows, count, lengths, mask), mask], 1)
    if lengths is not None and "position_ids" in names and inputs.get("position_ids") is None:
        changed["position_ids"] = lengths[:, None] + torch.arange(length, device=given.device)
    return {**inputs, **changed}


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`nn.MultiheadAttention.forward` with keys and values of its own before the sequence's."""
    if query.dim() != 3:
        raise InputError(f"a prefix needs a batch of sequences, got query {tuple(query.shape)}")
    turned = not module.batch_first
    q, k, v = (t.transpose(0, 1) if turned else t for t in (query, key, value))
    n, size, heads = len(q), q.shape[-1] // module.num_heads, module.num_heads
    weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (F.linear(t, w, b) for t, w, b in zip((q, k, v), weights, biases, strict=True))
    prefix, lengths = module.virtual.prefix(n) or (q.new_zeros(n, 0, q.shape[-1]), None)
    count = prefix.shape[1]
    if count:
        own = torch.unflatten(prefix, 2, (-1, q.shape[-1]))[:, :, 2 * module.virtual_layer :]
        k, v = torch.cat([own[:, :, 0], k], 1), torch.cat([own[:, :, 1], v], 1)
    q, k, v = (torch.unflatten(t, 2, (heads, size)).transpose(1, 2) for t in (q, k, v))
    added = None if attn_mask is None else _additive(attn_mask, n, heads, count, q.dtype)
    if lengths is not None:
        # Of a shorter prefix the rest is no token.
        absent = torch.arange(count, device=q.device) >= lengths[:, None]
        absent = F.pad(absent, (0, k.shape[2] - count))[:, None, None]
        hidden = torch.zeros(absent.shape, dtype=q.dtype, device=q.device)
        hidden = hidden.masked_fill(absent, -torch.inf)
        added = hidden if added is None else added + hidden
    if key_padding_mask is not None:
        padded = _additive(key_padding_mask[:, None, :], n, 1, count, q.dtype)
        added = padded if added is None else added + padded
    scores = (q * size**-0.5) @ k.mT
    shares = torch.softmax(scores if added is None else scores + added, -1)
    shares = F.dropout(shares, module.dropout, module.training)
    output = module.out_proj((shares @ v).transpose(1, 2).flatten(2))
    output = output.transpose(0, 1) if turned else output
    if not need_weights:
        return output, None
    return output, shares.mean(1) if average_attn_weights else shares


def _additive(mask: Tensor, rows: int, heads: int, count: int, dtype: torch.dtype) -> Tensor:
    """An additive mask [.., .., query, count + keys] that hides no virtual token."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            mask, -torch.inf
        )
    if mask.dim() == 3 and heads > 1:
        mask = mask.reshape(rows, heads, *mask.shape[1:])
    elif mask.dim() == 3:
        mask = mask[:, None]
    return F.pad(mask.to(dtype), (count, 0))

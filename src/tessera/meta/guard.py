"""What a forward may not do while it is differentiated through, seen from this thread only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Signature, signature
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tessera.errors import InputError
from tessera.meta.norms import batch_norm, layer_norm

__all__ = ["Guard", "require_no_dropout"]

_DROPOUTS = {
    f: signature(f)
    for f in (
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
    )
}
_PLAIN: dict[Any, Callable[..., Tensor]] = {F.layer_norm: layer_norm, F.batch_norm: batch_norm}
_MULTI_HEAD = signature(F.multi_head_attention_forward)


@final
class Guard(TorchFunctionMode):
    """A scope in which functions are twice differentiable, and dropout that is on is refused.

    Attention takes its math path: the fused ones have no second derivative, and
    `torch.nn.attention.sdpa_kernel` would switch them for every thread. `F.layer_norm` and
    `F.batch_norm` are plain operations: theirs is wrong inside vmap. Dropout draws from the
    process-wide generator, so each inner step would descend another function, and a recomputed
    one another than the first.

    Args:
        stacked: Whether it stands inside `torch.func.vmap` over parameters.

    Raises:
        InputError: Inside, where dropout is on.

    Example:
        >>> with Guard():
        ...     F.dropout(torch.ones(2), 0.5, training=False)
        tensor([1., 1.])
    """

    def __init__(self, *, stacked: bool = False) -> None:
        super().__init__()
        self._stacked = stacked

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, or what stands for it here."""
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **given)
        if func is F.multi_head_attention_forward:
            return _multi_head(func, args, given)
        if func is F.linear and self._stacked:
            return _linear(*args, **given)
        if func in _PLAIN:
            return _PLAIN[func](*args, **given)
        if func in _DROPOUTS:
            _require_off(_DROPOUTS[func], args, given, "p")
        return func(*args, **given)


def _require_off(of: Signature, args: Any, kwargs: dict[str, Any], name: str) -> None:
    call = of.bind(*args, **kwargs)
    call.apply_defaults()
    if call.arguments["training"]:
        require_no_dropout(call.arguments[name])


def require_no_dropout(p: float) -> None:
    """Raise InputError if dropout of probability `p` would be drawn.

    Example:
        >>> require_no_dropout(0.0)
    """
    if p > 0:
        raise InputError(
            f"dropout (p={p}) is on: the steps of an inner loop would each descend another random "
            "function. Call model.eval() before; buffers= decides about BatchNorm in either mode"
        )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Under vmap `F.linear` becomes a product and a bias that are each scaled by 1, twice over in
    the second derivative."""
    product = torch.matmul(input, weight.mT)
    return product if bias is None else product + bias


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    require_no_dropout(dropout_p)
    math = torch.ops.aten._scaled_dot_product_attention_math
    output: Tensor = math(
        query, key, value, attn_mask, 0.0, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return output


def _multi_head(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """With the weights asked for, this function computes them in plain operations."""
    _require_off(_MULTI_HEAD, args, kwargs, "dropout_p")
    wanted = kwargs.get("need_weights", True)
    output, weights = func(*args, **{**kwargs, "need_weights": True})
    return output, weights if wanted else None

"""The ops of lifelong learning as `torch.ops.tessera`: bodies and schemas.

Targets (centres, importances, old logits) are detached inside: a penalty never moves what it
compares with. Every op is held to the same laws by tests/battery/test_ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.ops.registry import define, region

__all__ = [
    "DELTA_APPLY",
    "DER",
    "EWC",
    "KL_DIVERGENCE",
    "L2SP",
    "LWF",
    "MAML_STEP",
    "PARAMETER",
    "RECENCY_WEIGHTED",
    "SI",
    "squares",
]


def squares(
    params: Sequence[Tensor], centres: Sequence[Tensor], weights: Sequence[Tensor] | float
) -> Tensor:
    """``sum w (theta - c)^2`` in plain math; float32 at least.

    Example:
        >>> squares([torch.tensor([3.0])], [torch.tensor([1.0])], 0.5).item()
        2.0
    """
    total = params[0].new_zeros((), dtype=torch.promote_types(params[0].dtype, torch.float32))
    for i, (p, c) in enumerate(zip(params, centres, strict=True)):
        w = weights if isinstance(weights, float | int) else weights[i].detach()
        total = total + (w * (p - c.detach()).square()).sum().to(total.device)
    return total


def _ewc(
    params: list[Tensor], centres: list[Tensor], fisher: list[Tensor], lam: float, constant: float
) -> Tensor:
    return lam * (0.5 * squares(params, centres, fisher) + constant)


def _si(params: list[Tensor], centres: list[Tensor], omega: list[Tensor], c: float) -> Tensor:
    return c * squares(params, centres, omega)


def _l2sp(params: list[Tensor], centres: list[Tensor], lam: float) -> Tensor:
    return 0.5 * lam * squares(params, centres, 1.0)


def _kl_divergence(log_p: Tensor, q: Tensor) -> Tensor:
    if log_p.shape[0] == 0:
        # The mean over no rows is NaN; an empty replay asks for nothing.
        return log_p.sum()
    return F.kl_div(log_p, q.detach(), reduction="batchmean")


def _lwf(logits: Tensor, prev_logits: Tensor, temperature: float, lam: float) -> Tensor:
    target = torch.softmax(prev_logits.detach() / temperature, -1)
    divergence = _kl_divergence(torch.log_softmax(logits / temperature, -1), target)
    return (lam * temperature * temperature) * divergence


def _der(logits: Tensor, stored_logits: Tensor, alpha: float) -> Tensor:
    if logits.numel() == 0:
        return logits.sum()
    return alpha * (logits - stored_logits.detach().to(logits.dtype)).square().mean()


def _recency_weighted(new: Tensor, replay: Tensor, rho: float) -> Tensor:
    return (1.0 - rho) * replay + rho * new


def _delta_apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """``x W^T + b + scale (x A^T) B^T``; A [r, in] and B [out, r], or one of each for every row."""
    base = F.linear(x, weight, bias)
    if A.dim() == 2:
        return base + scale * ((x @ A.mT) @ B.mT)
    inner = torch.einsum("n...i,nri->n...r", x, A)
    return base + scale * torch.einsum("n...r,nor->n...o", inner, B)


def _parameter(value: Tensor, name: str, anchor: str) -> Tensor:
    return value.view_as(value)


def _maml_step(
    params: list[Tensor],
    batch: list[Tensor],
    gradients: str,
    steps: int,
    lr: float,
    create_graph: bool,
) -> list[Tensor]:
    """``theta <- theta - lr g(theta, batch)``, `steps` times; g is the region `gradients`.

    g is plain operations, so what is differentiated here is differentiated again outside.
    """
    g = region(gradients)
    for _ in range(steps):
        found = g([*params, *batch])
        if not create_graph:
            found = [d.detach() for d in found]
        params = [p - lr * d for p, d in zip(params, found, strict=True)]
    return params if steps else [p.view_as(p) for p in params]


EWC = define(
    "ewc(Tensor[] params, Tensor[] centres, Tensor[] fisher, float lam, float constant) -> Tensor",
    _ewc,
)
SI = define("si(Tensor[] params, Tensor[] centres, Tensor[] omega, float c) -> Tensor", _si)
L2SP = define("l2sp(Tensor[] params, Tensor[] centres, float lam) -> Tensor", _l2sp)
LWF = define("lwf(Tensor logits, Tensor prev_logits, float temperature, float lam) -> Tensor", _lwf)
KL_DIVERGENCE = define("kl_divergence(Tensor log_p, Tensor q) -> Tensor", _kl_divergence)
DER = define("der(Tensor logits, Tensor stored_logits, float alpha) -> Tensor", _der)
RECENCY_WEIGHTED = define(
    "recency_weighted(Tensor new, Tensor replay, float rho) -> Tensor", _recency_weighted
)
DELTA_APPLY = define(
    "delta_apply(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scale) -> Tensor",
    _delta_apply,
)
PARAMETER = define("parameter(Tensor(a) value, str name, str anchor) -> Tensor(a)", _parameter)
MAML_STEP = define(
    "maml_step(Tensor[] params, Tensor[] batch, str gradients, int steps, float lr, "
    "bool create_graph) -> Tensor[]",
    _maml_step,
    region="gradients",
)

"""How an op of lifelong learning becomes one node of a graph, with every derivative there is.

An op here is a plain differentiable body registered under two keys: `CompositeImplicitAutograd`, so
that autograd, forward AD, the compiler and the exporter see one node and differentiate what is
inside, and `FuncTorchBatchedDecomposition`, so that ``vmap`` does too. `torch.library.custom_op` is
not used: under it `torch.func.grad` raises and `torch.func.jvp` is silently 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.errors import GraphError

__all__ = ["OPS", "REGIONS", "Op", "define", "region", "transformed"]

_LIBRARY = torch.library.Library("tessera", "DEF")  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Op:
    """One op of the namespace ``torch.ops.tessera``.

    Attributes:
        name: As in ``torch.ops.tessera.<name>``.
        schema: PyTorch's schema, arguments and result.
        body: The plain math; the op is by definition equal to it.
        region: The argument that names a graph the op holds, as MLIR's regions; None for none.

    Example:
        >>> OPS["l2sp"].schema
        'l2sp(Tensor[] params, Tensor[] centres, float lam) -> Tensor'
    """

    name: str
    schema: str
    body: Callable[..., Any]
    region: str | None = None

    def node(self, *args: Any) -> Any:
        """Call the op itself, so that a tracer records one node."""
        return getattr(torch.ops.tessera, self.name).default(*args)

    def __call__(self, *args: Any) -> Any:
        """The op where somebody is looking at the operations, else the body at no extra cost."""
        return self.node(*args) if transformed() else self.body(*args)


OPS: dict[str, Op] = {}
REGIONS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {}  # by content hash


def region(name: str) -> Callable[[list[Tensor]], list[Tensor]]:
    """The graph of that name as a function of tensors, for the body of an op that holds one.

    Example:
        >>> region("none")
        Traceback (most recent call last):
        tessera.errors.GraphError: no region 'none' is known here; make it with tg.gradient_region
    """
    if name not in REGIONS:
        raise GraphError(f"no region {name!r} is known here; make it with tg.gradient_region")
    return REGIONS[name]


def define(schema: str, body: Callable[..., Any], *, region: str | None = None) -> Op:
    """Register an op; see docs/guide/ir.md, "add an op".

    Args:
        schema: ``name(Tensor x, float lam) -> Tensor``; no defaults (PyTorch leaves out arguments
            equal to them, and the body would miss them).
        body: Pure, differentiable torch operations; no data-dependent control flow.
        region: The str argument that names a graph the op holds, if it holds one.

    Example:
        >>> define("double_(Tensor x) -> Tensor", lambda x: 2 * x)  # doctest: +SKIP
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
        _LIBRARY.impl(name, body, key)  # type: ignore[no-untyped-call]
    OPS[name] = Op(name=name, schema=schema, body=body, region=region)
    return OPS[name]


def transformed() -> bool:
    """Whether a functorch level, forward AD, a compiler, a tracer or a mode is at work.

    Example:
        >>> transformed()
        False
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()  # as where meta puts other tensors in place
        or torch._ops._len_torch_dispatch_stack_pre_dispatch()  # type: ignore[no-untyped-call]
    )

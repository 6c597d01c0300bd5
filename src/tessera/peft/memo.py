"""What a fit need not compute twice: calls of modules that the fitted tensors do not reach.

The first forward of a batch is watched op by op (`Watch`). Where a call would give the same again
its output is kept, and the later forwards of that batch take it from there: the highest such
modules, as everything below them is then not called at all. What is assumed of the model: its
output follows from its inputs, its weights and the tensors given, and it reads their values through
PyTorch (``item()``, comparisons), not by way of ``tolist()`` or NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tessera.peft.watch import Node, Products, Watch

__all__ = ["Memo"]

R = TypeVar("R")


@final
class Memo:
    """Runs a model again and again, without what does not depend on some tensors.

    Args:
        model: A shadow of one's own in eval mode: the `forward` of its modules is replaced until
            `close`.
        live: The tensors that change between runs; whatever shares their memory does too.
        on: False: compute everything every time.

    Attributes:
        model: The same.

    Example:
        >>> class Count(nn.Module):
        ...     calls = 0
        ...     def forward(self, x):
        ...         Count.calls += 1
        ...         return x + 1
        >>> model = nn.Sequential(Count(), nn.Linear(1, 1)).requires_grad_(False)
        >>> memo = Memo(model, [model[1].weight])
        >>> for _ in range(3):
        ...     _ = memo.run(0, lambda: model(torch.ones(1, 1)).sum())
        >>> Count.calls, memo.kept(0)
        (1, ('0',))
    """

    def __init__(self, model: nn.Module, live: Iterable[Tensor], *, on: bool = True) -> None:
        self.model, self._live, self._on = model, list(live), on
        self._trees: dict[int, Node | None] = {}  # None: nothing of this batch is kept
        self._watch: Watch | None = None
        self._rest: Iterator[Node] | None = None  # the calls to come; None: compute plainly
        self._taken: list[tuple[nn.Module, Any]] = []  # with the forward they had of their own
        for name, module in model.named_modules():
            if on and not isinstance(module, torch.jit.ScriptModule):
                self._taken.append((module, module.__dict__.get("forward")))
                # What an overlay made of a Linear adds a product or two to that of its weight.
                plain = type(module).forward is nn.Linear.forward
                divided = isinstance(module, nn.Linear) and not plain
                module.__dict__["forward"] = _Call(self, name, module.forward, divided=divided)

    def run(self, key: int, work: Callable[[], R]) -> R:
        """What `work` returns, which calls the model on the batch named `key`, always the same."""
        if not self._on:
            return work()
        if key not in self._trees:
            return self._first(key, work)
        tree = self._trees[key]
        self._rest = None if tree is None else iter(tree.children)
        try:
            return work()
        finally:
            self._rest = None

    def close(self) -> None:
        """Forget everything, and give the modules their forward back.

        Else model and memo would hold each other until the garbage collector comes by.
        """
        for module, own in self._taken:
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own
        self._taken.clear()
        self._trees.clear()

    def kept(self, key: int) -> tuple[str, ...]:
        """Names of the modules whose calls are not repeated for that batch, in their order."""
        tree = self._trees.get(key)
        found = () if tree is None else tree.walk()
        return tuple(node.name for node in found if node.kept and not node.product)

    def _first(self, key: int, work: Callable[[], R]) -> R:
        self._watch = watch = Watch(self._live)
        try:
            with watch:
                result = work()
        finally:
            self._watch = None
        watch.root.settle()
        self._trees[key] = None if watch.lost else watch.root
        return result

    def _product(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        return self._call(_Call(self, name, func), args, kwargs)

    def _call(self, call: _Call, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        if self._watch is not None:
            return self._watch.call(call.name, call.forward, args, inputs, divided=call.divided)
        rest = self._rest
        if rest is None:
            return call.forward(*args, **inputs)
        node = next(rest, None)
        if node is None or node.name != call.name:  # another path than the first time
            self._rest = None
            return call.forward(*args, **inputs)
        if node.kept and node.output is not None:
            return tree_map_only(Tensor, torch.clone, node.output) if node.copied else node.output
        plainly = node.whole or node.copied or node.product
        self._rest = None if plainly else iter(node.children)
        if node.mixed:
            with Products(self._product):
                output = call.forward(*args, **inputs)
        else:
            output = call.forward(*args, **inputs)
        if node.copied:
            node.output = tree_map_only(Tensor, torch.clone, output)
        # Where the path has changed below, the rest of this run is computed plainly too.
        self._rest = rest if plainly or self._rest is not None else None
        return output


@final
class _Call:
    """Stands in for the forward of one module."""

    __slots__ = ("divided", "forward", "memo", "name")

    def __init__(
        self, memo: Memo, name: str, forward: Callable[..., Any], *, divided: bool = False
    ) -> None:
        self.memo, self.name, self.forward, self.divided = memo, name, forward, divided

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return self.memo._call(self, args, inputs)

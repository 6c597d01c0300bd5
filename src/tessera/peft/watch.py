"""What a forward does, seen op by op: which calls of modules would give the same again.

A tensor is *live* if one that will change, or chance, had a part in it, through whatever:
gradients or not, views, writes in place. A call can be kept if nothing live was touched in it, it
wrote to nothing older than itself, and nobody later reads a tensor that was made inside it and is
not its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tessera.ops.registry import OPS

__all__ = ["Node", "Products", "Watch"]

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
# Of a module that is not kept, these alone are worth keeping: of W x + b + B A x the first term.
_PRODUCTS = frozenset({F.linear, torch.addmm})
_UNFORESEEN = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@final
class Node:
    """One call of a module, with the calls inside it that may differ the next time.

    Attributes:
        name: Of the module.
        children: Empty for one that is kept.
        kept: Whether `output` can be taken in place of a call.
        product: Whether it is no module but a matrix product, in a module that does more.
        mixed: Whether some of its products are kept.
        copied: Whether `output` may be written to, so that each time needs a copy of it.
        whole: Whether it must be called as it is, with all that is inside it.
    """

    __slots__ = (
        *("born", "children", "copied", "kept", "mixed", "name", "output", "own", "product"),
        *("read", "stale", "whole", "written"),
    )

    def __init__(self, name: str, born: int, *, product: bool = False) -> None:
        self.name, self.born, self.product = name, born, product
        self.children: list[Node] = []
        self.kept = self.copied = self.whole = self.mixed = False
        self.output: Any = None
        self.stale = False  # something live was touched, or something older written
        self.read = False  # what it made inside was read after it
        self.own = False  # it made its outputs itself, and they share no memory
        self.written = False  # what it gave was written to after it

    def settle(self) -> None:
        """Decide, once the whole forward is known."""
        for child in self.children:
            child.settle()
        self.mixed = any(child.product and child.kept for child in self.children)
        if not self.mixed:
            self.children = [child for child in self.children if not child.product]
        if not self.kept:
            return
        if self.read or (self.written and not self.own):
            self.kept, self.whole, self.output = False, True, None
        elif self.written or self.product:
            self.copied = True  # a module may write into what it has just multiplied
            if self.written:
                self.output = None  # what it was is gone: the next call gives it

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


@final
class Watch(TorchDispatchMode):
    """Enter it around a forward, and lead the calls of its modules through `call`.

    Args:
        live: The tensors that will change.

    Attributes:
        root: Its children are the outermost calls.
        lost: Whether something happened that cannot be followed: nothing may be kept then.
    """

    def __init__(self, live: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's own has no types
        self.root = Node("", 0)
        self.lost = False
        self._stack = [self.root]
        self._live = {storage(t) for t in live}
        self._made: dict[int, int] = {}  # storages made in this forward -> their place in _log
        self._log: list[int] = []
        self._hidden: dict[int, Node] = {}  # storages made inside a kept call -> that call
        self._shown: dict[int, list[Node]] = {}  # storages that kept calls gave -> these calls

    def call(
        self, name: str, forward: Callable[..., Any], args: Any, inputs: Any, *, divided: bool
    ) -> Any:
        """Call a module's forward, and note down what came of it; `divided`: by its products."""
        if not divided:
            return self._note(Node(name, len(self._log)), forward, args, inputs)
        with Products(self._product):
            return self._note(Node(name, len(self._log)), forward, args, inputs)

    def _product(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        return self._note(Node(name, len(self._log), product=True), func, args, kwargs)

    def _note(self, node: Node, forward: Callable[..., Any], args: Any, inputs: Any) -> Any:
        self._stack[-1].children.append(node)
        self._stack.append(node)
        try:
            output = forward(*args, **inputs)
        finally:
            self._stack.pop()
        if not node.stale:
            leaves = tree_leaves(output)
            if all(self._constant(leaf) for leaf in leaves):
                self._keep(node, output, list(tensors(leaves)))
        return output

    def _constant(self, leaf: Any) -> bool:
        if isinstance(leaf, Tensor):
            return not leaf.requires_grad and storage(leaf) not in self._live
        return isinstance(leaf, _PLAIN)

    def _keep(self, node: Node, output: Any, leaves: list[Tensor]) -> None:
        node.kept, node.output, node.children = True, output, []
        shown = {storage(t) for t in leaves}
        node.own = len(shown) == len(leaves) and all(
            self._made.get(s, -1) >= node.born for s in shown
        )
        self._hidden.update((s, node) for s in self._log[node.born :] if s not in shown)
        for s in shown:
            self._shown.setdefault(s, []).append(node)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one op and follow what it touches."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        try:
            self._follow(func, args, kwargs, output)
        except (NotImplementedError, RuntimeError):  # a tensor without a storage, as sparse ones
            self.lost = True
        return output

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        kind = _KINDS.get(func) or _KINDS.setdefault(func, _Kind(func))
        if kind.first:  # of a tensor that Python has just made: so far its address was another's
            args = ()
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        if kwargs or len(given) < len(args):
            given |= {storage(t) for t in tensors((*args, *kwargs.values()))}
        touched = not given.isdisjoint(self._live)
        self.lost |= touched and kind.unforeseen
        touched |= kind.random and _draws(func, args, kwargs)
        if touched:
            for node in self._stack:
                node.stale = True
        for s in self._hidden.keys() & given:
            self._hidden[s].read = True
        for tensor in (output,) if isinstance(output, Tensor) else tensors(_listed(output)):
            s = storage(tensor)
            if s not in given:
                self._made[s] = len(self._log)
                self._log.append(s)
                self._live.discard(s)  # the address of one that is gone
                self._hidden.pop(s, None)
                self._shown.pop(s, None)
            if touched:
                self._live.add(s)
        if kind.writes:
            self._write(_written(func, args, kwargs), touched)

    def _write(self, targets: list[Any], touched: bool) -> None:
        for tensor in tensors(targets):
            s = storage(tensor)
            if s not in self._made:  # a buffer, an input: earlier reads saw something else
                self.lost = True
                return
            if touched:
                self._live.add(s)
            for node in self._stack:
                node.stale |= node.born > self._made[s]
            for node in self._shown.get(s, ()):
                node.written = True


@final
class _Kind:
    """What is known of an op before it is called."""

    __slots__ = ("first", "random", "unforeseen", "writes")

    def __init__(self, func: Any) -> None:
        self.first = func is torch.ops.aten.lift_fresh.default
        self.unforeseen = any(tag in func.tags for tag in _UNFORESEEN)
        self.random = torch.Tag.nondeterministic_seeded in func.tags
        self.writes = bool(func._schema.is_mutable)


_KINDS: dict[Any, _Kind] = {}


@final
class Products(TorchFunctionMode):
    """Leads the matrix products of a block through ``through(name, function, args, kwargs)``.

    Only for the forward of a Linear: other modules may look whether such a mode is on, and go
    another way.
    """

    def __init__(self, through: Callable[[str, Any, Any, Any], Any]) -> None:
        super().__init__()
        self._through = through

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS:
            return self._through(func.__name__, func, args, kwargs or {})
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "tessera":
            # Unwatched, the body is what runs (`Op.__call__`): so the body is watched.
            with self:
                return OPS[func._opname].body(*args)
        return func(*args, **(kwargs or {}))


def storage(tensor: Tensor) -> int:
    """The address of what holds a tensor's values, whichever view it is."""
    return int(tensor.untyped_storage()._cdata)


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def _listed(output: Any) -> Iterable[Any]:
    return output if isinstance(output, list | tuple) else ()


def _named(func: Any, args: tuple[Any, ...], kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            yield argument, args[i]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _written(func: Any, args: tuple[Any, ...], kwargs: Any) -> list[Any]:
    named = list(_named(func, args, kwargs))
    if any(a.name in ("training", "train") and value is False for a, value in named):
        return []  # batch norm writes its running statistics in train mode only
    return [v for a, v in named if a.alias_info is not None and a.alias_info.is_write]


def _draws(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether an op that may draw random numbers does: attention without dropout does not."""
    given = {a.name: value for a, value in _named(func, args, kwargs)}
    chance = [a.name for a in func._schema.arguments if a.name == "dropout_p"]
    return not chance or given.get(chance[0], 0.0) != 0.0

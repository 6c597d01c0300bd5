"""Fast weights: a scope in which a model runs under deltas, in this thread alone."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from types import CodeType, FrameType
from typing import Any, Final, cast, final
from weakref import ref

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tessera.arch.base import named, placement
from tessera.arch.delta import Delta
from tessera.arch.overlay import overlay
from tessera.errors import InputError

__all__ = ["fastweights"]


@contextmanager
def fastweights(model: nn.Module, fast: Delta | Sequence[Delta]) -> Iterator[None]:
    """A scope in which `model`, itself, runs under deltas: ``W + sum scale B A``.

    It holds for calls of the model and of its parts, and for whoever reads a changed parameter
    (``model.head.weight``), in this thread, or asyncio task, alone: others see the base meanwhile.
    No tensor of the model is replaced. Gradients flow through the deltas' tensors to what they
    were made from, and into the base where that has ``requires_grad``. Scopes nest: changes add
    up, whatever the order, as in `arch.overlay`; over a part and over its whole they do too. A task
    that was started in a scope is in it, until it ends.

    The model keeps the mode it has on entry. `peft.apply`, `maml_step` and what else reads the
    model instead of calling it are not within a scope. Nor is a backward: what a checkpoint
    computes again there is what it computed before.

    Args:
        model: The base. It is not changed.
        fast: A delta of it, or several.

    Raises:
        UnknownNameError: A delta lies over a module the model lacks.
        DeltaError: A delta is of another base, or one of its tensors does not fit.
        InputError: There is no delta; a scope is open over a model that shares some modules; or,
            at a call, the mode was changed, or a checkpoint would call again outside.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.ones(1, 2)
        >>> change = {"A": torch.ones(1, 2), "B": torch.ones(1, 1, requires_grad=True)}
        >>> fast = Delta(kind="lora", tensors=change, scales={"": 3.0})
        >>> before = model(x)
        >>> with fastweights(model, fast):
        ...     inside = model(x)
        >>> inside.sum().backward()
        >>> round((inside - before).item()), change["B"].grad.item(), torch.equal(model(x), before)
        (6, 6.0, True)
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"fastweights needs a torch.nn.Module, got {type(model).__name__}")
    deltas = [fast] if isinstance(fast, Delta) else list(fast)
    if not deltas or not all(isinstance(delta, Delta) for delta in deltas):
        raise InputError("fastweights needs at least one arch.Delta, such as a HyperNet emits")
    # A compiled module is a shell around the one that is called in the end.
    root = cast(nn.Module, getattr(model, "_orig_mod", model))
    entry, before = _Entry(root, deltas), _still_open(_STATE.get())
    inside = _joined(before, entry)
    modules = list(named(root).values())
    _hold(modules)
    _STATE.set(inside)
    try:
        yield
    finally:
        entry.closed = True
        _release(modules)
        now = _STATE.get()
        # Generators may leave their scopes in another order, or in another context.
        _STATE.set(before if now is inside else _still_open(now))


# --- what holds in a context --------------------------------------------------------------------


@final
class _Entry:
    """One scope: a model and the deltas over it. A task that was started within may outlive it."""

    def __init__(self, root: nn.Module, deltas: Sequence[Delta]) -> None:
        self.root, self.deltas, self.closed = root, deltas, False


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _State:
    """The scopes of a context, outer first, and what they make of each module.

    Attributes:
        entries: The scopes.
        twins: id of a module -> the module, which lives as long, and its twin under the deltas.
        backward: The backward in which the last scope was entered; -1 for none.
        checkpoints: How many checkpointed functions it was entered in.
    """

    entries: tuple[_Entry, ...] = ()
    twins: dict[int, tuple[nn.Module, nn.Module]]
    backward: int = -1
    checkpoints: int = 0


_OUTSIDE: Final = _State(twins={})
_STATE: ContextVar[_State] = ContextVar("tessera.meta.fastweights", default=_OUTSIDE)


def _joined(state: _State, entry: _Entry) -> _State:
    """`state` with one more scope inside."""
    top = entry.root
    for other in state.entries:
        top = other.root if _within(top, other.root) else top
    inside, entries = named(top), (*state.entries, entry)
    laid: list[tuple[Delta, float]] = []
    for other in entries:
        if _within(other.root, top):
            laid += [(_at_home(delta, other.root, top), 1.0) for delta in other.deltas]
        elif not {id(m) for m in inside.values()}.isdisjoint(map(id, named(other.root).values())):
            raise InputError(
                f"a scope is open over a {type(other.root).__name__} that has some modules in "
                f"common with this {type(top).__name__}, and neither is a part of the other; lay "
                "both deltas over the whole model"
            )
    token = _STATE.set(_OUTSIDE)  # a shadow is made of the base
    try:
        shadow = named(overlay(top, laid))
    finally:
        _STATE.reset(token)
    twins = {id(module): (module, shadow[name]) for name, module in inside.items()}
    return _State(
        entries=entries,
        twins={**state.twins, **twins},
        backward=torch._C._current_graph_task_id(),
        checkpoints=_checkpoints(),
    )


def _within(part: nn.Module, whole: nn.Module) -> bool:
    return part is whole or placement(part, whole) is not None


def _still_open(state: _State) -> _State:
    """`state` had the scopes that were closed meanwhile never been entered."""
    if not any(entry.closed for entry in state.entries):
        return state
    left = _OUTSIDE
    for entry in state.entries:
        left = left if entry.closed else _joined(left, entry)
    if left is _OUTSIDE:
        return left
    return replace(left, backward=state.backward, checkpoints=state.checkpoints)


def _at_home(delta: Delta, root: nn.Module, top: nn.Module) -> Delta:
    """A delta of a part, told whose part, so that it can be laid over the whole."""
    if root is top or delta._home:
        return delta
    return replace(delta, _home=[ref(root)])


def _twin(module: nn.Module) -> nn.Module | None:
    """What stands in for a module here and now; None outside of a scope."""
    state = _STATE.get()
    if any(entry.closed for entry in state.entries):
        state = _still_open(state)
        _STATE.set(state)
    found = state.twins.get(id(module))
    if found is None or torch._C._current_graph_task_id() != state.backward:
        return None
    if found[1].training != module.training:
        raise InputError(
            f"the mode of this {type(found[0]).__name__} was changed within fastweights; call "
            "train() or eval() before the scope"
        )
    if _checkpoints() > state.checkpoints:
        raise InputError(
            "torch.utils.checkpoint would call the model again in the backward, where the scope "
            "of fastweights does not hold, and give wrong gradients. Enter the scope within the "
            "checkpointed function, or checkpoint within the model's own forward"
        )
    return found[1]


_CHECKPOINT: Final[CodeType] = inspect.unwrap(checkpoint).__code__


def _checkpoints() -> int:
    """How many checkpointed functions are running."""
    count, frame = 0, cast("FrameType | None", sys._getframe())
    while frame is not None:
        count += frame.f_code is _CHECKPOINT
        frame = frame.f_back
    return count


# --- how a call gets there ------------------------------------------------------------------------

# While some scope is open over it, in any thread, a module is of a subclass that asks for its twin
# first. A class is exchanged at once and has nothing to do with tensors, so that a thread that is
# in the middle of a forward notices nothing.
_LOCK = threading.Lock()
_HELD: dict[int, int] = {}


def _hold(modules: Sequence[nn.Module]) -> None:
    with _LOCK:
        for module in modules:
            if id(module) not in _HELD:
                _give_class(module, _scoped(cast(Any, type(module))))
            _HELD[id(module)] = _HELD.get(id(module), 0) + 1


def _release(modules: Sequence[nn.Module]) -> None:
    with _LOCK:
        for module in modules:
            _HELD[id(module)] -= 1
            if not _HELD[id(module)]:
                del _HELD[id(module)]
                plain = vars(type(module)).get("scoped_from")
                if plain is not None:  # else somebody else has given it a class meanwhile
                    _give_class(module, plain)


def _give_class(module: nn.Module, cls: type) -> None:
    object.__setattr__(module, "__class__", cls)  # nn.Module's own would look for parameters


@cache
def _scoped(cls: Any) -> Any:
    """The subclass of `cls` that asks for a twin; to whoever looks it goes by the same name."""
    # Not at the top: torch.compiler brings the whole compiler, which an import need not wait for.
    seen = "who asks must be seen at each call"
    twin_of: Any = torch.compiler.disable(_twin, reason=seen)  # type: ignore[no-untyped-call]  # torch

    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        twin = twin_of(self)
        return cls.__call__(self, *args, **kwargs) if twin is None else twin(*args, **kwargs)

    def call_impl(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        twin = twin_of(self)  # torch.compile has kept the `__call__` there was
        return cls._call_impl(self, *args, **kwargs) if twin is None else twin(*args, **kwargs)

    def read(self: Any, name: str) -> Any:
        # Of parameters, buffers and submodules alone: `nn.Module` keeps them elsewhere.
        twin = twin_of(self) if name in self.__dict__.get("_parameters", ()) else None
        return cls.__getattr__(self, name) if twin is None else getattr(twin, name)

    def reduce(self: Any, _: Any) -> Any:
        # A copy is of the plain class, and nothing of the scope goes with it.
        made = cls.__reduce_ex__(self, 1)  # of protocol 2 pickle compares the class with our own
        if isinstance(made, str):
            return made
        maker, given, *rest = made
        return maker, tuple(cls if part is own else part for part in given), *rest

    def replicate(self: Any) -> Any:
        raise InputError("nn.DataParallel calls in threads of its own, where no fastweights hold")

    own: Any = type(
        cls.__name__,
        (cls,),
        {
            "scoped_from": cls,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__call__": call,
            "_call_impl": call_impl,
            "__getattr__": read,
            "__reduce_ex__": reduce,
            "_replicate_for_data_parallel": replicate,
        },
    )
    return own

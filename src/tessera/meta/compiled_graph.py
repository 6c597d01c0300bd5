"""A meta-gradient for one shape of batches: traced, compiled, and not trusted unless it agrees."""

from __future__ import annotations

import contextlib
import importlib
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from tessera.errors import TesseraError
from tessera.graph.ir import Program, TensorType
from tessera.meta.compiled_cache import Kernel, Unbuilt, build, load, place
from tessera.meta.inner import require_finite

__all__ = ["Compiled", "Gradients", "Result", "kinds"]

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """A meta-gradient.

    Attributes:
        outer: The outer loss, 0-d, detached.
        losses: [steps, tasks], the inner ones.
        leaves: What the outer loss depends on.
        gradients: By each of them.
    """

    outer: Tensor
    losses: Tensor
    leaves: Sequence[Tensor]
    gradients: Sequence[Tensor]


# The same for tensors being traced, which have no values, and for real ones.
Gradients: TypeAlias = Callable[[Sequence[Tensor]], Result]


def kinds(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a graph is compiled for: shapes, dtypes, devices, and what requires a gradient.

    Example:
        >>> kinds([torch.zeros(2)]) == kinds([torch.ones(2)])
        True
    """
    return tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)


@final
class Compiled:
    """A meta-gradient for batches of one shape.

    Args:
        gradients: What is compiled.
        given: The batches, for their shape.
        background: Compile in a thread, and be `ready` later.
        held: Kept alive as long as this, so that no other gets its identity.
    """

    def __init__(
        self, gradients: Gradients, given: Sequence[Tensor], *, background: bool, held: Any
    ) -> None:
        self._eager, self._held = gradients, held
        self._kernel: Kernel | None = None
        self._why: Unbuilt | None = None
        self._calls, self._done = 0, threading.Event()
        self._tensors: list[Tensor] = []
        try:
            _require_cpu(given)
            program = self._traced(given)
        except Unbuilt as error:
            self._give_up(error)
            return
        self._of = kinds(self._tensors)
        devices = [str(t.device) for t in (*given, *self._tensors)]
        work = threading.Thread(
            target=self._make, args=(program, devices), name="tessera-meta", daemon=True
        )
        if background:
            work.start()
        else:
            self._make(program, devices)

    def fits(self) -> bool:
        """Whether what it closes over still has the dtypes and shapes it was compiled for."""
        return not self._tensors or kinds(self._tensors) == self._of

    def ready(self, *, wait_s: float = 0.0) -> bool:
        """Whether it is compiled, after waiting for up to `wait_s` seconds."""
        if self._done.wait(wait_s):
            self._tell()
        return self._kernel is not None

    def __call__(self, given: Sequence[Tensor], sure: Callable[[], Result]) -> Result:
        """The compiled result; now and then, and when in doubt, that of `sure`.

        Raises:
            NonFiniteError: An inner loss is NaN or infinite.
        """
        kernel, error = self._kernel, None
        self._calls += 1
        found: Result | None = None
        try:
            found = self._run(kernel, given) if kernel is not None else None
        except RuntimeError as raised:
            error = raised
        if found is not None and not _is_power_of_ten(self._calls):
            require_finite(found.losses)
            return found
        expected = sure()  # raises what is to be raised for these batches
        if found is None or not _agree(found, expected):
            why = f"it failed: {error}" if error else "its result was another one"
            self._give_up(Unbuilt(f"{why} (call {self._calls})"))
            self._tell()
        return expected

    def _run(self, kernel: Kernel, given: Sequence[Tensor]) -> Result:
        kind = given[0].device.type
        plain: Any = contextlib.nullcontext()
        if torch.is_autocast_enabled(kind):  # its casts are in the graph already
            plain = torch.autocast(kind, enabled=False)
        with torch.no_grad(), plain:
            outer, losses, *found = kernel([_laid_out(t) for t in (*given, *self._tensors)])
        return Result(outer=outer, losses=losses, leaves=self._leaves, gradients=found)

    def _traced(self, given: Sequence[Tensor]) -> Program:
        """The whole as a program whose constants became inputs: `_tensors`, live."""
        tracer: Any = importlib.import_module("tessera.graph.trace")  # brings sympy
        leaves: list[Tensor] = []

        def whole(*values: Any) -> list[Tensor]:
            found = self._eager(values[: len(given)])
            leaves[:] = found.leaves
            return [found.outer, found.losses, *found.gradients]

        # Copies: examples that share memory would be traced as one.
        examples = {f"given{i}": t.detach().clone() for i, t in enumerate(given)}
        try:
            with warnings.catch_warnings():  # of PyTorch, which looks at .grad of a learned rate
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not")
                program: Program = tracer.trace(
                    whole, examples, {}, name="meta_gradient", joint=True
                )
        except (TesseraError, RuntimeError, TypeError, NotImplementedError) as error:
            raise Unbuilt(f"it cannot be traced: {str(error).splitlines()[0]}") from error
        self._leaves = leaves
        self._tensors = [c.tensor for c in program.constants]
        inputs = [(c.name, TensorType.of(c.tensor)) for c in program.constants]
        return replace(program, inputs=(*program.inputs, *inputs), constants=())

    def _make(self, program: Program, devices: list[str]) -> None:
        device = torch.device(devices[0])
        try:
            path = place(program, devices)
            try:
                self._kernel = load(path, device)
            except Unbuilt:
                build(program, devices, path)
                self._kernel = load(path, device)
        except Unbuilt as error:
            self._give_up(error)
        finally:
            self._done.set()

    def _give_up(self, why: Unbuilt) -> None:
        """The warning is for who calls, and this may run in a thread."""
        self._kernel, self._why = None, why
        self._done.set()

    def _tell(self) -> None:
        why, self._why = self._why, None
        if why is not None:
            warnings.warn(
                f"MetaStep runs uncompiled for batches of this shape: {why}. The results are "
                "right, and come later",
                stacklevel=4,
            )


def _require_cpu(given: Sequence[Tensor]) -> None:
    """On an H200, with PyTorch 2.11, the loader of what was compiled ended the whole process."""
    if any(t.device.type != "cpu" for t in given):
        raise Unbuilt(f"it is compiled for the CPU alone, and the batches are on {given[0].device}")


def _laid_out(t: Tensor) -> Tensor:
    """As the compiled code takes it for granted: dense, and at an address it may vectorize."""
    t = t.detach().contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _is_power_of_ten(n: int) -> bool:
    while n % 10 == 0:
        n //= 10
    return n == 1


def _agree(a: Result, b: Result) -> bool:
    """Whether two results are one up to rounding, each tensor by its norm."""
    if [t.shape for t in a.gradients] != [t.shape for t in b.gradients]:
        return False
    every = [g.double().norm().item() for g in b.gradients]
    # A gradient that is zero but for rounding is so in proportion to the others.
    floor = 1e-2 * max(every, default=0.0)
    pairs = [(a.outer, b.outer, 0.0), (a.losses, b.losses, 0.0)]
    pairs += [(x, y, floor) for x, y in zip(a.gradients, b.gradients, strict=True)]
    return all(_near(x, y, floor) for x, y, floor in pairs)


def _near(x: Tensor, y: Tensor, floor: float) -> bool:
    tolerance = _TOLERANCE.get(y.dtype, 5e-2)
    fine = torch.isfinite(y)
    if not torch.equal(torch.isfinite(x), fine):
        return False
    zero = torch.zeros((), dtype=torch.float64, device=y.device)
    x, y = torch.where(fine, x.double(), zero), torch.where(fine, y.double(), zero)
    return bool((x - y).norm() <= tolerance * (y.norm() + floor) + 1e-30)

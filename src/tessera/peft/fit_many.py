"""`fit_many`: the inner loops of many tenants as one, each row of the batch under its own delta."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tessera.arch.delta import Delta
from tessera.arch.overlay import placed, shadow_tree
from tessera.arch.rows import StackedModel
from tessera.arch.stack import Stack
from tessera.errors import DeltaError, InputError, TesseraError
from tessera.peft.descent import Course, Purse, descend
from tessera.peft.fit import fit_one, fitting, home_of, require_trainable
from tessera.peft.memo import Memo
from tessera.peft.shots import LossFn, Shots, loss_of, own_loss, read_shots
from tessera.profiler import Budget

__all__ = ["fit_many"]


def fit_many(
    deltas: Sequence[Delta],
    shots_list: Sequence[Any],
    *,
    steps: int = 20,
    lr: float = 5e-3,
    loss_fn: LossFn | None = None,
    budget: Budget | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
) -> list[Delta]:
    """Fit many deltas, each to shots of its own, together: as `fit` one by one, to rounding.

    Deltas of one kind and shape, with shots alike but for their number, go through the model in one
    batch, a row under its delta each; the losses are summed, so that no gradient reaches another's
    delta, and each stops by itself. What cannot share a batch is fitted in turn: other shapes, a
    loss the model computes over the whole batch, deltas over modules without a batched form
    (convolutions, embeddings, masks). The rows of a batch must not influence each other, as in eval
    mode they do not.

    Args:
        deltas: Live ones; no two share a tensor.
        shots_list: For each delta its shots, as `fit` takes them.
        steps: Most steps of each delta, >= 1.
        lr: As in `fit`.
        loss_fn: As in `fit`; called with the output and the y of one delta at a time.
        budget: Caps of the whole call; groups fitted in turn share what is left evenly.
        model: As in `fit`, of all deltas.
        seed: As in `fit`, the same for each.

    Returns:
        The same deltas, in order.

    Raises:
        InputError: As `fit`; the lengths of the lists differ; a delta is given twice. The message
            names the delta by its place.
        DeltaError: As `fit`.
        NonFiniteError: One loss became NaN or infinite. Whatever is raised, all deltas are as they
            were.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> def fresh():
        ...     tensors = {"gain_out": torch.ones(2, requires_grad=True)}
        ...     return Delta(kind="ia3", tensors=tensors)
        >>> shots = [(torch.eye(3)[:1], torch.tensor([label])) for label in (0, 1)]
        >>> one, two = fit_many([fresh(), fresh()], shots, model=model)
        >>> bool((one.tensors["gain_out"] != two.tensors["gain_out"]).any())
        True
    """
    course = Course(steps=steps, lr=lr, loss_fn=loss_fn, seed=seed, purse=Purse(budget))
    jobs = _jobs(list(deltas), list(shots_list), model)
    groups: dict[Any, list[_Job]] = {}
    for job in jobs:
        groups.setdefault(_likeness(job), []).append(job)
    queue = list(groups.values())
    with fitting([leaf for job in jobs for leaf in job.delta.parameters()], course.purse):
        while queue:
            group, waiting = queue.pop(0), len(queue)
            if len(group) > 1:
                if not _together(group, course, waiting):
                    queue[:0] = [[job] for job in group]
                continue
            job = group[0]
            fit_one(job.delta, job.base, job.parts, course, name=job.name, waiting=waiting)
    return [job.delta for job in jobs]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Job:
    """A delta with its shots; `here` is the delta under the names of the whole base."""

    name: str
    delta: Delta
    here: Delta
    base: nn.Module
    parts: list[Shots]


def _jobs(deltas: list[Delta], shots: list[Any], model: nn.Module | None) -> list[_Job]:
    if len(deltas) != len(shots):
        raise InputError(
            f"peft.fit_many needs shots for each delta, got {len(deltas)} deltas and shots for "
            f"{len(shots)}"
        )
    jobs, owner = [], dict[int, int]()
    for i, (delta, own) in enumerate(zip(deltas, shots, strict=True)):
        name = f"peft.fit_many: deltas[{i}]"
        base = home_of(delta, model, name)
        for leaf in require_trainable(delta, name):
            first = owner.setdefault(leaf.data_ptr(), i)
            if first != i:
                raise InputError(
                    f"{name} shares a tensor with deltas[{first}]: give each delta once; "
                    "delta.trainable() makes a copy"
                )
        # Whose delta it is has been checked here, by the base itself.
        here = replace(placed(delta, base), base_hash="", _home=[])
        parts = read_shots(own, f"peft.fit_many: shots_list[{i}]", base)
        jobs.append(_Job(name=name, delta=delta, here=here, base=base, parts=parts))
    return jobs


def _likeness(job: _Job) -> Any:
    """Equal for jobs that may share a batch; the job's own where it can share none."""
    floating = [t for t in job.here.tensors.values() if t.is_floating_point()]
    if not all(t.requires_grad and t.dtype == floating[0].dtype for t in floating):
        return id(job)
    tensors = sorted((n, tuple(t.shape)) for n, t in job.here.tensors.items())
    looks = [
        id(job.base),
        job.here.kind,
        floating[0].dtype,
        tensors,
        sorted(job.here.scales.items()),
    ]
    looks += [(k, job.here.info[k]) for k in ("layers", "heads", "sites") if k in job.here.info]
    for part in job.parts:
        fields = part.x.items() if isinstance(part.x, dict) else [("", part.x)]
        looks += [sorted((k, _shape(v)) for k, v in fields), _shape(part.y)]
    return repr(looks)


def _shape(value: Any) -> str:
    """What must be the same for values to be put one behind the other."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape[1:])}"
    return repr(value) if isinstance(value, bool | int | float | str | None) else str(type(value))


def _together(group: Sequence[_Job], course: Course, waiting: int) -> bool:
    """Fit jobs that look alike in one batch; False, with nothing done, where that cannot be."""
    try:
        bench = _Bench(group, course.loss_fn)
    except DeltaError:
        return False
    with contextlib.closing(bench):
        try:
            descend(
                [bench.stack.values],
                bench.losses,
                course,
                names=[job.name for job in group],
                parts=len(bench.batches),
                rows=len(bench.stack.values),
                waiting=waiting,
            )
        except TesseraError:
            if bench.apart:
                return False
            raise
        bench.unload()
    return True


@final
class _Bench:
    """Jobs side by side: their deltas in a stack, their shots in batches.

    `apart` becomes True where the model turns out not to work row by row: these jobs then have to
    be done one by one, and what is really wrong with one of them shows there.
    """

    def __init__(self, group: Sequence[_Job], loss_fn: LossFn | None) -> None:
        self._group, self._loss_fn = group, loss_fn
        self.stack = Stack([job.here for job in group], trainable=True)
        self._model = StackedModel(_frozen(group[0].base), self.stack)
        shadow = self._model.module
        for module in shadow.modules():
            module.__dict__["training"] = False
        # Virtual tokens reach every layer: there is nothing to remember.
        self._memo = Memo(shadow, [self.stack.values], on=not self.stack.tokens)
        parts = range(len(group[0].parts))
        self.batches = [_batch([job.parts[i] for job in group]) for i in parts]
        self.apart = False
        self.close = self._memo.close

    def losses(self, part: int) -> Tensor:
        """The loss of each delta on its own shots."""
        return self._memo.run(part, partial(self._work, part))

    def _work(self, part: int) -> Tensor:
        args, named, rows, counts = self.batches[part]
        self.apart = True
        output = self._model(*args, **named, rows=rows)
        each = _split(output, counts, logits=self._loss_fn is None)
        if each is None:
            raise InputError("this output cannot be divided among deltas")
        self.apart = False
        return torch.stack(
            [
                loss_of(own, job.parts[part].y, self._loss_fn, job.name)
                for own, job in zip(each, self._group, strict=True)
            ]
        )

    @torch.no_grad()
    def unload(self) -> None:
        """Write the fitted values into the deltas."""
        for slot, job in enumerate(self._group):
            found = self.stack.unpack(slot)
            for name, tensor in zip(job.here.tensors, job.delta.tensors.values(), strict=True):
                if name in found:
                    tensor.copy_(found[name])


def _frozen(base: nn.Module) -> nn.Module:
    """The base's modules around parameters that share its memory and take no gradient."""
    tree = shadow_tree(base, {}, frozen=True)
    for module in tree.modules():
        own = module.__dict__["_parameters"]
        for name, p in own.items():
            own[name] = None if p is None else nn.Parameter(p, requires_grad=False)
    return tree


def _batch(
    parts: Sequence[Shots],
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, list[int]]:
    """Shots end to end, as a model's arguments; the slot of each row; how many rows a slot has."""
    counts = [part.rows for part in parts]
    rows = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(counts))
    fields = [part.x if isinstance(part.x, dict) else {"": part.x} for part in parts]
    x = {
        name: torch.cat([f[name] for f in fields]) if isinstance(value, Tensor) else value
        for name, value in fields[0].items()
    }
    rows = rows.to(next(v.device for v in x.values() if isinstance(v, Tensor)))
    return ((), x, rows, counts) if isinstance(parts[0].x, dict) else ((x[""],), {}, rows, counts)


def _split(output: Any, counts: list[int], *, logits: bool) -> list[Any] | None:
    """The output of each delta; None where the output has no rows to divide.

    What is no tensor in it, as a cache of keys and values, no delta gets: None stands there.
    """
    if logits and not isinstance(output, Tensor):
        if own_loss(output) is not None:
            return None  # a mean over all rows
        output = getattr(output, "logits", None)
    leaves, form = tree_flatten(output)
    own = [leaf if isinstance(leaf, Tensor) else None for leaf in leaves]
    if not any(t is not None for t in own):
        return None
    if any(t is not None and t.shape[:1] != (sum(counts),) for t in own):
        return None
    each = [None if t is None else torch.split(t, counts) for t in own]
    return [
        tree_unflatten([None if parts is None else parts[i] for parts in each], form)
        for i in range(len(counts))
    ]

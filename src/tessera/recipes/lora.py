"""A recipe that gives every task weights of its own, over a base that stands still."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import arch, peft, random, retrieval
from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch, Task
from tessera.errors import InputError
from tessera.recipes.run import Run

__all__ = ["head_and_sites", "lora", "over", "rank_of"]

_RANK = 8
_SCALE = 4  # B starts at zero: with a scale of 4 a delta keeps up with weights set free


def lora(run: Run) -> None:
    """Parameter isolation: the first task trains the base, each later one a delta over it."""
    head, sites = head_and_sites(run)
    router = run.keep("router", _Router(run))
    run.answer = router.answer
    for task in run.tasks():
        model: Callable[[Tensor], Tensor] = run.model
        params: Iterable[Tensor] = run.model.parameters()
        if task.id > 1:
            router.learn(task)
            delta = run.deltas.get(f"task{task.id}")
            if delta is None:  # else the run was resumed within its task
                seed = random.key(run.seed, "lora", task.id)
                r = rank_of(run.model, sites, _RANK)
                delta = peft.lora(run.model, r, _SCALE * r, sites=sites, head=head, seed=seed)
                run.deltas[f"task{task.id}"] = delta
            model, params = over(run.model, delta), delta.parameters()
        optimizer = run.keep("optimizer", tg.Adam(params, lr=run.lr))

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            return T.cross_entropy(router.only(task.id, model(batch.x)), batch.y)

        for batch in run.batches(task):
            run.log(step(batch))
        if task.id == 1:
            router.learn(task)


def head_and_sites(run: Run) -> tuple[str, list[str]]:
    """The model's last nn.Linear, and the others; of a single layer itself.

    Raises:
        InputError: The last one does not give the logits.

    Example:
        >>> from tessera import data, recipes
        >>> bench = data.benchmark("digits")
        >>> settings = recipes.Settings(recipe="lora").resolved()
        >>> head_and_sites(Run(recipes.mlp(bench.input_shape, 10), bench, settings))
        ('5', ['1', '3'])
    """
    named = [(n, m) for n, m in run.model.named_modules() if isinstance(m, nn.Linear)]
    if not named or named[-1][1].out_features != run.bench.num_classes:
        raise InputError(
            f"the recipe {run.settings.recipe} needs a model whose last nn.Linear gives the "
            f"{run.bench.num_classes} logits: it is the head that is learned anew"
        )
    return named[-1][0], [n for n, _ in named[:-1] or named]


def rank_of(base: nn.Module, sites: Iterable[str], most: int) -> int:
    """`most`, or what the smallest of these layers allows.

    Example:
        >>> rank_of(nn.Sequential(nn.Linear(9, 4)), ["0"], 8)
        4
    """
    layers = [m for m in map(base.get_submodule, sites) if isinstance(m, nn.Linear)]
    return min(most, *(min(m.in_features, m.out_features) for m in layers))


def over(base: nn.Module, delta: arch.Delta | None) -> Callable[[Tensor], Tensor]:
    """The base, or the base under a delta.

    Example:
        >>> base = nn.Linear(1, 1)
        >>> over(base, None) is base
        True
    """
    if delta is None:
        return base
    found: Any = peft.apply(base, delta)  # of a stack it would want rows= as well
    return cast(Callable[[Tensor], Tensor], found)


@final
class _Router:
    """Which task a row is of, where that is not told: that of the nearest vector stored.

    Near in what every nn.Linear of the frozen base but its first is given, each at length 1: deep
    layers see what the first task's classes need and little else, early ones see more. At most
    `run.buffer` vectors are stored, each task's share of them, and no row of the data; only where
    the head is the model's one layer are its inputs the rows.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        linear = [m for m in run.model.modules() if isinstance(m, nn.Linear)]
        self._layers = linear[1:] or linear
        self._index = retrieval.Index(dim=sum(m.in_features for m in self._layers))
        self._stored: dict[int, Tensor] = {}  # task -> [rows, features]

    def learn(self, task: Task) -> None:
        """Store the task's share of vectors, unless that was done before; the base stands still."""
        self._run.model.eval().requires_grad_(False)  # a norm's statistics are base too
        if task.id not in self._stored:
            share = max(1, self._run.buffer // len(self._run.bench))
            self._add(task.id, self._features(self._run.examples(task, share)[0].x))

    def answer(self, x: Tensor, told: int | None) -> Tensor:
        """The logits of each row by the delta of its task, of which the base is the first."""
        tasks = self._tasks(x) if told is None else torch.full((len(x),), told)
        logits = x.new_empty(len(x), self._run.bench.num_classes)
        for task in sorted(set(tasks.tolist())):
            model = over(self._run.model, self._run.deltas.get(f"task{task}"))
            found = model(x[tasks == task])
            logits[tasks == task] = self.only(task, found) if task in self._stored else found
        return logits

    def only(self, task: int, logits: Tensor) -> Tensor:
        """The logits with -inf at classes that the task does not have."""
        own = self._run.bench.tasks[task - 1].classes
        others = [c for c in range(logits.shape[-1]) if c not in own]
        return logits.index_fill(-1, torch.tensor(others, dtype=torch.int64), float("-inf"))

    def _tasks(self, x: Tensor) -> Tensor:
        if len(self._stored) < 2:
            return torch.ones(len(x), dtype=torch.int64)
        nearest = self._index.query_batch(self._features(x), k=1)
        return torch.tensor([hits.payloads[0] for hits in nearest])

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            mean = args[0].reshape(len(x), -1, args[0].shape[-1]).mean(1)  # over positions
            seen.append(F.normalize(mean, dim=-1))

        hooks = [m.register_forward_pre_hook(hook) for m in self._layers]
        try:
            self._run.model(x)
        finally:
            for h in hooks:
                h.remove()
        return torch.cat(seen, 1) + 1e-6  # a row of zeros would have no direction

    def _add(self, task: int, vectors: Tensor) -> None:
        self._stored[task] = vectors
        self._index.add(vectors, [task] * len(vectors))

    def state_dict(self) -> dict[int, Tensor]:
        """The stored vectors of each task."""
        return dict(self._stored)

    def load_state_dict(self, state: Mapping[int, Any]) -> None:
        """Take over what `state_dict` gave."""
        for task, vectors in state.items():
            self._add(task, vectors)

"""A delta for each task over a base that stands still, read top to bottom.

    python examples/continual/lora_tasks.py

Five pairs of digits arrive one after the other. The first pair trains the base; every later one
gets a small LoRA delta and a head of its own, so nothing that was learned can be overwritten. What
is left to do is to know whose turn it is: told the task, or by looking up which task's rows a new
one lies near.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tessera import arch, data, peft, retrieval
from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch, Task

EPOCHS, BATCH, LR, RANK, STORED, SEED = 20, 32, 2e-3, 8, 40, 0

torch.manual_seed(SEED)
bench = data.benchmark("digits", scenario="domain")  # one head of two: first or second of the pair
base = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)
)
deltas: dict[int, arch.Delta] = {}
index = retrieval.Index(dim=256)  # vectors of the base -> the task they are of


def train(model: nn.Module | peft.Applied, params: Iterable[Tensor], task: Task) -> None:
    """A plain loop; what it moves is what it is given."""
    optimizer = tg.Adam(params, lr=LR)

    @tg.training_step(optimizer=optimizer)
    def step(batch: Batch) -> Tensor:
        return T.cross_entropy(model(batch.x), batch.y)

    for _ in range(EPOCHS):
        for rows in torch.randperm(len(task.train.x)).split(BATCH):
            step(Batch(task.train.x[rows], task.train.y[rows]))


@torch.no_grad()
def features(x: Tensor) -> Tensor:
    """What the first layer makes of rows: early layers see more than the first task needs."""
    seen: Tensor = base[:3](x)
    return seen


for task in bench:
    if task.id == 1:
        train(base, base.parameters(), task)
        base.requires_grad_(False).eval()
        before = arch.base_hash(base)
    else:
        # Sites 1 and 3 get LoRA; the head, module 5, is trained whole, as a copy of its own.
        delta = peft.lora(base, RANK, alpha=4 * RANK, sites=["1", "3"], head="5", seed=task.id)
        train(peft.apply(base, delta), delta.parameters(), task)
        deltas[task.id] = delta
    some = torch.randperm(len(task.train.x))[:STORED]
    index.add(features(task.train.x[some]), [task.id] * STORED)

print(
    "the base after five tasks is, bit for bit, that of after one:", arch.base_hash(base) == before
)


def accuracy(task: Task, rows: Tensor) -> float:
    """Row i of the test set answered by delta rows[i] of the stack; -1 is the base."""
    with torch.no_grad():
        logits = peft.apply(base, stack)(task.test.x, rows=rows)
    return float((logits.argmax(1) == task.test.y).float().mean())


stack = peft.stack(list(deltas.values()))  # every row of a batch may name another delta
known, found, right = [], [], []
for task in bench:
    n = len(task.test.x)
    told = torch.full((n,), task.id - 2)  # task 1 is the base, task 2 the first delta
    hits = index.query_batch(features(task.test.x), k=1)
    routed = torch.tensor([h.payloads[0] - 2 for h in hits])
    known.append(accuracy(task, told))
    found.append(accuracy(task, routed))
    right.append(float((routed == told).float().mean()))
    print(f"task {task.id}: told {known[-1]:.3f}   routed {found[-1]:.3f}"
          f"   of the rows routed right {right[-1]:.3f}")  # fmt: skip

print(f"average accuracy, told the task {sum(known) / len(bench):.3f}")
print(f"average accuracy, routed by retrieval {sum(found) / len(bench):.3f}")

# A delta is a small folder that Hugging Face's PEFT reads too.
deltas[2].save("digits-task2")
again = arch.Delta.load("digits-task2")
x = bench.tasks[1].test.x
same = torch.equal(peft.apply(base, again)(x), peft.apply(base, deltas[2])(x))
small, large = (sum(t.numel() for t in s) for s in (again.tensors.values(), base.parameters()))
print(f"saved digits-task2: {small:,} values beside the base's {large:,}")
print(f"loaded, it answers the same: {same}")

"""What `opt.ogd` gives and costs: >= 8 points of final accuracy over plain SGD on five permuted
tasks, <= 25 % of a step's time, bases of <= 0.5x the parameters.

    python benchmarks/ogd.py

Fashion-MNIST (Debian's dataset-fashion-mnist; digits without it), 10,000 training and 2,000 test
rows a task, one shared head, MLP 784-100-100-10, SGD 0.1, batch 128, three epochs, three seeds, one
thread. The times are of a step after the fifth task, when the bases are full. The projection costs
the same for every batch, so at batch 128 its share is larger than at 256; both have the bar.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from _timing import interleaved, machine, show
from tessera import arch, data, metrics, opt
from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch
from tessera.errors import MissingDataError

TASKS, EPOCHS, ROWS, LR, SEEDS = 5, 3, 128, 0.1, (0, 1, 2)
Tasks = list[tuple[Batch, Batch]]
Timed = dict[int, Callable[[], object]]  # by rows a batch


def tasks(seed: int) -> Tasks:
    try:
        cut = data.benchmark("fashion_mnist", "permuted", num_tasks=TASKS, seed=seed)
    except MissingDataError as error:
        print(f"digits instead: {error}")
        cut = data.benchmark("digits", "permuted", num_tasks=TASKS, seed=seed)
    order = torch.Generator().manual_seed(seed)
    found = []
    for task in cut:
        some = torch.randperm(len(task.train.y), generator=order)[:10_000]
        train = Batch(task.train.x[some].flatten(1), task.train.y[some])
        found.append((train, Batch(task.test.x[:2000].flatten(1), task.test.y[:2000])))
    return found


def build(inputs: int, plugin: tg.Transform | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = nn.Sequential(
        nn.Linear(inputs, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    return net, tg.SGD(net.parameters(), lr=LR, plugin=plugin)


def run(seed: int, known: Tasks, plugin: tg.Transform | None) -> tuple[float, Timed]:
    """Final average accuracy, and ten further steps to be timed."""
    torch.manual_seed(seed)
    net, optimizer = build(known[0][0].x.shape[1], plugin)
    accuracy = metrics.AccuracyMatrix(TASKS)

    @tg.training_step(optimizer=optimizer)
    def step(x: Tensor, y: Tensor) -> Tensor:
        return T.cross_entropy(net(x), y)

    for t, (train, _) in enumerate(known, start=1):
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(train.y)).split(ROWS):
                step(train.x[rows], train.y[rows])
        arch.anchor_from(net, f"t{t}", fisher=None, data=[train] if plugin else None)
        for k, (_, test) in enumerate(known, start=1):
            with tg.no_grad():
                right = (net(test.x).argmax(-1) == test.y).float().mean().item()
            accuracy.record(t, k, right)

    def ten(rows: int) -> Callable[[], object]:
        x, y = known[-1][0].x[:rows], known[-1][0].y[:rows]
        return lambda: [step(x, y) for _ in range(10)]

    return accuracy.average_accuracy(), {rows: ten(rows) for rows in (ROWS, 2 * ROWS)}


def memory(plugin: tg.Transform, parameters: int) -> float:
    state = plugin.state_dict()
    return sum(t.numel() for k in ("directions", "energies") for t in state[k]) / parameters


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    variants = {"plain": (0, 0.0), "ogd": (24, 0.95), "ogd, rank 16": (16, 0.95)}
    finals: dict[str, list[float]] = {name: [] for name in variants}
    steps, share = {}, {}
    for seed in SEEDS:
        known = tasks(seed)
        for name, (rank, threshold) in variants.items():
            plugin = opt.ogd(rank=rank, threshold=threshold) if rank else None
            final, steps[name] = run(seed, known, plugin)
            finals[name].append(100 * final)
            size = known[0][0].x.shape[1] * 100 + 100 + 100 * 100 + 100 + 1000 + 10
            share[name] = memory(plugin, size) if plugin else 0.0
    for name, values in finals.items():
        gain = statistics.mean(values) - statistics.mean(finals["plain"])
        each = ", ".join(f"{v:.1f}" for v in values)
        print(f"  {name:<14} final ACC {each}   {gain:+.1f} points   {share[name]:.2f}x memory")
    for rows in (ROWS, 2 * ROWS):
        print(f"ten steps at batch {rows}")
        times = interleaved({name: timed[rows] for name, timed in steps.items()}, rounds=21)
        for name in variants:
            show(times, name, "plain", "bar 1.25x" if name != "plain" else "")


if __name__ == "__main__":
    main()

"""What a step of replay costs: `add` 32 rows and `sample` 32 rows.

python benchmarks/replay.py

Rows are 784 float32 and a label, capacity 5,000, one thread. All contenders take turns in one
process; each figure is a median over rounds, each claim a ratio of two of them.

(a) The floor is a bare row copy in, ``store[i:i+32].copy_(x)``, and a bare gather out,
    ``store.index_select(0, index)``, of the same rows and labels. Target: at most 6 times that.
(b) Avalanche's reservoir, by its description (`ReservoirSamplingBuffer`): a new random key an
    item, concatenate the keys, sort them all, concatenate the data and index it on every `add`;
    then a batch from a torch DataLoader that shuffles the buffer. Target: at least 100 times
    faster. "views" is the kindest reading, in which concatenation and indexing move no row, only
    references to rows.
"""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tessera.data import ReplayBuffer

CAPACITY, ROWS, FEATURES = 5_000, 32, 784
ROUNDS = 15
Step = Callable[[], object]


def ours(seen_at_start: int) -> Step:
    buffer = ReplayBuffer(CAPACITY)
    step = 10_000
    for start in range(0, seen_at_start, step):
        count = min(step, seen_at_start - start)
        buffer.add(torch.rand(count, FEATURES), torch.randint(10, (count,)))
    x, y = torch.rand(ROWS, FEATURES), torch.randint(10, (ROWS,))
    buffer.sample(ROWS)

    def run() -> None:
        buffer.add(x, y)
        buffer.sample(ROWS)

    return run


def bare() -> Step:
    # Written once, so that no page is touched for the first time inside the measurement.
    images, labels = torch.rand(CAPACITY, FEATURES), torch.randint(10, (CAPACITY,))
    x, y = torch.rand(ROWS, FEATURES), torch.randint(10, (ROWS,))
    turn = 0

    def run() -> None:
        nonlocal turn
        turn = (turn + ROWS) % (CAPACITY - ROWS)
        images[turn : turn + ROWS].copy_(x)
        labels[turn : turn + ROWS].copy_(y)
        index = places[turn % len(places)]
        images.index_select(0, index)
        labels.index_select(0, index)

    places = [torch.randperm(CAPACITY)[:ROWS] for _ in range(199)]
    return run


def sorting(*, views: bool) -> Step:
    images, labels = torch.rand(CAPACITY, FEATURES), torch.randint(10, (CAPACITY,))
    keys = torch.rand(CAPACITY).sort(descending=True).values
    held = list(zip(images, labels, strict=True))
    x, y = torch.rand(ROWS, FEATURES), torch.randint(10, (ROWS,))

    def run() -> None:
        nonlocal keys, held, images, labels
        keys, order = torch.cat([torch.rand(ROWS), keys]).sort(descending=True)
        keys, order = keys[:CAPACITY], order[:CAPACITY]
        if views:
            both: list[tuple[Tensor, Tensor]] = [*zip(x, y, strict=True), *held]
            held = [both[i] for i in order.tolist()]
            next(iter(DataLoader(held, batch_size=ROWS, shuffle=True)))  # type: ignore[arg-type]
        else:
            images, labels = torch.cat([x, images])[order], torch.cat([y, labels])[order]
            data = TensorDataset(images, labels)
            next(iter(DataLoader(data, batch_size=ROWS, shuffle=True)))

    return run


def measure(steps: dict[str, tuple[Step, int]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, (step, repeats) in steps.items():
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            times[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return f"{cpu}, torch {torch.__version__}, {torch.get_num_threads()} thread"


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    # "young": about every second row offered is kept. "old": about 1 in 200 is.
    # The young one ages while measured: 15 rounds x 20 steps x 32 rows are 2 x capacity.
    figures = measure(
        {
            "ours, seen ~ capacity": (ours(CAPACITY), 20),
            "ours, seen = 200 x capacity": (ours(200 * CAPACITY), 200),
            "bare copy in and out": (bare(), 200),
            "sort all, move rows": (sorting(views=False), 2),
            "sort all, views": (sorting(views=True), 2),
        }
    )
    for name, us in figures.items():
        print(f"{name:32} {us:9.1f} us")
    young, old, floor, rows, views = figures.values()
    for name, value in (("seen ~ capacity", young), ("seen = 200 x capacity", old)):
        print(f"{name}: {value / floor:.1f} x the bare copy (target: at most 6)")
        print(
            f"{name}: {rows / value:.0f} x faster than sorting, rows moved (target: at least 100)"
        )
        print(f"{name}: {views / value:.0f} x faster than sorting, views only (no target)")


if __name__ == "__main__":
    main()

"""What a step of replay costs: `add` 32 rows and `sample` 32 rows.

python benchmarks/replay.py

Rows are 784 float32 and a label, capacity 5,000, one thread. All contenders take turns in one
process; each figure is a median over rounds, each claim the median of the rounds' ratios, with
the lowest and the highest.

(a) The floor is a bare row copy in, ``store[i:i+32].copy_(x)``, and a bare gather out,
    ``store.index_select(0, index)``, of the same rows and labels. Target: at most 6 times that.
(b) Avalanche's own `ReservoirSamplingBuffer`, where it is installed (`_avalanche.py` says how),
    fed with its data sets in two forms: plain, the least the buffer takes, and labelled, as its
    own benchmarks build them. Target: at least 100 times faster. It keeps every data set it was
    ever shown and gets slower with their number. A stream of 200 x capacity would be 31,250 of
    them; it is shown as 100 of 10,000 rows, which flatters it.
(c) The same algorithm with nothing around it: a new random key an item, sort all keys, move all
    rows, and a torch DataLoader that shuffles. Nothing in it ages, so one figure serves for both
    lengths of stream. No target: it tells how much of (b) is the algorithm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from _timing import interleaved, machine, ratios
from tessera.data import ReplayBuffer

try:
    import _avalanche
except ImportError:
    _avalanche = None

CAPACITY, ROWS, FEATURES = 5_000, 32, 784
ROUNDS = 15
# Rows seen before the measurement, and how many at a time. Of a stream as long as the capacity
# about every row offered is kept, of one 200 times as long 1 in 200.
STREAMS = {
    "seen ~ capacity": (CAPACITY, ROWS),
    "seen = 200 x capacity": (200 * CAPACITY, 10_000),
}
FORMS = ("plain", "labelled")
Add = Callable[[Tensor, Tensor], object]
Step = Callable[[], object]


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(ROWS, FEATURES), torch.randint(10, (ROWS,))


def stepping(add: Add, sample: Step, *, seen: int, by: int) -> Step:
    """A step of a buffer that was shown `seen` rows, `by` at a time."""
    for start in range(0, seen, by):
        count = min(by, seen - start)
        # One row, repeated: a peer that keeps all it was ever shown would need 3 GB.
        add(torch.rand(1, FEATURES).expand(count, -1), torch.randint(10, (count,)))
    x, y = batch()

    def run() -> None:
        add(x, y)
        sample()

    return run


def bare() -> Step:
    # Written once, so that no page is touched for the first time inside the measurement.
    images, labels = torch.rand(CAPACITY, FEATURES), torch.randint(10, (CAPACITY,))
    x, y = batch()
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


def sorting() -> Step:
    images, labels = torch.rand(CAPACITY, FEATURES), torch.randint(10, (CAPACITY,))
    keys = torch.rand(CAPACITY).sort(descending=True).values
    x, y = batch()

    def run() -> None:
        nonlocal keys, images, labels
        keys, order = torch.cat([torch.rand(ROWS), keys]).sort(descending=True)
        keys, order = keys[:CAPACITY], order[:CAPACITY]
        images, labels = torch.cat([x, images])[order], torch.cat([y, labels])[order]
        next(iter(DataLoader(TensorDataset(images, labels), ROWS, shuffle=True)))

    return run


def times_over(step: Step, count: int) -> Step:
    def run() -> None:
        for _ in range(count):
            step()

    return run


def contenders() -> dict[str, tuple[Step, int]]:
    """By name: a step, and how many of them a round times."""
    steps = {"bare copy": (bare(), 100), "sort-all, re-implemented": (sorting(), 2)}
    for stream, (seen, by) in STREAMS.items():
        buffer = ReplayBuffer(CAPACITY)
        own = stepping(buffer.add, partial(buffer.sample, ROWS), seen=seen, by=by)
        # The young buffer ages while measured: 16 rounds x 20 steps x 32 rows are 2 x capacity.
        steps[f"ours, {stream}"] = own, 20 if seen == CAPACITY else 100
        for form in FORMS if _avalanche else ():
            add, sample = _avalanche.reservoir(CAPACITY, ROWS, labelled=form == "labelled")
            steps[f"Avalanche {form}, {stream}"] = stepping(add, sample, seen=seen, by=by), 1
    return steps


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    steps = contenders()
    rounds = interleaved({name: times_over(*pair) for name, pair in steps.items()}, rounds=ROUNDS)
    times = {name: [t / steps[name][1] for t in taken] for name, taken in rounds.items()}
    for name, taken in times.items():
        print(f"{name:44} {statistics.median(taken) * 1e6:9.1f} us")

    def claim(words: str, name: str, base: str) -> None:
        low, middle, high = ratios(times, name, base)
        print(f"  {middle:5.1f} x {words} ({low:.1f} .. {high:.1f})")

    for stream in STREAMS:
        own = f"ours, {stream}"
        print(stream)
        claim("the bare copy; target: at most 6", own, "bare copy")
        for form in FORMS if _avalanche else ():
            words = f"faster than {_avalanche.NAME}, {form}; target: at least 100"
            claim(words, f"Avalanche {form}, {stream}", own)
        claim("faster than sort-all, re-implemented", "sort-all, re-implemented", own)
    if not _avalanche:
        print("Avalanche is not installed: see benchmarks/_avalanche.py")


if __name__ == "__main__":
    main()

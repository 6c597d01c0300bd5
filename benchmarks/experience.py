"""What an experience buffer's calls of 64 rows cost: beside its peers, and at ten times the rows.

python benchmarks/experience.py

One thread; all contenders of a claim take turns in one process; each figure is a median over
rounds, each claim the median of the rounds' ratios, with the lowest and the highest.

(a) A full ring of 200,000 rows of 784 float32 and an int64 label. Targets: `sample(64)` at least
    2.5 times as fast as torchrl's (LazyTensorStorage) and 0.8 times as fast as cpprb's, whose
    ring is C++, and at most 2 times a bare ``index_select`` of as many random rows and labels.
(b) The same by priority. Targets: `draw(64)`, with rows and weights, at most 1.5 times the time of
    cpprb's ``sample(64)``; `update_priorities` of 64 at most 3 times. cpprb's checks nothing and
    takes a priority for a row that has been overwritten; ours refuses the one and passes over the
    other. torchrl has no figure: its segment trees are a C++ extension that does not load here.
(c) Every call of every policy at ten times the capacity, after twice as many rows as fit, so that
    a reservoir of either size takes every second row. Target: at most 1.3 times the time. Small
    rows (4 float32) and large ones (784): what the algorithm adds shows in the small ones. Rows
    drawn at random are in no cache, and the more there are the less of the tables that find their
    pages is; a bare ``index_select``, which has no algorithm, pays it too and is shown first.

Peers, in an environment of their own:

    python3 -m venv bench
    bench/bin/pip install torch==2.13.0 cpprb==11.0.0 torchrl==0.14.1 tensordict==0.14.3 \
        safetensors rich
    PYTHONPATH=src bench/bin/python benchmarks/experience.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from _timing import interleaved, machine, ratios
from tessera.data import ReplayBuffer
from tessera.ops import kernels

try:
    import cpprb
except ImportError:
    cpprb = None
try:
    import tensordict
    import torchrl.data
except ImportError:
    tensordict = None

CAPACITY, ROWS, LARGE, SMALL = 200_000, 64, 784, 4
ROUNDS, REPEATS = 31, 200
ADDS = 4  # a round: a few thousand rows in all, which hardly age the smallest buffer
POLICIES = ("reservoir", "class_balanced", "ring", "prioritized")
Call = Callable[[], object]


def batch(features: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return torch.rand(rows, features), torch.randint(10, (rows,))


def chunks(capacity: int, features: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, capacity, 10_000):
        yield batch(features, min(10_000, capacity - start))


def filled(policy: str, capacity: int, features: int, *, times: int = 1) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, policy)
    for x, y in chunks(times * capacity, features):
        buffer.add(x, y)
    return buffer


def bare(capacity: int, features: int) -> Call:
    # numpy asks for huge pages, as our own store does; torch.empty does not.
    images = torch.from_numpy(np.empty((capacity, features), np.float32)).fill_(1.0)
    labels = torch.from_numpy(np.empty(capacity, np.int64)).fill_(1)
    # More places than any cache holds rows, and no time spent on drawing them.
    places = cycle(torch.randint(capacity, (2_000, ROWS)).unbind())

    def run() -> None:
        index = next(places)
        images.index_select(0, index)
        labels.index_select(0, index)

    return run


def updating(buffer: ReplayBuffer) -> Call:
    draws = cycle([buffer.draw(ROWS).positions for _ in range(500)])
    priorities = torch.rand(ROWS) + 0.1
    return lambda: buffer.update_priorities(next(draws), priorities)


def ours(policy: str, capacity: int, features: int, *, times: int = 1) -> dict[str, Call]:
    """The calls of a buffer that was shown `times` as many rows as it holds, by name."""
    buffer = filled(policy, capacity, features, times=times)
    x, y = batch(features)
    calls: dict[str, Call] = {
        "sample": lambda: buffer.sample(ROWS),
        "sample_like": lambda: buffer.sample_like(x),
        "add": lambda: buffer.add(x, y),
    }
    if policy == "prioritized":
        calls["draw"] = lambda: buffer.draw(ROWS)
        calls["update_priorities"] = updating(buffer)
    return calls


def of_cpprb(capacity: int, features: int, *, prioritized: bool) -> dict[str, Call]:
    fields = {"x": {"shape": features, "dtype": np.float32}, "y": {"dtype": np.int64}}
    kind = cpprb.PrioritizedReplayBuffer if prioritized else cpprb.ReplayBuffer
    buffer = kind(capacity, fields)
    for x, y in chunks(capacity, features):
        buffer.add(x=x.numpy(), y=y.numpy())
    x, y = (t.numpy() for t in batch(features))
    calls: dict[str, Call] = {
        "add": lambda: buffer.add(x=x, y=y),
        "sample": lambda: buffer.sample(ROWS),
    }
    if prioritized:
        draws = cycle([buffer.sample(ROWS)["indexes"] for _ in range(500)])
        priorities = np.random.default_rng(0).random(ROWS) + 0.1
        calls["update"] = lambda: buffer.update_priorities(next(draws), priorities)
    return calls


def of_torchrl(capacity: int, features: int) -> dict[str, Call]:
    buffer = torchrl.data.ReplayBuffer(
        storage=torchrl.data.LazyTensorStorage(capacity), batch_size=ROWS
    )
    for x, y in chunks(capacity, features):
        buffer.extend(tensordict.TensorDict({"x": x, "y": y}, [len(x)]))
    x, y = batch(features)
    rows = tensordict.TensorDict({"x": x, "y": y}, [ROWS])
    return {"add": lambda: buffer.extend(rows), "sample": lambda: buffer.sample(ROWS)}


class Taken:
    """Seconds a call of contenders that took turns, and claims about them."""

    def __init__(self, calls: Mapping[str, Call]) -> None:
        self.times = interleaved(calls, rounds=ROUNDS, repeats=REPEATS)
        for name, taken in self.times.items():
            print(f"  {name:34} {statistics.median(taken) * 1e6:8.1f} us")

    def claim(self, words: str, name: str, base: str) -> None:
        if name in self.times and base in self.times:
            low, middle, high = ratios(self.times, name, base)
            print(f"    {middle:5.2f} x {words} ({low:.2f} .. {high:.2f})")


def prefixed(name: str, calls: Mapping[str, Call]) -> dict[str, Call]:
    return {f"{name} {call}": run for call, run in calls.items()}


def uniform() -> None:
    print(f"(a) {CAPACITY:,} rows of {LARGE} float32 and a label, ring, {ROWS} a call")
    calls = {"bare index_select": bare(CAPACITY, LARGE)}
    calls |= prefixed("ours", ours("ring", CAPACITY, LARGE))
    if cpprb:
        calls |= prefixed("cpprb", of_cpprb(CAPACITY, LARGE, prioritized=False))
    if tensordict:
        calls |= prefixed("torchrl", of_torchrl(CAPACITY, LARGE))
    taken = Taken(calls)
    taken.claim("the bare index_select; target: at most 2", "ours sample", "bare index_select")
    taken.claim("as fast as torchrl; target: at least 2.5", "torchrl sample", "ours sample")
    taken.claim("as fast as cpprb; target: at least 0.8", "cpprb sample", "ours sample")
    taken.claim("as fast as torchrl to add", "torchrl add", "ours add")
    taken.claim("as fast as cpprb to add", "cpprb add", "ours add")


def by_priority() -> None:
    print(f"(b) the same by priority; C kernel: {kernels.available(wait_s=120)}")
    calls = prefixed("ours", ours("prioritized", CAPACITY, LARGE))
    if cpprb:
        calls |= prefixed("cpprb", of_cpprb(CAPACITY, LARGE, prioritized=True))
    taken = Taken(calls)
    taken.claim("cpprb's sample; target: at most 1.5", "ours draw", "cpprb sample")
    taken.claim("cpprb's update; target: at most 3", "ours update_priorities", "cpprb update")
    taken.claim("cpprb's add", "ours add", "cpprb add")
    if tensordict:
        try:
            torchrl.data.PrioritizedSampler(CAPACITY, alpha=0.6, beta=0.4)
            print("  torchrl's prioritized sampler loads here: measure it")
        except RuntimeError as error:
            print(f"  torchrl's prioritized sampler cannot be measured: {error}")


def at_ten_times(features: int, capacity: int) -> None:
    print(f"(c) rows of {features} float32: {capacity:,} -> {10 * capacity:,}; target: at most 1.3")
    sizes = (capacity, 10 * capacity)

    def compare(make: Callable[[int], dict[str, Call]], label: str) -> None:
        small, large = (make(size) for size in sizes)
        for name in small:
            both = {"small": small[name], "large": large[name]}
            repeats = ADDS if name == "add" else REPEATS
            times = interleaved(both, rounds=ROUNDS, repeats=repeats)
            before, after = (statistics.median(taken) * 1e6 for taken in times.values())
            low, middle, high = ratios(times, "large", "small")
            print(
                f"  {label:14} {name:18} {before:7.1f} -> {after:7.1f} us "
                f"{middle:5.2f} x ({low:.2f} .. {high:.2f}){'  over' if middle > 1.3 else ''}"
            )

    compare(lambda size: {"index_select": bare(size, features)}, "bare")
    for policy in POLICIES:
        compare(lambda size, policy=policy: ours(policy, size, features, times=2), policy)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    for name, peer in (("cpprb", cpprb), ("torchrl and tensordict", tensordict)):
        if peer is None:
            print(f"{name} not installed, left out: the top of this file says how to install")
    uniform()
    by_priority()
    at_ten_times(SMALL, CAPACITY)
    at_ten_times(LARGE, CAPACITY // 10)


if __name__ == "__main__":
    main()

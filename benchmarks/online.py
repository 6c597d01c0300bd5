"""The default online recipe against River's models: prequential accuracy and CPU a row.

    python benchmarks/online.py

Streams: SEA with abrupt drifts at every quarter of 20,000 rows and a tenth of the labels flipped
(seeds 0 .. 4), and Phishing and ImageSegments, which come with River (ours over seeds 0 .. 9, the
forest over 0 .. 4).
Claim: on each at least the accuracy of the best of River's logistic regression (one against the
rest where there are more classes), Hoeffding adaptive tree and adaptive random forest of ten trees.
The CPU is of the whole process, reading and drift detection included; a bare training step stands
beside it, as the least a network can take. River predicts and learns row by row, ours up to 16 rows
at once, each before it is learned: River's models see each label sooner.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from _timing import machine
from tessera import data, recipes

try:
    from river import datasets, forest, linear_model, multiclass, preprocessing, tree
except ImportError:
    sys.exit("this benchmark needs River: pip install river")

ROWS = 20_000


Pairs = list[tuple[dict[str, Any], Any]]


def bundled(stream: Any) -> Pairs:
    return list(stream)


def sea(seed: int) -> Pairs:
    rows = data.sea(ROWS, drifts=[ROWS * k // 4 for k in (1, 2, 3)], noise=0.1, seed=seed)
    return [(dict(zip("abc", x, strict=True)), y) for x, y in zip(*map(list_of, rows), strict=True)]


def list_of(column: torch.Tensor) -> list[Any]:
    return column.tolist()


def arrays(pairs: Pairs) -> data.Batch:
    """A stream of River's as tensors, in its order."""
    names = sorted({str(y) for _, y in pairs})
    x = np.array([list(features.values()) for features, _ in pairs], np.float32)
    y = np.array([names.index(str(label)) for _, label in pairs])
    return data.Batch(torch.from_numpy(x), torch.from_numpy(y))


def rivers(classes: int, seed: int) -> Iterator[tuple[str, Any]]:
    logistic: Any = linear_model.LogisticRegression()
    if classes > 2:
        logistic = multiclass.OneVsRestClassifier(logistic)
    yield "logistic regression", preprocessing.StandardScaler() | logistic
    yield "Hoeffding adaptive tree", tree.HoeffdingAdaptiveTreeClassifier(seed=seed)
    yield "ARF, 10 trees", forest.ARFClassifier(n_models=10, seed=seed)


def prequential(model: Any, pairs: Pairs) -> tuple[float, float]:
    """(accuracy, CPU microseconds a row) of a model of River's."""
    begun, right = time.process_time(), 0
    for x, y in pairs:
        right += model.predict_one(x) == y
        model.learn_one(x, y)
    return right / len(pairs), 1e6 * (time.process_time() - begun) / len(pairs)


def bare_step() -> float:
    """CPU microseconds of one step of the model on 16 rows, and of nothing else."""
    model = recipes.small_mlp((3,), 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    x, y = torch.randn(16, 3), torch.randint(0, 2, (16,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(200):
        step()
    begun = time.process_time()
    for _ in range(2000):
        step()
    return 1e6 * (time.process_time() - begun) / 2000


def ours(pairs: Pairs, seed: int) -> tuple[float, float]:
    rows = arrays(pairs)
    begun = time.process_time()
    result = recipes.learn_online(recipes.OnlineSettings(seed=seed), rows=rows)
    return result["accuracy"], 1e6 * (time.process_time() - begun) / result["rows"]


def line(name: str, runs: list[tuple[float, float]]) -> float:
    accuracy = statistics.mean(a for a, _ in runs)
    spread = 0.0
    if len(runs) > 1:
        spread = 2 * statistics.stdev(a for a, _ in runs) / len(runs) ** 0.5
    cpu = statistics.median(c for _, c in runs)
    print(f"  {name:<26}{100 * accuracy:7.2f} % +- {100 * spread:4.2f} {cpu:10.1f} us CPU a row")
    return accuracy


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    ours(sea(99), 99)
    step = bare_step()
    print(f"a bare training step of 16 rows: {step:.0f} us CPU, {step / 16:.1f} a row")
    streams: dict[str, tuple[Callable[[int], Pairs], int, int]] = {
        "SEA, abrupt": (sea, 5, 5),
        "Phishing": (lambda _: bundled(datasets.Phishing()), 10, 1),
        "ImageSegments": (lambda _: bundled(datasets.ImageSegments()), 10, 1),
    }
    for name, (make, seeds, draws) in streams.items():
        print(name)
        best = 0.0
        classes = len({y for _, y in make(0)})
        for k, (kind, _) in enumerate(rivers(classes, 0)):
            runs = []
            for seed in range(draws if kind.startswith("logistic") else 5):
                model = list(rivers(classes, seed))[k][1]
                runs.append(prequential(model, make(seed)))
            best = max(best, line(kind, runs))
        mine = line("tessera, online", [ours(make(seed), seed) for seed in range(seeds)])
        print(f"  {100 * (mine - best):+.2f} points over the best of River's; target: >= 0")


if __name__ == "__main__":
    main()

"""A second-order MAML gradient against the libraries of the field, in time and in correctness.

    python benchmarks/maml.py [--only sine|conv] [--rounds 21] [--no-compile]

Bars. Sine MLP 1-40-40-1, 32 tasks, 10 + 10 points, 5 steps: compiled at least 5x, uncompiled at
least 1.3x the fastest peer. Conv-4 (64 channels, stride 2, BatchNorm), 5-way 1-shot with 5 queries
a class, 16 tasks, 5 steps: not slower than the fastest peer, and right. Process time, interleaved
rounds, one thread. `error` is the largest relative distance of a parameter's gradient from that of
a loop over the tasks in float64, without vmap.

A peer that is not installed is left out. To have them all, in a folder of their own:

    pip install --no-deps --target PEERS higher==0.2.1 torchopt==0.7.3 optree==0.20.0
    pip install --no-deps --target PEERS parallel-metalearn==0.5.6
    pip download --no-deps --no-build-isolation --no-binary :all: learn2learn==0.2.0
    tar xzf learn2learn-0.2.0.tar.gz -C PEERS --strip-components=1 learn2learn-0.2.0/learn2learn
    PYTHONPATH=PEERS python benchmarks/maml.py

learn2learn 0.2.0 does not install on this Python; its algorithm is one file, taken as it is.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _timing import interleaved, machine, ratios
from tessera import graph as tg
from tessera.data import Batch
from tessera.meta.compiled import MetaStep
from tessera.meta.tasks import maml_tasks

Run = Callable[[], object]
K = 5


@dataclass(frozen=True)
class Problem:
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    lr: float
    support: Batch
    query: Batch

    def tasks(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        return list(zip(*self.support, *self.query, strict=True))

    def clear(self) -> None:
        for p in self.model.parameters():
            p.grad = None


def sine() -> Problem:
    torch.manual_seed(0)
    layers = [nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)]
    amplitude, phase = 0.1 + 4.9 * torch.rand(32, 1, 1), torch.pi * torch.rand(32, 1, 1)

    def points() -> Batch:
        x = 10 * torch.rand(32, 10, 1) - 5
        return Batch(x, amplitude * torch.sin(x + phase))

    return Problem(nn.Sequential(*layers), F.mse_loss, 0.01, points(), points())


def conv() -> Problem:
    torch.manual_seed(0)

    def block(channels: int) -> list[nn.Module]:
        norm = nn.BatchNorm2d(64, track_running_stats=False)
        return [nn.Conv2d(channels, 64, 3, 2, 1), norm, nn.ReLU()]

    layers = [*block(1), *block(64), *block(64), *block(64), nn.Flatten(), nn.Linear(256, 5)]
    classes = torch.randn(16, 5, 1, 28, 28)

    def images(shots: int) -> Batch:
        x = classes.repeat_interleave(shots, 1) + 0.5 * torch.randn(16, 5 * shots, 1, 28, 28)
        return Batch(x, torch.arange(5).repeat_interleave(shots).expand(16, -1).contiguous())

    return Problem(nn.Sequential(*layers), F.cross_entropy, 0.1, images(1), images(5))


# --- ours ------------------------------------------------------------------------------------


def uncompiled(p: Problem) -> Run:
    def run() -> None:
        p.clear()
        adapted, _ = maml_tasks(p.model, p.support, inner_opt=tg.SGD(p.lr), K=K, loss_fn=p.loss)
        p.loss(adapted(p.query.x).flatten(0, 1), p.query.y.flatten(0, 1)).backward()

    return run


def compiled(p: Problem) -> Run:
    step = MetaStep(p.model, inner_opt=tg.SGD(p.lr), K=K, loss_fn=p.loss, compile=True)
    begun = time.perf_counter()
    step(p.support, p.query)
    seconds = time.perf_counter() - begun
    print(f"  the first compiled step came after {seconds:.1f} s (compiled: {step.ready()})")

    def run() -> None:
        p.clear()
        step(p.support, p.query)

    return run


# --- peers -----------------------------------------------------------------------------------


def parallel_metalearn(p: Problem) -> Run:
    maml = importlib.import_module("metalearn.algorithms.MAML")
    optimizers = importlib.import_module("metalearn.inner_optimizers.optimizers")
    base = importlib.import_module("metalearn.loss.base")

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = p.model

        def forward(self, x: Tensor, training: bool = False, num_step: int = 0) -> dict[str, Any]:
            return {"logits": self.inner(x), "buffers": {}}

        def get_fast_weights(self) -> dict[str, Tensor]:
            return dict(self.named_parameters())

    class Loss(base.BaseLoss):  # type: ignore[misc,name-defined]
        def forward(
            self, out_dict: Any, targets: Tensor, model_states: Any = None, **_: Any
        ) -> Any:
            loss = p.loss(out_dict["logits"], targets)
            return loss, loss.detach()

    model = Wrapped()
    inner = optimizers.InnerSGD(model.get_fast_weights(), inner_lr=p.lr, learn_lr=False)
    algorithm = maml.MAML(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        inner_optimizer=inner,
        support_loss_fn=Loss(),
        inner_steps=K,
        device=torch.device("cpu"),
    )
    data = (*p.support, *p.query)
    return lambda: algorithm.step(iter([data]))


def torchopt_meta_sgd(p: Problem) -> Run:
    torchopt = importlib.import_module("torchopt")

    def run() -> None:
        p.clear()
        optimizer = torchopt.MetaSGD(p.model, lr=p.lr)
        network = torchopt.extract_state_dict(p.model, by="reference")
        state = torchopt.extract_state_dict(optimizer, by="reference")
        tasks = p.tasks()
        for x, y, qx, qy in tasks:
            for _ in range(K):
                optimizer.step(p.loss(p.model(x), y))
            (p.loss(p.model(qx), qy) / len(tasks)).backward()
            torchopt.recover_state_dict(p.model, network)
            torchopt.recover_state_dict(optimizer, state)

    return run


def higher_loop(p: Problem) -> Run:
    higher = importlib.import_module("higher")

    def run() -> None:
        p.clear()
        optimizer = torch.optim.SGD(p.model.parameters(), lr=p.lr)
        tasks = p.tasks()
        for x, y, qx, qy in tasks:
            with higher.innerloop_ctx(p.model, optimizer, copy_initial_weights=False) as (net, opt):
                for _ in range(K):
                    opt.step(p.loss(net(x), y))
                (p.loss(net(qx), qy) / len(tasks)).backward()

    return run


def learn2learn(p: Problem) -> Run:
    # Its __init__ imports gym, torchvision and more, which the algorithm does not need.
    spec = importlib.util.find_spec("learn2learn")
    if spec is None:
        raise ImportError("learn2learn")
    for name, folder in (("learn2learn", ""), ("learn2learn.algorithms", "/algorithms")):
        package = types.ModuleType(name)
        package.__path__ = [f"{place}{folder}" for place in spec.submodule_search_locations or ()]
        sys.modules[name] = package
    algorithm = importlib.import_module("learn2learn.algorithms.maml").MAML(p.model, lr=p.lr)

    def run() -> None:
        p.clear()
        tasks = p.tasks()
        for x, y, qx, qy in tasks:
            learner = algorithm.clone()
            for _ in range(K):
                learner.adapt(p.loss(learner(x), y))
            (p.loss(learner(qx), qy) / len(tasks)).backward()

    return run


PEERS: dict[str, Callable[[Problem], Run]] = {
    "parallel-metalearn": parallel_metalearn,
    "torchopt MetaSGD": torchopt_meta_sgd,
    "learn2learn": learn2learn,
    "higher": higher_loop,
}


# --- right and fast --------------------------------------------------------------------------


def exact(p: Problem) -> list[Tensor]:
    """By hand, one task after the other, in float64."""
    model = copy.deepcopy(p.model).double()
    start, total = dict(model.named_parameters()), torch.zeros((), dtype=torch.float64)
    for x, y, qx, qy in p.tasks():
        w = start
        wide = [t.double() if t.is_floating_point() else t for t in (x, y, qx, qy)]
        for _ in range(K):
            loss = p.loss(torch.func.functional_call(model, w, (wide[0],)), wide[1])
            grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
            w = {n: v - p.lr * g for (n, v), g in zip(w.items(), grads, strict=True)}
        total = total + p.loss(torch.func.functional_call(model, w, (wide[2],)), wide[3])
    total = total / len(p.support.x)
    return list(torch.autograd.grad(total, list(start.values())))


def error(p: Problem, run: Run, expected: list[Tensor]) -> float:
    p.clear()
    run()
    found = [q.grad for q in p.model.parameters()]
    # A bias before a BatchNorm has no gradient but rounding: measure against the largest.
    most = max(e.norm().item() for e in expected)
    return max(
        (torch.zeros_like(e) if f is None else f.double() - e).norm().item()
        / max(e.norm().item(), 1e-3 * most)
        for f, e in zip(found, expected, strict=True)
    )


def measure(name: str, p: Problem, rounds: int, bars: dict[str, float], *, compile: bool) -> None:
    print(f"{name}: {len(p.support.x)} tasks, K = {K}")
    runs: dict[str, Run] = {"tessera": uncompiled(p)}
    if compile:
        runs["tessera compiled"] = compiled(p)
    for peer, make in PEERS.items():
        try:
            runs[peer] = make(p)
        except ImportError as missing:
            print(f"  {peer} is left out ({missing}); the head of this file says how to have it")
    expected = exact(p)
    errors = {n: error(p, run, expected) for n, run in runs.items()}
    # Several calls a turn, as in training: the first after another library finds its caches cold.
    repeats = 5 if name == "sine" else 1
    times = interleaved(runs, rounds=rounds, repeats=repeats, clock=time.process_time)
    peers = [n for n in runs if n in PEERS]
    fastest = min(peers, key=lambda n: statistics.median(times[n]), default=None)
    for n, seconds in times.items():
        line = f"  {n:<20} {1e3 * statistics.median(seconds):9.2f} ms   error {errors[n]:.1e}"
        if fastest is not None:
            low, mid, high = (1 / r for r in reversed(ratios(times, n, fastest)))
            line += f"   {mid:5.2f}x {fastest} ({low:.2f} .. {high:.2f})"
            line += f"   bar {bars[n]:g}x" if n in bars else ""
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("sine", "conv"))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--no-compile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    problems: dict[str, tuple[Callable[[], Problem], dict[str, float]]] = {
        "sine": (sine, {"tessera": 1.3, "tessera compiled": 5.0}),
        "conv": (conv, {"tessera": 1.0}),
    }
    for name, (make, bars) in problems.items():
        if given.only in (None, name):
            rounds = given.rounds if name == "sine" else max(3, given.rounds // 4)
            measure(name, make(), rounds, bars, compile=not given.no_compile)


if __name__ == "__main__":
    main()

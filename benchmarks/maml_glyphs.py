"""Meta-learning on characters of scripts that were never seen: accuracy by CPU seconds.

    python benchmarks/maml_glyphs.py [--quick] [--svg docs/guide/img/maml-glyphs.svg]

5-way 1-shot on `data.glyphs`: five characters, one picture of each to learn from, 15 of each to be
right on; 40 scripts held out, 600 episodes, the same for everyone. One network throughout: four
convolutions of stride 2, 32 channels, BatchNorm; one thread.

- pixels: the nearest of the five pictures; nothing is learned.
- prototypes: the body learns by the prototypical loss on 20-way episodes; at the test the head
  begins at `meta.prototypes` and takes no step, or three (ProtoMAML's initialisation).
- MAML: `meta.maml_tasks`, one rate for each parameter and step learned too; second and first order.
- iMAML: `meta.implicit_bilevel`, ten inner steps, damped; at the test the same inner problem is
  solved.

The prototypes use running statistics at the test; MAML and iMAML those of the batch, also of the
75 pictures that are asked for, as is usual for them.

CPU seconds are the process's, of training alone: drawing the episodes, forward, backward and the
optimizer; not the reading of the data, nor the evaluations between. Everything was chosen on the
validation scripts, on which the curves are drawn too. Intervals: 95 %, over episodes.

Claim: prototypes >= 87 % within 20 CPU seconds; second-order MAML and iMAML >= 80 % within 600.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from _timing import machine
from tessera import data, files, meta
from tessera import graph as tg
from tessera import ops as T
from tessera.report.chart import Line, line_chart

WAYS, WIDTH = 5, 32
LR, INNER_LR, K = 3e-3, 0.4, 2
# The prototypical loss's distances, nearer 1 in size; the rate of the steps after it.
SCALE, PROTO_LR = 0.2, 0.01
# The inner problem of iMAML.
IMPLICIT_LR, IMPLICIT_STEPS, PROX, DAMPING, TOL = 0.3, 10, 0.5, 1.0, 0.1

Episode = tuple[data.Batch, data.Batch]
Judge = Callable[[Episode], Tensor]  # the share that is right in each task


class Method(NamedTuple):
    """How to learn from an episode, and how to be judged by one."""

    learned: list[Tensor]
    backward: Callable[[Episode], None]  # leaves the gradient in .grad
    judge: Judge
    ways: int = WAYS
    tasks: int = 4
    queries: int = 5


class Run(NamedTuple):
    seconds: float
    steps: int
    curve: list[tuple[float, float]]  # CPU seconds, share right on the validation scripts


def body(*, running: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner in (1, WIDTH, WIDTH, WIDTH):
        layers += [
            nn.Conv2d(inner, WIDTH, 3, stride=2, padding=1),
            nn.BatchNorm2d(WIDTH, track_running_stats=running),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten())


def classifier(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(*body(), nn.Linear(4 * WIDTH, WAYS))
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model


def right(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(-1) == y).double().mean(-1)


def pixels(episode: Episode) -> Tensor:
    support, query = episode
    near = torch.cdist(query.x.flatten(2), support.x.flatten(2)).argmin(2)
    return (support.y.gather(1, near) == query.y).double().mean(1)


def prototypical(seed: int) -> tuple[Method, Callable[[int], Judge]]:
    """Besides, how it is judged after so many steps of an inner loop."""
    torch.manual_seed(seed)
    model = nn.Sequential(*body(running=True), nn.Linear(4 * WIDTH, WAYS))
    features = model[:-1]
    head = str(len(model) - 1)

    def start(known: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = meta.prototypes(known, y)
        return SCALE * weight, SCALE * bias

    def backward(episode: Episode) -> None:
        support, query = (data.Batch(part.x[0], part.y[0]) for part in episode)
        both = features(torch.cat([support.x, query.x]))
        known, asked = both.split([len(support.y), len(query.y)])
        weight, bias = start(known, support.y)
        T.cross_entropy(asked @ weight.T + bias, query.y).backward()

    def after(steps: int) -> Judge:
        def judge(episode: Episode) -> Tensor:
            support, query = episode
            with tg.no_grad():
                features.eval()
                known = features(support.x.flatten(0, 1)).unflatten(0, support.y.shape)
                features.train()
                weight, bias = start(known, support.y)
                adapted, _ = meta.maml_tasks(
                    model,
                    support,
                    inner_opt=tg.SGD(PROTO_LR),
                    K=steps,
                    buffers="frozen",
                    state=meta.MetaState.at({f"{head}.weight": weight, f"{head}.bias": bias}),
                )
                return right(adapted(query.x), query.y)

        return judge

    learned = list(features.parameters())
    return Method(learned, backward, after(0), ways=20, tasks=1), after


def maml(seed: int, *, second_order: bool) -> Method:
    model = classifier(seed)
    rates = meta.learned_rates(model, INNER_LR, steps=K)

    def adapt(support: data.Batch) -> meta.Adapted:
        rule = tg.SGD(model, lr=rates())
        return meta.maml_tasks(model, support, inner_opt=rule, K=K, create_graph=second_order)[0]

    def backward(episode: Episode) -> None:
        support, query = episode
        T.cross_entropy(adapt(support)(query.x).flatten(0, 1), query.y.flatten()).backward()

    def judge(episode: Episode) -> Tensor:
        support, query = episode
        with tg.no_grad():
            return right(adapt(support)(query.x), query.y)

    return Method([*model.parameters(), *rates.parameters()], backward, judge)


def imaml(seed: int, ends: Counter[str]) -> Method:
    """`ends` counts how the linear solves ended."""
    model = classifier(seed)

    def outer(support: data.Batch, query: data.Batch, val_loss: Callable[..., Tensor]) -> Tensor:
        return meta.implicit_bilevel(
            model,
            inner=lambda m: tg.SGD(m, lr=IMPLICIT_LR, steps=IMPLICIT_STEPS),
            train_batch=support,
            val_batch=query,
            prox=PROX,
            damping=DAMPING,
            tol=TOL,
            max_iter=5,
            val_loss_fn=val_loss,
        )

    def each(episode: Episode) -> list[tuple[data.Batch, data.Batch]]:
        support, query = episode
        return [
            (data.Batch(*s), data.Batch(*q))
            for s, q in zip(zip(*support, strict=True), zip(*query, strict=True), strict=True)
        ]

    def backward(episode: Episode) -> None:
        tasks = each(episode)
        for support, query in tasks:
            one = outer(support, query, T.cross_entropy)
            (one / len(tasks)).backward()
            ends[one.stopped] += 1

    def judge(episode: Episode) -> Tensor:
        shares: list[Tensor] = []

        def look(logits: Tensor, y: Tensor) -> Tensor:
            shares.append(right(logits, y))
            return T.cross_entropy(logits, y)

        with torch.no_grad():
            for support, query in each(episode):
                outer(support, query, look)
        return torch.stack(shares)

    return Method(list(model.parameters()), backward, judge)


def train(method: Method, train_on: data.Glyphs, seen: list[Episode], seconds: float) -> Run:
    """For so many CPU seconds, the rate falling linearly; looks at the validation scripts."""
    drawn = data.episodes(
        train_on, ways=method.ways, queries=method.queries, tasks=method.tasks, seed=1
    )
    optimizer = torch.optim.Adam(method.learned, lr=LR)
    curve = [(0.0, judged(method.judge, seen)[0])]
    spent, looks = 0.0, 12
    step = 0
    while spent < seconds:
        begun = time.process_time()
        optimizer.param_groups[0]["lr"] = LR * max(0.05, 1 - spent / seconds)
        optimizer.zero_grad()
        method.backward(drawn[step])
        nn.utils.clip_grad_norm_(method.learned, 10)
        optimizer.step()
        step += 1
        spent += time.process_time() - begun
        if spent >= seconds * len(curve) / looks:
            curve.append((spent, judged(method.judge, seen)[0]))
    return Run(spent, step, curve)


def judged(judge: Judge, seen: list[Episode]) -> tuple[float, float]:
    """The share that is right over all tasks, and half of its 95 % interval."""
    shares = torch.cat([judge(episode) for episode in seen])
    return shares.mean().item(), 1.96 * shares.std().item() / math.sqrt(len(shares))


def report(name: str, judge: Judge, tests: list[Episode], run: Run | None, bar: str = "") -> None:
    mean, half = judged(judge, tests)
    learned = f"{run.seconds:6.0f} CPU s, {run.steps:5d} steps" if run else f"{'-':>6}"
    print(f"  {name:<28} {100 * mean:5.1f} +- {100 * half:.1f} %   {learned:<28} {bar}", flush=True)


STYLE = (
    "svg{font:12.5px system-ui,sans-serif;fill:#16191d;background:#fff}"
    ".axis{fill:#5b646e}.grid{stroke:#e9ecef}.axis-line{stroke:#5b646e}.ink{--c:var(--l)}"
    ".line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}"
    ".leader{fill:none;stroke:var(--c);opacity:.65}"
)
COLOURS = ("#0072b2", "#d55e00", "#008a67", "#b3548a", "#555555")


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    lines = [
        Line(name=name, points=tuple(points), light=colour, dark=colour, kind="thin")
        for (name, points), colour in zip(curves.items(), COLOURS, strict=True)
    ]
    svg = line_chart(
        lines,
        (),
        width=720,
        summary="5-way 1-shot accuracy on validation scripts by CPU seconds of training",
        unit="CPU seconds of training",
    )
    head, rest = svg.split(">", 1)
    whole = f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{rest}\n'
    files.write_whole(path, whole.encode())
    print(f"curves: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a twentieth of the time, 100 episodes"
    )
    parser.add_argument("--svg", type=Path, help="where to draw the curves")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # A linear solve that ends early says so each time; here they are counted.
    warnings.filterwarnings("ignore", message="implicit_bilevel: the solver ended")
    print(machine())
    share = 0.05 if args.quick else 1.0
    train_on, validation, test = (data.glyphs(s) for s in ("train", "validation", "test"))
    seen = [data.episodes(validation, tasks=20, seed=2)[i] for i in range(2 if args.quick else 5)]
    tests = [data.episodes(test, tasks=20, seed=3)[i] for i in range(5 if args.quick else 30)]
    print(
        f"5-way 1-shot: {len(set(train_on.scripts))} scripts ({len(train_on.characters)} "
        f"characters) to learn on, {len(set(test.scripts))} ({len(test.characters)}) held out, "
        f"{20 * len(tests)} episodes"
    )
    report("pixels, nearest", pixels, tests, None)
    curves = {}

    method, after = prototypical(0)
    run = train(method, train_on, seen, 20 * share)
    report("prototypes", after(0), tests, run, "bar 87 within 20 CPU s")
    report("prototypes, then 3 steps", after(3), tests, run, "bar 87 within 20 CPU s")
    curves["prototypes"] = run.curve

    for name, second_order, bar in (
        ("MAML, second order", True, "bar 80 within 600 CPU s"),
        ("MAML, first order", False, ""),
    ):
        method = maml(0, second_order=second_order)
        run = train(method, train_on, seen, 120 * share)
        report(name, method.judge, tests, run, bar)
        curves[name] = run.curve

    ends: Counter[str] = Counter()
    method = imaml(0, ends)
    run = train(method, train_on, seen, 300 * share)
    report("iMAML", method.judge, tests, run, "bar 80 within 600 CPU s")
    print(f"    its linear solves ended by: {dict(ends)}")
    curves["iMAML"] = run.curve
    curves["pixels, nearest"] = [(0.0, level := judged(pixels, seen)[0]), (300 * share, level)]
    if args.svg:
        draw(curves, args.svg)


if __name__ == "__main__":
    main()

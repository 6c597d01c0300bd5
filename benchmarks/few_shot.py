"""New classes from 1, 5 and 10 examples each: `fit` beside what the frozen base can do.

    python benchmarks/few_shot.py [EPISODES]
    python benchmarks/few_shot.py tune

A small convnet is trained on Fashion-MNIST's classes 0 .. 4 (clothes) and has seen none of 5 .. 9
(shoes, shirt, bag). An episode draws K training images of each of these five to learn from, and 40
test images of each to be right on; everyone gets the same. On the features of the frozen base: the
class whose mean direction is nearest, and logistic regression (L-BFGS, L2). On the pixels, as if
there were no base: logistic regression. Ours starts its head at the class means and fits head and
delta for 20 steps; "head alone" fits nothing below. Intervals: 95 %, of the mean paired difference
over episodes, for this one base.

The base's recipe, ranks, sites, rates and the L2 were chosen on the mirrored problem, a base of the
classes 5 .. 9 and episodes of 0 .. 4; `tune` is the last round of that. A rate serves every K.

Needs: Fashion-MNIST (Debian: dataset-fashion-mnist).

Claim: LoRA is right more often than both rivals on the frozen base at 1, 5 and 10 shots, and than
the pixels at 5 and 10. At 1 shot the pixels win.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _timing import machine
from tessera import arch, data, peft, random

WAYS, QUERIES, SHOTS, STEPS = 5, 40, (1, 5, 10), 20
CONVS = ("body.0", "body.3", "body.6")
Maker = Callable[[nn.Module], arch.Delta]
Look = Callable[[Tensor], Tensor]


class Half(NamedTuple):
    """Five of the ten classes, labels 0 .. 4."""

    train: data.Batch
    test: data.Batch


class Episode(NamedTuple):
    shots: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]


class Net(nn.Module):
    """Three convolutions, features of length 1, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(64 * 3 * 3, WAYS)

    def features(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def halves() -> tuple[Half, Half]:
    def images(batch: data.Batch, first: int) -> data.Batch:
        return data.Batch(batch.x.reshape(-1, 1, 28, 28), batch.y - first)

    one, two = data.benchmark("fashion_mnist", num_tasks=2)
    return (
        Half(images(one.train, 0), images(one.test, 0)),
        Half(images(two.train, WAYS), images(two.test, WAYS)),
    )


def base(half: Half, seed: int, steps: int = 1000) -> Net:
    torch.manual_seed(seed)
    net = Net()
    with torch.no_grad():
        net.head.weight.mul_(10)  # features have length 1: logits need room
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    fading = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        rows = torch.randint(len(half.train.y), (64,))
        optimizer.zero_grad()
        F.cross_entropy(net(half.train.x[rows]), half.train.y[rows]).backward()
        optimizer.step()
        fading.step()
    net.eval()
    with torch.no_grad():
        right = (net(half.test.x).argmax(1) == half.test.y).float().mean().item()
        net.head.weight.zero_()  # its classes are none of an episode's
        net.head.bias.zero_()
    print(f"the base is right on {100 * right:.1f} % of the test images of its own classes")
    return net


def episodes(half: Half, count: int, shots: int, name: str) -> list[Episode]:
    def draw(batch: data.Batch, n: int, i: int, part: str) -> tuple[Tensor, Tensor]:
        rows = []
        for c in range(WAYS):
            own = (batch.y == c).nonzero().flatten()
            rows.append(own[random.permutation(len(own), i, name, part, c)[:n]])
        chosen = torch.cat(rows)
        return batch.x[chosen], batch.y[chosen]

    return [
        Episode(draw(half.train, shots, i, "shots"), draw(half.test, QUERIES, i, "queries"))
        for i in range(count)
    ]


def share(predicted: Tensor, episode: Episode) -> float:
    return (predicted == episode.queries[1]).double().mean().item()


def pixels(x: Tensor) -> Tensor:
    return F.normalize(x.flatten(1), dim=-1)


@torch.no_grad()
def nearest_mean(look: Look, episode: Episode) -> float:
    (x, y), (asked, _) = episode
    weight, _ = peft.class_means(look(x), y, WAYS)
    return share((look(asked) @ weight.T).argmax(1), episode)


def logistic(look: Look, episode: Episode, l2: float) -> float:
    (x, y), (asked, _) = episode
    with torch.no_grad():
        known, new = 8 * look(x), 8 * look(asked)
    weight = torch.zeros(WAYS, known.shape[1], requires_grad=True)
    bias = torch.zeros(WAYS, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(known @ weight.T + bias, y) + l2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return share((new @ weight.T + bias).argmax(1), episode)


def fitted(net: Net, episode: Episode, make: Maker, lr: float) -> float:
    delta = make(net)
    with torch.no_grad():
        weight, bias = peft.class_means(net.features(episode.shots[0]), episode.shots[1], WAYS)
        # A mask's values are a difference from the base's head, which is zero: the same tensors.
        for name, start in (("head.weight", weight), ("head.bias", bias)):
            whole = delta.tensors.get(f"{name}.full")
            (delta.tensors[f"{name}.values"] if whole is None else whole).copy_(start)
    peft.fit(delta, episode.shots, steps=STEPS, lr=lr)
    with torch.no_grad():
        return share(peft.apply(net, delta)(episode.queries[0]).argmax(1), episode)


def lora(rank: int, sites: Sequence[str]) -> Maker:
    return lambda net: peft.lora(net, rank, sites=sites, head="head")


FITS: dict[str, tuple[Maker, float]] = {
    "head alone": (lambda net: peft.mask(net, "head"), 4e-2),
    "LoRA, rank 8, 2 of 3 layers": (lora(8, CONVS[1:]), 2e-2),
    "IA3, 3 layers": (lambda net: peft.ia3(net, sites=CONVS, head="head"), 4e-2),
    "mask, 2 of 3 layers whole": (lambda net: peft.mask(net, CONVS[1:], head="head"), 3e-3),
}
L2 = 1e-2


def against(ours: list[float], rival: list[float]) -> str:
    more = [100 * (a - b) for a, b in zip(ours, rival, strict=True)]
    half = 1.96 * statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else math.nan
    return f"{statistics.mean(more):+6.1f} +- {half:.1f}"


def compare(net: Net, made: list[Episode]) -> None:
    frozen = {
        "nearest mean": [nearest_mean(net.features, e) for e in made],
        "logistic": [logistic(net.features, e, L2) for e in made],
        "pixels": [logistic(pixels, e, L2) for e in made],
    }
    print(f"  {'':<30}right  over{''.join(f'{name:>15}' for name in frozen)}")
    for name, right in frozen.items():
        print(f"  frozen: {name:<21} {100 * statistics.mean(right):5.1f} %")
    for name, (make, lr) in FITS.items():
        begun = time.perf_counter()
        right = [fitted(net, e, make, lr) for e in made]
        ms = 1e3 * (time.perf_counter() - begun) / len(made)
        gains = "".join(f"{against(right, rival):>15}" for rival in frozen.values())
        print(
            f"  {name:<29} {100 * statistics.mean(right):5.1f} %    {gains}   {ms:5.0f} ms",
            flush=True,
        )


def tune(count: int = 40) -> None:
    """The mirrored problem, over everything that was chosen."""
    clothes, others = halves()
    net = base(others, seed=1)
    makers = dict(FITS)
    makers["LoRA, rank 4, 3 layers"] = lora(4, CONVS), 2e-2
    makers["LoRA, rank 8, last layer"] = lora(8, CONVS[2:]), 2e-2
    for shots in (5, 10):
        made = episodes(clothes, count, shots, "tune")
        print(f"\n{shots} shots, {count} episodes of the classes 0 .. 4")
        for l2 in (1e-3, 1e-2, 1e-1, 1.0):
            mean = statistics.mean(logistic(net.features, e, l2) for e in made)
            print(f"  logistic, L2 {l2:g}: {100 * mean:.1f} %")
        for name, (make, chosen) in makers.items():
            for lr in (chosen / 2, chosen, 2 * chosen):
                mean = statistics.mean(fitted(net, e, make, lr) for e in made)
                print(f"  {name}, lr {lr:g}: {100 * mean:.1f} %", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    if sys.argv[1:] == ["tune"]:
        tune()
        return
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 120
    clothes, others = halves()
    net = base(clothes, seed=0)
    for shots in SHOTS:
        print(f"\n{shots} of each of {WAYS} new classes, {count} episodes (points; ms an episode)")
        compare(net, episodes(others, count, shots, "reported"))


if __name__ == "__main__":
    main()

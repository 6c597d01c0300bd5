"""New classes from five examples each, over a base that stays as it is, read top to bottom.

    python examples/continual/few_shot.py

A small convnet learns the digits 0 .. 4. Then 5 .. 9 arrive, five examples of each: `peft.fit`
fits a LoRA and a head of its own to these 25 images. Each episode draws other examples, and is
judged on all test images of the new digits beside what the frozen base can do without being
fitted: answer with the class whose mean feature is nearest.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import arch, data, peft, random

SHOTS, EPISODES, STEPS, LR, SEED = 5, 30, 20, 1e-2, 0

torch.set_num_threads(1)
torch.manual_seed(SEED)
old, new = data.benchmark("digits", num_tasks=2)  # task 1 has the digits 0 .. 4, task 2 the others


class Net(nn.Module):
    """Two convolutions, features of length 1, a head for five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
        )
        self.head = nn.Linear(32 * 2 * 2, 5)

    def features(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


# The base: an ordinary classifier of the old digits.
model = Net()
with torch.no_grad():
    model.head.weight.mul_(10)  # features have length 1: logits need room
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(600):
    rows = torch.randint(len(old.train.y), (64,))
    optimizer.zero_grad()
    F.cross_entropy(model(old.train.x[rows]), old.train.y[rows]).backward()
    optimizer.step()
model.eval()
with torch.no_grad():
    right = (model(old.test.x).argmax(1) == old.test.y).float().mean().item()
print(f"base: {100 * right:.1f} % of the old digits' test images")
before = arch.base_hash(model)


def draw(episode: int) -> tuple[Tensor, Tensor]:
    """Some training images of each new digit, labelled 0 .. 4."""
    rows = []
    for digit in new.classes:
        own = (new.train.y == digit).nonzero().flatten()
        rows.append(own[random.permutation(len(own), SEED, "shots", episode, digit)[:SHOTS]])
    chosen = torch.cat(rows)
    return new.train.x[chosen], new.train.y[chosen] - new.classes[0]


def judge(predicted: Tensor) -> float:
    return (predicted == new.test.y - new.classes[0]).double().mean().item()


frozen, pixels, fitted = [], [], []
for episode in range(EPISODES):
    x, y = draw(episode)

    # Without fitting: the nearest class mean, on the base's features and on the pixels.
    with torch.no_grad():
        weight, bias = peft.class_means(model.features(x), y, 5)
        frozen.append(judge((model.features(new.test.x) @ weight.T).argmax(1)))
        means, _ = peft.class_means(x.flatten(1), y, 5)
        pixels.append(judge((new.test.x.flatten(1) @ means.T).argmax(1)))

    # Fitted: a LoRA over both convolutions, and a head that starts at these class means.
    delta = peft.lora(model, r=8, sites=["body.0", "body.3"], head="head", seed=episode)
    with torch.no_grad():
        delta.tensors["head.weight.full"].copy_(weight)
        delta.tensors["head.bias.full"].copy_(bias)
    peft.fit(delta, (x, y), steps=STEPS, lr=LR)
    with torch.no_grad():
        fitted.append(judge(peft.apply(model, delta)(new.test.x).argmax(1)))

more = [100 * (a - b) for a, b in zip(fitted, frozen, strict=True)]
half = 1.96 * statistics.stdev(more) / math.sqrt(EPISODES)
print(f"new digits from {SHOTS} examples each, {EPISODES} episodes:")
print(f"  nearest mean, pixels       {100 * statistics.mean(pixels):5.1f} %")
print(f"  nearest mean, frozen base  {100 * statistics.mean(frozen):5.1f} %")
print(
    f"  fitted delta               {100 * statistics.mean(fitted):5.1f} %, "
    f"{statistics.mean(more):+.1f} +- {half:.1f} points over the frozen base"
)

# The base is bit for bit what it was; what was learned is a small folder.
assert arch.base_hash(model) == before
delta.save("few_shot")
size = sum(f.stat().st_size for f in Path("few_shot").iterdir()) / 1024
print(f"saved the last delta in few_shot ({size:.0f} KiB)")
again = arch.Delta.load("few_shot")
with torch.no_grad():
    print("loaded again:", judge(peft.apply(model, again)(new.test.x).argmax(1)) == fitted[-1])

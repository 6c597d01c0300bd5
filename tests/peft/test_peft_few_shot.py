"""New classes over a base that never saw them: fitting beats the frozen base on the same shots."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import arch, data, peft, random

SHOTS, EPISODES = 5, 12


class Net(nn.Module):
    """Two convolutions, features of length 1, a head for five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
        )
        self.head = nn.Linear(128, 5)

    def features(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def base(old: data.Task) -> Net:
    """A classifier of the old digits."""
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.head.weight.mul_(10)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(300):
        rows = torch.randint(len(old.train.y), (64,))
        optimizer.zero_grad()
        F.cross_entropy(net(old.train.x[rows]), old.train.y[rows]).backward()
        optimizer.step()
    return net.eval()


def shots_of(new: data.Task, episode: int) -> tuple[Tensor, Tensor]:
    rows = []
    for c in new.classes:
        own = (new.train.y == c).nonzero().flatten()
        rows.append(own[random.permutation(len(own), 0, "few shot", episode, c)[:SHOTS]])
    chosen = torch.cat(rows)
    return new.train.x[chosen], new.train.y[chosen] - new.classes[0]


@pytest.mark.slow
def test_a_fit_beats_the_nearest_class_mean_of_the_frozen_base() -> None:
    old, new = data.benchmark("digits", num_tasks=2)
    net = base(old)
    before = arch.base_hash(net)
    asked, answers = new.test.x, new.test.y - new.classes[0]
    more, gained = [], []
    for episode in range(EPISODES):
        x, y = shots_of(new, episode)
        delta = peft.lora(net, r=8, sites=["body.0", "body.3"], head="head", seed=episode)
        with torch.no_grad():
            weight, bias = peft.class_means(net.features(x), y, 5)
            delta.tensors["head.weight.full"].copy_(weight)
            delta.tensors["head.bias.full"].copy_(bias)
            frozen = peft.apply(net, delta)(asked).argmax(1)
        # Unfitted, the delta is the rule it is measured against.
        assert torch.equal(frozen, (net.features(asked) @ weight.T).argmax(1))
        peft.fit(delta, (x, y), steps=20, lr=1e-2)
        with torch.no_grad():
            fitted = peft.apply(net, delta)(asked).argmax(1)
        more.append(((fitted == answers).double() - (frozen == answers).double()).mean().item())
        gained.append((fitted == answers).double().mean().item())
    # One-sided t at 0.1 % over 12 episodes; chance is 0.2.
    least = statistics.mean(more) - 4.025 * statistics.stdev(more) / math.sqrt(EPISODES)
    assert least > 0.0, more
    assert statistics.mean(gained) > 0.75, gained
    assert arch.base_hash(net) == before

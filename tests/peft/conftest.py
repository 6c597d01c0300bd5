"""A small model with every kind of module a delta can lie over, and deltas that are not fresh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tessera import peft, random
from tessera.arch import Delta


class Net(nn.Module):
    """Tokens [n, s] -> logits [n, 5]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.att = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=dropout)
        self.conv = nn.Conv1d(16, 8, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.att(self.emb(x)).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.relu(self.fc(self.norm(h))).mean(1))


@pytest.fixture
def net() -> nn.Module:
    model = Net()
    draw = random.generator(0, "tests.peft.net")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    return model.eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 20, (6, 7), generator=random.generator(0, "tests.peft.tokens"))


def _moved(delta: Delta, seed: int = 0, size: float = 0.3) -> Delta:
    draw = random.generator(seed, "tests.peft.moved")
    tensors = {
        name: (t.detach() + size * torch.randn(t.shape, generator=draw, dtype=t.dtype))
        if t.is_floating_point()
        else t
        for name, t in delta.tensors.items()
    }
    return dataclasses.replace(
        delta, tensors={n: t.requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    )


@pytest.fixture
def moved() -> Callable[..., Delta]:
    """A delta after some training, as it were: every value drawn anew around where it is."""
    return _moved


FRESH: dict[str, Callable[[nn.Module], Delta]] = {
    "lora": lambda m: peft.lora(m, 2),
    "lora everywhere": lambda m: peft.lora(
        m, 2, 3.0, sites=["emb", "att.self_attn", "conv", "fc", "att.self_attn.out_proj"]
    ),
    "lora with a head": lambda m: peft.lora(m, 2, sites="fc", head="head"),
    "ia3": lambda m: peft.ia3(m),
    "ia3 of a convolution": lambda m: peft.ia3(m, sites="conv", feedforward="fc"),
    "mask of layers": lambda m: peft.mask(m, ["norm", "conv", "att"]),
    "mask of weights": lambda m: peft.mask(
        m, {"fc.weight": torch.arange(64).reshape(8, 8) % 3 == 0, "emb.weight": True}
    ),
    "prefix": lambda m: peft.prefix(m, 3),
    "prompt": lambda m: peft.prompt(m, 2),
}


@pytest.fixture(params=list(FRESH))
def fresh(request: pytest.FixtureRequest) -> Callable[[nn.Module], Delta]:
    """Every kind of delta over `net`, just made."""
    return FRESH[request.param]


@pytest.fixture
def every() -> dict[str, Callable[[nn.Module], Delta]]:
    return FRESH

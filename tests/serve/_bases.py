"""Bases that a test's process and the one it starts build alike."""

from __future__ import annotations

import time

import torch
from torch import nn

from tessera import random


def net() -> nn.Module:
    """[rows, 6] -> [rows, 3]."""
    draw = random.generator(0, "tests.serve.bases")
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    return model.eval()


class Slow(nn.Module):
    """Hangs where it meets a number above 90; prints, as the code of users does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, input):
        if input.max() > 90:
            time.sleep(60)
        print("this is no message")
        return self.inner(input)


def slow() -> nn.Module:
    print("nor is this", flush=True)
    return Slow().eval()

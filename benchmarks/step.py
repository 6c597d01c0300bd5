"""What EWC costs a training step: `opt.consolidate` <= 1.12x plain, `loss.ewc` <= 1.30x.

    python benchmarks/step.py

MLP 784-400-400-10 (0.48 M parameters), batch 128, one thread; 1 and 5 anchors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from _timing import interleaved, machine, show
from tessera import arch, loss, opt
from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)
    )


def variant(kind: str, anchors: int, optimizer: str) -> Callable[[], object]:
    """Ten training steps of a model of its own."""
    net = model()
    batch = Batch(torch.randn(128, 784), torch.randint(0, 10, (128,)))
    known = [arch.anchor_from(net, f"task{i}", data=[batch]) for i in range(anchors)]
    plugin = opt.consolidate(known, lam=1.0) if kind == "consolidate" else None
    if optimizer == "SGD":
        o: torch.optim.Optimizer = tg.SGD(net.parameters(), lr=1e-3, plugin=plugin)
    else:
        o = tg.Adam(net.parameters(), lr=1e-3, plugin=plugin)

    @tg.training_step(optimizer=o)
    def step(b: Batch) -> Tensor:
        task = T.cross_entropy(net(b.x), b.y)
        return task + loss.ewc(net, known, lam=1.0) if kind == "loss.ewc" else task

    def ten() -> None:
        for _ in range(10):
            step(batch)

    return ten


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    for optimizer in ("SGD", "Adam"):
        variants = {"plain": variant("plain", 0, optimizer)}
        for kind in ("consolidate", "loss.ewc"):
            for n in (1, 5):
                variants[f"{kind}, {n} anchors"] = variant(kind, n, optimizer)
        times = interleaved(variants, rounds=15)
        print(f"tg.{optimizer}, 10 steps")
        for name in variants:
            bar = "(bar 1.12)" if "cons" in name else "(bar 1.30)" if "ewc" in name else ""
            show(times, name, "plain", bar)


if __name__ == "__main__":
    main()

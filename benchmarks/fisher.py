"""The exact diagonal Fisher against a loop over examples: >= 10x, equal to 1e-5.

    python benchmarks/fisher.py

MLP 784-400-400-10, N = 1000, one thread; the loop does the same work one example at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from _timing import interleaved, machine, show
from tessera import arch


def by_loop(model: nn.Module, x: Tensor, y: Tensor, estimator: str) -> dict[str, Tensor]:
    params = dict(model.named_parameters())
    sums = {n: torch.zeros_like(p) for n, p in params.items()}
    for i in range(len(x)):
        log_p = torch.log_softmax(model(x[i : i + 1]), 1)[0]
        labels = range(len(log_p)) if estimator == "exact" else [int(y[i])]
        for c in labels:
            weight = log_p[c].exp().item() if estimator == "exact" else 1.0
            grads = torch.autograd.grad(log_p[c], list(params.values()), retain_graph=True)
            for n, g in zip(params, grads, strict=True):
                sums[n] += weight * g.square()
    return {n: s / len(x) for n, s in sums.items()}


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)
    )
    x, y = torch.randn(1000, 784), torch.randint(0, 10, (1000,))
    for estimator in ("exact", "empirical"):

        def ours(estimator: str = estimator) -> dict[str, Tensor]:
            data = [(x, y)]
            return dict(arch.anchor_from(model, "a", data=data, estimator=estimator).fisher)

        def loop(estimator: str = estimator) -> dict[str, Tensor]:
            return by_loop(model, x, y, estimator)

        times = interleaved({"anchor_from": ours, "loop": loop}, rounds=3)
        print(f"{estimator}, N = 1000")
        show(times, "loop", "anchor_from", "(bar 10)")
        a, b = ours(), loop()
        worst = max(((a[n] - b[n]).abs().max() / b[n].abs().max()).item() for n in a)
        print(f"  largest difference, relative to the largest entry: {worst:.1e} (bar 1e-5)")
    batches = {
        size: arch.anchor_from(
            model, "a", data=[(a, b) for a, b in zip(x.split(size), y.split(size), strict=True)]
        ).fisher
        for size in (1, 8, 128)
    }
    same = all(torch.equal(batches[1][n], batches[s][n]) for s in (8, 128) for n in batches[1])
    print(f"batch sizes 1, 8 and 128 give identical bits: {same}")


if __name__ == "__main__":
    main()

"""EWC's gradient against the memory traffic it cannot avoid, at 1, 10 and 50 M parameters.

    python benchmarks/consolidation.py

The unit is what copying 20 bytes a parameter takes (read theta, c and F, read and write the
gradient), measured as 2.5 copies of one float32 vector. Bars: 2.0, 3.5 and 2.2 of it. Transformer
shapes, one thread; the value of `loss.ewc` is compared with a float64 sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from _timing import interleaved, machine, show
from tessera import loss
from tessera.arch import Anchor
from tessera.ops import kernels

SIZES = {"1 M": (128, 5), "10 M": (384, 6), "50 M": (720, 8)}  # width, blocks
BARS = {"1 M": 2.0, "10 M": 3.5, "50 M": 2.2}


def block(d: int) -> nn.Module:
    return nn.ModuleList(
        [nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)]
    )


def measure(name: str) -> None:
    width, depth = SIZES[name]
    model = nn.ModuleList([block(width) for _ in range(depth)])
    params = list(model.parameters())
    n = sum(p.numel() for p in params)
    anchor = Anchor(
        "a",
        {k: p.detach() + 0.01 * torch.randn_like(p) for k, p in model.named_parameters()},
        {"fisher": {k: torch.rand_like(p) for k, p in model.named_parameters()}},
    )
    thetas = [p.detach() for p in params]
    centres, weights = list(anchor.params.values()), list(anchor.fisher.values())
    grads = [torch.zeros_like(p) for p in thetas]
    source, target = torch.randn(n), torch.empty(n)

    def naive() -> Tensor:
        total = torch.zeros(())
        for p, c, w in zip(params, centres, weights, strict=True):
            total = total + 0.5 * (w * (p - c) ** 2).sum()
        total.backward()
        return total

    variants = {
        "2.5 copies": lambda: [target.copy_(source) for _ in range(5)],  # halved below
        "opt.consolidate's pass": lambda: kernels.add_pulls(grads, thetas, centres, weights),
        "naive loop + autograd": naive,
    }
    times = interleaved(variants, rounds=9 if n > 2e7 else 21)
    times["2.5 copies"] = [t / 2 for t in times["2.5 copies"]]
    print(f"{name}: {n / 1e6:.1f} M parameters in {len(params)} tensors")
    for v in variants:
        bar = f"(bar {BARS[name]})" if v.startswith("opt") else ""
        show(times, v, "2.5 copies", bar)
    got = loss.ewc(model, anchor, lam=1.0).item()
    exact = sum(
        0.5 * (w.double() * (p.double() - c.double()).square()).sum().item()
        for p, c, w in zip(thetas, centres, weights, strict=True)
    )
    print(f"  loss.ewc's value is off by {abs(got / exact - 1):.1e} (bar 1e-6)")


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    print("kernel:", "C" if kernels.available(wait_s=60) else "PyTorch (no C compiler)")
    torch.manual_seed(0)
    for name in SIZES:
        measure(name)


if __name__ == "__main__":
    main()

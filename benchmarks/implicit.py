"""Peak memory of a meta-gradient by the length of its inner loop.

    python benchmarks/implicit.py [--repeats 3]

Implicit at K = 100 takes at most 1.3x what it takes at K = 5, and at most 1/10 of the unrolled
loop at K = 100; with remat=True the loop takes at most 1/3 of that. MLP 64-512-512-1, batch 256,
prox 1, one thread. Peak memory is VmHWM over what the process had before the call, each figure in
a fresh process; the median of the repeats.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from _timing import machine
from tessera import graph as tg
from tessera import meta
from tessera.data import Batch

LR, PROX = 0.05, 1.0
CASES = [("implicit", 5), ("implicit", 100), ("unrolled", 5), ("unrolled", 100), ("remat", 100)]
mse = nn.functional.mse_loss


def implicit(model: nn.Module, train: Batch, val: Batch, K: int) -> Tensor:
    return meta.implicit_bilevel(
        model,
        inner=lambda m: tg.SGD(m, lr=LR, steps=K),
        train_batch=train,
        val_batch=val,
        prox=PROX,
        loss_fn=mse,
    )


def unrolled(model: nn.Module, train: Batch, val: Batch, K: int) -> Tensor:
    """The same inner problem, through all its steps, by hand."""
    start = dict(model.named_parameters())
    w = start
    for _ in range(K):
        loss = mse(torch.func.functional_call(model, w, (train.x,)), train.y)
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        w = {
            n: p - LR * (g + PROX * (p - start[n]))
            for (n, p), g in zip(w.items(), grads, strict=True)
        }
    return mse(torch.func.functional_call(model, w, (val.x,)), val.y)


def remat(model: nn.Module, train: Batch, val: Batch, K: int) -> Tensor:
    """Steps that are run again in the backward; without the pull towards the start."""
    adapted, _ = meta.maml_step(model, train, inner_opt=tg.SGD(LR), K=K, loss_fn=mse, remat=True)
    return mse(adapted(val.x), val.y)


OUTER = {"implicit": implicit, "unrolled": unrolled, "remat": remat}


def status(field: str) -> float:
    """A size in MB from what Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(x.split()[1]) / 1024 for x in lines if x.startswith(field))


def measure(kind: str, K: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 1)
    )
    train, val = (Batch(torch.randn(256, 64), torch.randn(256, 1)) for _ in range(2))
    # What the first call loads is no part of the claim.
    tiny = nn.Linear(2, 1)
    rows = Batch(torch.randn(4, 2), torch.randn(4, 1))
    OUTER[kind](tiny, rows, rows, 2).backward()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is there now
    before, begun = status("VmRSS"), time.process_time()
    OUTER[kind](model, train, val, K).backward()
    norm = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm().item()
    seconds = time.process_time() - begun
    return {"mb": status("VmHWM") - before, "seconds": seconds, "norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case[0], int(args.case[1]))))
        return
    torch.set_num_threads(1)
    print(machine())
    mb: dict[tuple[str, int], float] = {}
    for kind, K in CASES:
        command = [sys.executable, __file__, "--case", kind, str(K)]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(args.repeats)
        ]
        sizes = [r["mb"] for r in runs]
        mb[kind, K] = statistics.median(sizes)
        seconds = statistics.median(r["seconds"] for r in runs)
        print(
            f"  {kind:<9} K = {K:<4} {mb[kind, K]:7.1f} MB ({min(sizes):.1f} .. {max(sizes):.1f})"
            f"   {seconds:6.2f} CPU s   |gradient| {runs[0]['norm']:.4f}"
        )
    print(
        f"implicit, K = 100 / K = 5: {mb['implicit', 100] / mb['implicit', 5]:.2f}x (bar 1.3)\n"
        f"unrolled / implicit, K = 100: {mb['unrolled', 100] / mb['implicit', 100]:.1f}x (bar 10)\n"
        f"unrolled / remat, K = 100: {mb['unrolled', 100] / mb['remat', 100]:.1f}x (bar 3)"
    )


if __name__ == "__main__":
    main()

"""Generative replay keeps no row, and passes 65 % in class-incremental Split Fashion-MNIST.

    python benchmarks/generative.py [--seed 0 1 2] [--epochs 1] [--validation 0.1] [--ablation]

Prints average accuracy after the fifth task and seconds, by recipe and seed; `er` holds 500 rows,
`joint` sees all the data at once. Seconds are of one run each on the machine named. --ablation
measures `generative` with and without its class gates and its holding of drawings code by code.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from _timing import machine
from tessera import data
from tessera.data import vae
from tessera.data.vae import VAE
from tessera.recipes import RECIPES, Run, Settings
from tessera.recipes.generative import generative
from tessera.recipes.learn import Recipe, build

ABLATED = ("neither", "gates", "codes", "gates and codes")
COMPARED: dict[str, Recipe] = {
    "finetune": RECIPES["finetune"],
    "er": RECIPES["er"],
    "generative": generative,
    "joint": RECIPES["joint"],
}


def measure(name: str, seed: int, epochs: int, validation: float) -> tuple[float, float]:
    """(average accuracy in %, seconds) of one run."""
    settings = Settings(
        recipe="generative" if name in ABLATED else name,
        stream="fashion_mnist",
        seed=seed,
        epochs=epochs,
        buffer=500,
    ).resolved()
    bench = data.benchmark("fashion_mnist", "class", seed=seed, validation=validation)
    begun = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        run = Run(build(settings.model, seed, bench.input_shape, 10), bench, settings)
        COMPARED.get(name, generative)(run)
    return 100 * run.matrix.average_accuracy(), time.perf_counter() - begun


def ablated(name: str, seed: int, epochs: int, validation: float) -> tuple[float, float]:
    """As `measure`, of the recipe whose generator has only these of its two parts."""

    def relearn(self: VAE, source: Any, y: Tensor, relearned: Tensor, g: torch.Generator) -> Tensor:
        return held(self, source, y, torch.ones_like(relearned), g)

    held, share = VAE.recall, vae._OPEN
    vae._OPEN = share if "gates" in name else 1.0
    VAE.recall = held if "codes" in name else relearn
    try:
        return measure(name, seed, epochs, validation)
    finally:
        vae._OPEN, VAE.recall = share, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--validation", type=float, default=0.0)
    parser.add_argument("--ablation", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    judged = f"a validation split of {args.validation:g}" if args.validation else "the test set"
    print(f"{args.epochs} epoch(s) a task, accuracy on {judged}\n")
    print("| recipe | " + " | ".join(f"seed {s}" for s in args.seed) + " | seconds |")
    print("|---|" + "---|" * (len(args.seed) + 1))
    for name in ABLATED if args.ablation else COMPARED:
        one = ablated if args.ablation else measure
        found = [one(name, seed, args.epochs, args.validation) for seed in args.seed]
        cells = " | ".join(f"{accuracy:.1f}" for accuracy, _ in found)
        took = " ".join(f"{seconds:.0f}" for _, seconds in found)
        print(f"| {name} | {cells} | {took} |", flush=True)


if __name__ == "__main__":
    main()

"""The table of docs/methods.md: every recipe in every scenario of Split Fashion-MNIST, one epoch.

    python benchmarks/table.py [--scenario class domain task] [--recipe ...] [--seed 0]

Prints Markdown: average accuracy / backward transfer in %, with the defaults of `tessera learn`.
"""

from __future__ import annotations

import argparse

from tessera.recipes import RECIPES, Settings, learn


def cell(recipe: str, scenario: str, seed: int) -> str:
    r = learn(Settings(recipe=recipe, stream="fashion_mnist", scenario=scenario, seed=seed))
    bwt = r["backward_transfer"]
    return f"{100 * r['average_accuracy']:.1f}" + ("" if bwt is None else f" / {100 * bwt:+.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenario", nargs="*", default=["task", "domain", "class"])
    parser.add_argument("--recipe", nargs="*", default=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| recipe | " + " | ".join(args.scenario) + " |")
    print("|---|" + "---|" * len(args.scenario))
    for recipe in args.recipe:
        cells = [cell(recipe, s, args.seed) for s in args.scenario]
        print(f"| {recipe} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

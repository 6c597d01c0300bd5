"""Choose each recipe's default strength on a validation split; the test set is never read.

    python benchmarks/tune_strength.py                     # all recipes and scenarios
    python benchmarks/tune_strength.py --recipe ewc --scenario domain --seeds 3

For every strength: mean average accuracy over the seeds, measured on a tenth of the training rows
that is held out from learning. The winner is marked; the table in recipes/settings.py holds them.
"""

from __future__ import annotations

import argparse

from tessera.recipes import Settings, learn

GRID: dict[str, list[float]] = {
    "ewc": [1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 3e6, 1e7],
    "online-ewc": [1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 3e6, 1e7],
    "er+ewc": [1e0, 1e1, 1e2, 1e3, 1e4, 1e5],
    "si": [1e0, 1e1, 1e2, 1e3, 1e4, 1e5],
    "l2sp": [0.001, 0.01, 0.1, 0.3, 1.0, 3.0],
    "lwf": [0.3, 1.0, 3.0, 10.0],
    "der": [0.1, 0.2, 0.5, 1.0, 2.0],
}


def accuracy(recipe: str, scenario: str, lam: float, args: argparse.Namespace) -> float:
    runs = [
        learn(
            Settings(
                recipe=recipe,
                stream=args.stream,
                scenario=scenario,
                lam=lam,
                seed=seed,
                validation=0.1,
            )
        )
        # Seed 0 is the one the docs report, so it is not tuned on.
        for seed in range(1, args.seeds + 1)
    ]
    return 100 * sum(r["average_accuracy"] for r in runs) / len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stream", default="fashion_mnist")
    parser.add_argument("--recipe", nargs="*", default=list(GRID), choices=list(GRID))
    parser.add_argument("--scenario", nargs="*", default=["task", "domain", "class", "permuted"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--grid", nargs="*", type=float, help="these strengths instead")
    args = parser.parse_args()
    print(f"{args.stream}, validation accuracy in %, mean of {args.seeds} seeds")
    for recipe in args.recipe:
        for scenario in args.scenario:
            scores = {
                lam: accuracy(recipe, scenario, lam, args) for lam in args.grid or GRID[recipe]
            }
            best = max(scores, key=scores.__getitem__)
            cells = "  ".join(
                f"{'*' if lam == best else ''}{lam:g}: {score:.1f}" for lam, score in scores.items()
            )
            print(f"{recipe:>10} {scenario:<9} {cells}", flush=True)


if __name__ == "__main__":
    main()

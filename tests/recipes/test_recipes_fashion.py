"""The figures Split Fashion-MNIST must reach with the defaults: one epoch, seed 0, MLP 2 x 256."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tessera.recipes import Settings, learn

PACKAGE = Path("/usr/share/datasets/fashion-mnist")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PACKAGE.is_dir(),
        reason="needs Debian's dataset-fashion-mnist: apt-get install dataset-fashion-mnist",
    ),
]


@cache
def accuracy(recipe: str, scenario: str) -> float:
    settings = Settings(recipe=recipe, stream="fashion_mnist", scenario=scenario, buffer=500)
    return 100 * float(learn(settings)["average_accuracy"])


@pytest.mark.parametrize(
    ("recipe", "scenario", "least"),
    [
        ("ewc", "task", 98.0),
        ("lwf", "task", 98.0),
        ("er", "domain", 95.0),
        ("er", "class", 72.0),
        ("der", "class", 78.0),
    ],
)
def test_a_recipe_reaches_its_figure(recipe: str, scenario: str, least: float) -> None:
    assert accuracy(recipe, scenario) >= least


def test_domain_incremental_ewc_gains_ten_points_over_finetuning() -> None:
    assert accuracy("ewc", "domain") >= accuracy("finetune", "domain") + 10


def test_a_regulariser_alone_stays_low_in_class_incremental() -> None:
    # A correct one is supposed to fail here; more would mean that the tasks leak.
    assert accuracy("ewc", "class") < 45

"""What every test gets: one thread a worker, and a seeded process-wide generator."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

# No deadline: two workers share two cores with whatever else runs. Same examples on every run.
hypothesis.settings.register_profile("tessera", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tessera")


def pytest_configure() -> None:
    # Before collection, so that the doctests of the package get it too.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded_process() -> Iterator[None]:
    """Start every test from the same process-wide generator, and put it back.

    Tests make models, and `nn.Linear` draws from it; the package itself never does
    (test_architecture.py, rule no_global_random).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield

from __future__ import annotations

import math

import pytest
import torch

from tessera import loss
from tessera.errors import InputError


def test_it_is_the_weighted_mean_by_hand():
    assert loss.recency_weighted(torch.tensor(8.0), torch.tensor(4.0), rho=0.75).item() == 7.0


def test_gradients_reach_both_in_proportion():
    new, replay = (torch.tensor(1.0, requires_grad=True) for _ in range(2))
    loss.recency_weighted(new, replay, rho=0.25).backward()
    assert new.grad is not None
    assert replay.grad is not None
    assert (new.grad.item(), replay.grad.item()) == (0.25, 0.75)


@pytest.mark.parametrize("rho", [-0.1, 1.1, math.nan])
def test_a_weight_outside_the_unit_interval_is_refused(rho: float):
    with pytest.raises(InputError, match=r"needs rho in \[0, 1\], got"):
        loss.recency_weighted(torch.tensor(1.0), torch.tensor(1.0), rho=rho)


def test_losses_that_are_not_single_numbers_are_refused():
    with pytest.raises(InputError, match=r"two 0-d losses, got \(2,\) and \(\)"):
        loss.recency_weighted(torch.ones(2), torch.tensor(1.0), rho=0.5)

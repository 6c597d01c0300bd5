"""The loop itself, and the learning rates it may be given."""

import pytest
import torch
from torch import nn

from tessera import graph as tg
from tessera.arch.delta import Delta
from tessera.data import Batch
from tessera.errors import InputError, NonFiniteError, UnknownNameError
from tessera.meta.inner import InnerOpt, require_finite, steps_of
from tessera.meta.maml import maml_step
from tessera.meta.rates import learned_rates


class SignDescent:
    """A rule of one's own: what `maml_step` asks of it and nothing else."""

    steps = 2

    def update(self, params, grads, slots, step=0):
        return {n: p - 0.5 * grads[n].sign() for n, p in params.items()}, {}


def test_a_rule_of_ones_own_is_taken():
    assert isinstance(SignDescent(), InnerOpt)
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    support = Batch(torch.ones(1, 1), torch.zeros(1, 1))
    adapted, state = maml_step(
        model, support, inner_opt=SignDescent(), loss_fn=nn.functional.mse_loss
    )
    assert (adapted.params["weight"].item(), state.losses.tolist()) == (2.0, [9.0, 6.25])


def test_the_number_of_steps_is_the_calls_or_the_rules():
    assert steps_of(tg.SGD(0.1, steps=5), None) == 5
    assert steps_of(tg.SGD(0.1, steps=5), 2) == 2
    for bad in (True, -1, 2.0):
        with pytest.raises(InputError, match=rf"got K={bad!r}"):
            steps_of(tg.SGD(0.1), bad)


def test_the_first_loss_that_is_not_finite_is_named():
    losses = torch.zeros(4, 3)
    require_finite(losses)
    require_finite(losses + 3e38)  # each is finite, their sum is not
    losses[2, 1], losses[3, 0] = float("nan"), float("inf")
    with pytest.raises(NonFiniteError, match=r"loss of task 1 is nan at step 7 \(counted from 0\)"):
        require_finite(losses, before=5)
    with pytest.raises(NonFiniteError, match=r"the inner loss is inf at step 1"):
        require_finite(torch.tensor([0.0, float("inf")]))


def test_learned_rates_are_a_module_over_what_is_adapted():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    rates = learned_rates(model, 0.2, steps=4, per="element")
    each = rates()
    assert [sorted(r) for r in each] == [["0.weight", "1.bias", "1.weight"]] * 4
    assert each[1]["0.weight"].shape == (3, 2)
    assert [p.shape for p in rates.parameters()] == [(4, 3, 2), (4, 1, 3), (4, 1)]
    other = learned_rates(model, 0.9, steps=4, per="element")
    other.load_state_dict(rates.state_dict())
    assert torch.equal(other()[3]["1.bias"], each[3]["1.bias"])


def test_learned_rates_of_a_delta_go_by_its_names():
    tensors = {n: torch.ones(1, 1, requires_grad=True) for n in ("0.A", "0.B")}
    delta = Delta(kind="lora", tensors=tensors, scales={"0": 1.0})
    assert list(learned_rates(delta, 0.1)()) == ["0.A", "0.B"]


def test_bad_rates_are_named():
    model = nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"begins at lr > 0, got 0"):
        learned_rates(model, 0)
    with pytest.raises(InputError, match=r"steps >= 1 or None, got 0"):
        learned_rates(model, 0.1, steps=0)
    with pytest.raises(UnknownNameError, match=r"no kind of rates 'layer'"):
        learned_rates(model, 0.1, per="layer")
    with pytest.raises(InputError, match=r"no tensor that requires a gradient"):
        learned_rates(nn.Tanh(), 0.1)

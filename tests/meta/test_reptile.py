"""Reptile's direction: theta - theta_K, by hand and for any optimizer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import graph as tg
from tessera.arch.delta import Delta
from tessera.data import Batch
from tessera.errors import InputError
from tessera.meta.maml import maml_step
from tessera.meta.reptile import reptile_step
from tessera.meta.tasks import maml_tasks

HOW = {"inner_opt": tg.SGD(0.1), "K": 4, "loss_fn": F.mse_loss}


def tasks(n=3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, 2, dtype=torch.float64, generator=g)
    return Batch(x, torch.randn(n, 5, 1, dtype=torch.float64, generator=g))


def linear():
    torch.manual_seed(0)
    return nn.Linear(2, 1).double()


def each(model, batch, **how):
    return [maml_step(model, Batch(x, y), **HOW, **how)[0] for x, y in zip(*batch, strict=True)]


def test_the_gradient_is_where_the_loop_came_from_minus_where_it_went():
    model, (x, y) = linear(), (tasks().x[0], tasks().y[0])
    adapted, _ = maml_step(model, Batch(x, y), **HOW)
    length = reptile_step(model, adapted)
    w, b = (p.detach().clone().requires_grad_() for p in model.parameters())
    for _ in range(4):
        gw, gb = torch.autograd.grad(F.mse_loss(x @ w.T + b, y), [w, b])
        w, b = ((p - 0.1 * g).detach().requires_grad_() for p, g in ((w, gw), (b, gb)))
    expected = [model.weight.detach() - w, model.bias.detach() - b]
    torch.testing.assert_close([model.weight.grad, model.bias.grad], expected)
    assert not model.weight.grad.requires_grad
    torch.testing.assert_close(length, torch.cat([e.flatten() for e in expected]).norm())


def test_tasks_are_averaged_and_sgd_steps_towards_them():
    one, two, batch = linear(), linear(), tasks()
    reptile_step(one, each(one, batch))
    with tg.no_grad():
        reptile_step(two, maml_tasks(two, batch, **HOW)[0])
    torch.testing.assert_close(one.weight.grad, two.weight.grad, rtol=1e-12, atol=0)
    start = one.weight.detach().clone()
    torch.optim.SGD(one.parameters(), lr=0.5).step()
    ends = torch.stack([a.params["weight"].detach() for a in each(two, batch)])
    torch.testing.assert_close(one.weight.detach(), start + 0.5 * (ends.mean(0) - start))


def test_gradients_accumulate_and_what_was_not_adapted_gets_none_of_it():
    model, batch = linear(), tasks()
    ones = each(model, batch, only="bias")
    reptile_step(model, ones)
    first = model.bias.grad.clone()
    reptile_step(model, ones)
    torch.testing.assert_close(model.bias.grad, 2 * first)
    assert not model.weight.grad.any()


def test_bad_input_is_named_and_leaves_the_gradients():
    model = linear()
    with pytest.raises(InputError, match=r"at least one adapted model, got none"):
        reptile_step(model, [])
    other = nn.Linear(3, 1).double()
    (x, y) = tasks()
    adapted, _ = maml_step(model, Batch(x[0], y[0]), **HOW)
    with pytest.raises(InputError, match=r"no 'weight' of shape \(1, 3\)"):
        reptile_step(other, adapted)
    tensors = {"A": torch.ones(1, 2).double(), "B": torch.ones(1, 1).double()}
    delta = Delta(
        kind="lora",
        tensors={f"0.{n}": t.requires_grad_() for n, t in tensors.items()},
        scales={"0": 1.0},
    )
    whole = nn.Sequential(model)
    adapted, _ = maml_step(whole, Batch(x[0], y[0]), only=delta, **HOW)
    with pytest.raises(InputError, match=r"a delta that was adapted"):
        reptile_step(whole, adapted)
    assert model.weight.grad is None

"""EWC inside the optimizer is EWC in the loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import arch, loss, opt
from tessera import graph as tg
from tessera.arch import Anchor
from tessera.errors import AnchorError, InputError

OPTIMIZERS = {
    "sgd": lambda params, plugin: tg.SGD(params, lr=0.05, plugin=plugin),
    "momentum": lambda params, plugin: tg.SGD(params, lr=0.05, momentum=0.9, plugin=plugin),
    "adam": lambda params, plugin: tg.Adam(params, lr=0.01, plugin=plugin),
}


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
        self.task = 0

    def forward(self, x):
        return self.heads[self.task](self.body(x))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return TwoHeads().to(dtype)


def rows(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(10, 4, generator=g).to(dtype), torch.randint(0, 3, (10,), generator=g)


def anchors_of(model, count):
    """Taken from the model itself, at places it then leaves."""
    taken, home = [], {n: p.detach().clone() for n, p in model.named_parameters()}
    for k in range(count):
        for i, p in enumerate(model.parameters()):
            g = torch.Generator().manual_seed(100 * k + i)
            with torch.no_grad():
                p.add_(0.3 * torch.randn(p.shape, generator=g).to(p.dtype))
        model.task = k % 2
        taken.append(
            arch.anchor_from(model, f"t{k}", data=[rows(k, next(iter(home.values())).dtype)])
        )
    model.load_state_dict(home)
    return taken


def trained(kind, way, *, count=2, lam=30.0, steps=8, dtype=torch.float64, prepare=None):
    model = net(dtype)
    if prepare is not None:
        prepare(model)
    anchors = anchors_of(model, count)
    model.task = 1
    plugin = opt.consolidate(anchors, lam=lam) if way == "plugin" else None
    optimizer = OPTIMIZERS[kind](model.parameters(), plugin)

    @tg.training_step(optimizer=optimizer)
    def step(x, y):
        value = F.cross_entropy(model(x), y)
        return value + loss.ewc(model, anchors, lam=lam) if way == "loss" else value

    for s in range(steps):
        step(*rows(50 + s, dtype))
    return model


def gap(a, b):
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_consolidate_equals_ewc_in_the_loss(kind, count):
    """Head 0 gets no gradient from the task, so its .grad is None before the plugin comes."""
    inside, outside = (trained(kind, way, count=count) for way in ("plugin", "loss"))
    assert gap(inside, outside) < 1e-12
    naive = trained(kind, "none", count=count)
    assert gap(naive, outside) > 1e-3


@pytest.mark.parametrize("kind", ["sgd", "momentum"])
def test_consolidate_equals_ewc_in_float32_to_rounding(kind):
    inside, outside = (trained(kind, way, dtype=torch.float32) for way in ("plugin", "loss"))
    assert gap(inside, outside) < 1e-5


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_parameters_stay_frozen(kind):
    def freeze(model):
        model.body[0].weight.requires_grad_(False)
        model.heads[0].bias.requires_grad_(False)

    before = net()
    inside, outside = (trained(kind, way, prepare=freeze) for way in ("plugin", "loss"))
    assert gap(inside, outside) < 1e-12
    assert torch.equal(inside.body[0].weight, before.body[0].weight)


def test_a_parameter_frozen_after_the_optimizer_was_built_gets_no_gradient():
    model = net()
    (anchor,) = anchors_of(model, 1)
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=opt.consolidate(anchor, lam=5.0))
    kept = model.body[0].weight.detach().clone()
    model.body[0].weight.requires_grad_(False)
    optimizer.step()
    assert model.body[0].weight.grad is None
    assert torch.equal(model.body[0].weight, kept)


def test_without_any_task_gradient_it_pulls_by_hand():
    model = nn.Linear(1, 1, bias=False).double()
    theta = model.weight.item()
    anchor = Anchor(
        "a",
        {"weight": model.weight.detach() + 2.0},
        {"fisher": {"weight": torch.full((1, 1), 3.0, dtype=torch.float64)}},
    )
    anchor.bind(model)
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=opt.consolidate(anchor, lam=0.5))
    optimizer.step()  # gradient 0.5 * 3 * (-2) = -3
    assert model.weight.item() == pytest.approx(theta + 0.3, rel=1e-12)
    assert model.weight.grad.item() == pytest.approx(-3.0, rel=1e-12)


def test_the_reported_loss_is_the_tasks_alone():
    model = net()
    anchors, (x, y) = anchors_of(model, 2), rows(50)
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=opt.consolidate(anchors, lam=1e3))
    want = F.cross_entropy(model(x), y).item()
    assert tg.training_step(lambda: F.cross_entropy(model(x), y))().item() == want
    del optimizer


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_lambda_zero_and_no_anchors_change_nothing(kind):
    naive = trained(kind, "none")
    for plugin in (opt.consolidate([], lam=1.0), "zero"):
        model = net()
        anchors = anchors_of(model, 2)
        model.task = 1
        chosen = opt.consolidate(anchors, lam=0.0) if plugin == "zero" else plugin
        optimizer = OPTIMIZERS[kind](model.parameters(), chosen)
        for s in range(8):
            optimizer.zero_grad()
            x, y = rows(50 + s)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert gap(model, naive) == 0


def test_the_anchor_is_not_touched():
    model = net()
    (anchor,) = anchors_of(model, 1)
    kept = {n: (anchor.params[n].clone(), anchor.fisher[n].clone()) for n in anchor.params}
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=opt.consolidate(anchor, lam=5.0))
    for _ in range(3):
        optimizer.step()
    for n, (theta, fisher) in kept.items():
        assert torch.equal(anchor.params[n], theta)
        assert torch.equal(anchor.fisher[n], fisher)


def test_a_loaded_anchor_must_be_bound():
    model = net()
    (taken,) = anchors_of(model, 1)
    loaded = Anchor(taken.name, taken.params, taken.stats)
    message = r"opt\.consolidate: anchor 't0' holds 'body\.0\.weight'.*anchor\.bind\(model\)"
    with pytest.raises(AnchorError, match=message):
        tg.SGD(model.parameters(), lr=0.1, plugin=opt.consolidate(loaded, lam=1.0))
    loaded.bind(model)
    tg.SGD(model.parameters(), lr=0.1, plugin=opt.consolidate(loaded, lam=1.0))


def test_an_anchor_of_another_model_or_of_other_parameters_is_refused():
    model, other = net(), net()
    (anchor,) = anchors_of(other, 1)
    with pytest.raises(AnchorError, match="which is none of this optimizer's parameters"):
        tg.SGD(model.parameters(), lr=0.1, plugin=opt.consolidate(anchor, lam=1.0))
    with pytest.raises(AnchorError, match="which is none of this optimizer's parameters"):
        tg.SGD(other.body.parameters(), lr=0.1, plugin=opt.consolidate(anchor, lam=1.0))


def test_an_anchor_without_a_fisher_is_refused():
    model = net()
    bare = arch.anchor_from(model, "bare", fisher=None)
    with pytest.raises(AnchorError, match=r"opt\.consolidate needs a Fisher, but anchor 'bare'"):
        tg.SGD(model.parameters(), lr=0.1, plugin=opt.consolidate(bare, lam=1.0))


def test_bad_arguments_are_refused_at_once():
    model = net()
    (anchor,) = anchors_of(model, 1)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=r"opt\.consolidate needs a finite lam >= 0"):
            opt.consolidate(anchor, lam=bad)
    with pytest.raises(AnchorError, match=r"opt\.consolidate needs anchors made by .*got str"):
        opt.consolidate(["t0"], lam=1.0)

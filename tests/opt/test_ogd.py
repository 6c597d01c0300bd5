"""Orthogonal gradients: what past inputs give stays what it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import arch, opt
from tessera import graph as tg
from tessera.errors import AnchorError, InputError, UnknownNameError
from tessera.ops import kernels

OPTIMIZERS = {
    "sgd": lambda params, plugin: tg.SGD(params, lr=0.05, plugin=plugin),
    "momentum": lambda params, plugin: tg.SGD(params, lr=0.05, momentum=0.9, plugin=plugin),
    "adam": lambda params, plugin: tg.Adam(params, lr=0.01, plugin=plugin),
    "decay": lambda params, plugin: tg.Adam(params, lr=0.01, weight_decay=0.1, plugin=plugin),
}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 4))


def rows(seed, n=64, width=20):
    """Inputs in a five-dimensional part of the space, and labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=g) @ torch.randn(5, width, generator=g)
    return x, torch.randint(0, 4, (n,), generator=g)


def learn(model, optimizer, seed, steps=15):
    for s in range(steps):
        x, y = rows(seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x + 0.1 * s), y).backward()
        optimizer.step()


def close(model, seed, name="t"):
    return arch.anchor_from(model, name, fisher=None, data=[rows(seed)])


def bases(plugin):
    state = plugin.state_dict()
    return dict(zip(state["weight"], state["directions"], strict=True))


def protected_share(model, plugin, before):
    """The largest share of a layer's update [dW, db] that lies in its basis."""
    shares = []
    params = list(model.parameters())
    for i, m in bases(plugin).items():
        d = torch.cat([params[i] - before[i], (params[i + 1] - before[i + 1])[:, None]], 1).double()
        shares.append(((d.detach() @ m.double()).norm() / d.norm()).item())
    return max(shares)


@tg.no_grad()
def copies(model):
    return [p.clone() for p in model.parameters()]


class GradientsProjected(tg.Transform):
    """The tempting mistake: project what goes into the optimizer."""

    def __init__(self, true):
        self.true = true

    @tg.no_grad()
    def before_step(self):
        for i, m in bases(self.true).items():
            g = torch.cat([self.params[i].grad, self.params[i + 1].grad[:, None]], 1)
            g = g - (g @ m) @ m.T
            self.params[i].grad, self.params[i + 1].grad = g[:, :-1].clone(), g[:, -1].clone()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_update_has_no_part_in_the_protected_space(kind, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(kernels, "project", lambda *given: False)
    model, plugin = mlp(), opt.ogd()
    optimizer = OPTIMIZERS[kind](model.parameters(), plugin)
    learn(model, optimizer, 1)
    close(model, 1)
    for step in range(5):
        before = copies(model)
        learn(model, optimizer, 2 + step, steps=1)
        assert protected_share(model, plugin, before) < 1e-5


def test_projecting_the_gradient_instead_would_be_seen():
    model, plugin = mlp(), opt.ogd()
    first = tg.Adam(model.parameters(), lr=0.01, plugin=plugin)
    learn(model, first, 1)
    close(model, 1)
    wrong = tg.Adam(model.parameters(), lr=0.01, plugin=GradientsProjected(plugin))
    before = copies(model)
    learn(model, wrong, 2, steps=1)
    assert protected_share(model, plugin, before) > 0.05


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_linear_model_answers_old_inputs_as_before(kind, bias):
    torch.manual_seed(0)
    model = nn.Linear(20, 4, bias=bias)
    optimizer = OPTIMIZERS[kind](model.parameters(), opt.ogd(threshold=1.0))
    close(model, 1)
    old, new = model(rows(1)[0]), model(rows(2)[0])
    learn(model, optimizer, 2)
    assert torch.allclose(model(rows(1)[0]), old, atol=1e-5)
    assert (model(rows(2)[0]) - new).abs().max() > 0.1


def test_a_convolution_answers_old_images_as_before():
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 3, padding=1, stride=2, padding_mode="reflect")
    optimizer = tg.Adam(model.parameters(), lr=0.01, plugin=opt.ogd(threshold=1.0))
    x, other = torch.randn(1, 2, 6, 6), torch.randn(4, 2, 6, 6)
    arch.anchor_from(model, "t", fisher=None, data=[x])
    old, new = model(x), model(other)
    for _ in range(10):
        optimizer.zero_grad()
        model(other).square().sum().backward()
        optimizer.step()
    assert torch.allclose(model(x), old, atol=1e-5)
    assert (model(other) - new).abs().max() > 0.01


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_half_stays_frozen_and_the_answers_hold(frozen):
    torch.manual_seed(0)
    model = nn.Linear(20, 4)
    optimizer = tg.Adam(model.parameters(), lr=0.01, plugin=opt.ogd(threshold=1.0))
    close(model, 1)
    getattr(model, frozen).requires_grad_(False)
    held, old = getattr(model, frozen).clone(), model(rows(1)[0])
    learn(model, optimizer, 2)
    assert torch.equal(getattr(model, frozen), held)
    assert torch.allclose(model(rows(1)[0]), old, atol=1e-5)


def test_bases_are_orthonormal_and_grow_to_the_cap():
    model, plugin = mlp(), opt.ogd(rank=9, threshold=0.99)
    optimizer = tg.SGD(model.parameters(), lr=0.05, plugin=plugin)
    widths = []
    for task in range(4):
        learn(model, optimizer, task)
        close(model, task, f"t{task}")
        found = bases(plugin)
        assert set(found) == {0, 2}
        for m in found.values():
            assert (m.T @ m - torch.eye(m.shape[1])).abs().max() < 1e-5
        widths.append(found[0].shape[1])
    assert widths[0] < widths[1] <= 9
    assert widths[-1] == 9
    kept = sum(m.numel() for m in bases(plugin).values())
    assert kept <= 9 * (21 + 13)


def test_below_the_cap_a_second_task_keeps_the_first():
    model, plugin = mlp(), opt.ogd(threshold=0.99)
    optimizer = tg.SGD(model.parameters(), lr=0.05, plugin=plugin)
    close(model, 1, "t1")
    first = bases(plugin)[0]
    learn(model, optimizer, 2)
    close(model, 2, "t2")
    second = bases(plugin)[0]
    assert second.shape[1] > first.shape[1]
    assert torch.allclose(second @ (second.T @ first), first, atol=1e-5)


def test_the_threshold_is_the_share_of_energy_held():
    model, plugin = nn.Linear(3, 1, bias=False), opt.ogd(threshold=0.9)
    _ = optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=plugin)
    x = torch.diag(torch.tensor([3.0, 1.0, 0.5]))  # energies 9, 1 and 1/4: 0.878, 0.976, 1
    arch.anchor_from(model, "t", fisher=None, data=[x])
    assert bases(plugin)[0].abs().round(decimals=5).T.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert optimizer.param_groups


def test_before_the_first_anchor_it_is_a_no_op():
    with_it, without = mlp(), mlp()
    learn(with_it, tg.Adam(with_it.parameters(), plugin=opt.ogd()), 1)
    learn(without, tg.Adam(without.parameters()), 1)
    assert all(torch.equal(*p) for p in zip(copies(with_it), copies(without), strict=True))


@pytest.mark.parametrize("when", ["after", "before"])
def test_a_resumed_run_goes_on_to_the_same_bits(when):
    model, plugin = mlp(), opt.ogd(rank=7)
    optimizer = tg.SGD(model.parameters(), lr=0.05, plugin=plugin)
    learn(model, optimizer, 1)
    close(model, 1)
    twin, fresh = mlp(), opt.ogd(rank=7)
    twin.load_state_dict(model.state_dict())
    if when == "before":
        fresh.load_state_dict(plugin.state_dict())
    other = tg.SGD(twin.parameters(), lr=0.05, plugin=fresh)
    if when == "after":
        other.load_state_dict(optimizer.state_dict())
    for net, o in ((model, optimizer), (twin, other)):
        learn(net, o, 2)
        close(net, 2, "t2")
        learn(net, o, 3)
    assert all(torch.equal(*p) for p in zip(copies(model), copies(twin), strict=True))


def test_a_new_optimizer_over_the_same_weights_goes_on_protecting():
    model, plugin = nn.Linear(20, 4), opt.ogd(threshold=1.0)
    first = tg.SGD(model.parameters(), lr=0.05, plugin=plugin)
    close(model, 1)
    old = model(rows(1)[0])
    learn(model, tg.Adam(model.parameters(), lr=0.01, plugin=plugin), 2)
    assert torch.allclose(model(rows(1)[0]), old, atol=1e-5)
    assert first.param_groups
    with pytest.raises(AnchorError, match="make a new one for another model"):
        tg.SGD(mlp().parameters(), lr=0.05, plugin=plugin)


def test_data_may_be_a_generator_and_serve_the_fisher_too():
    model, plugin = mlp(), opt.ogd()
    _ = optimizer = tg.SGD(model.parameters(), lr=0.05, plugin=plugin)
    anchor = arch.anchor_from(model, "t", data=(rows(s) for s in range(3)))
    assert anchor.stats["samples"] == 192
    assert set(bases(plugin)) == {0, 2}
    assert optimizer.param_groups


def test_the_model_in_training_is_not_touched():
    model, plugin = nn.Sequential(nn.BatchNorm1d(20), nn.Dropout(), nn.Linear(20, 4)), opt.ogd()
    _ = optimizer = tg.SGD(model.parameters(), lr=0.05, plugin=plugin)
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    close(model, 1)
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not model[2]._forward_pre_hooks
    assert set(bases(plugin)) == {2}  # the norm has no rule and stays free
    assert optimizer.param_groups


def test_it_agrees_with_classic_ogd_on_a_tiny_model():
    """Farajtabar et al. 2020: gradients of the old outputs, QR, the step made orthogonal."""
    torch.manual_seed(0)
    model = nn.Linear(20, 4, bias=False).double()
    old, (x, y) = rows(1, n=3)[0].double(), rows(2)
    optimizer = tg.SGD(model.parameters(), lr=1.0, plugin=opt.ogd(threshold=1.0))
    arch.anchor_from(model, "t", fisher=None, data=[old])
    stored = [
        torch.autograd.grad(model(a)[c], model.weight)[0].flatten() for a in old for c in range(4)
    ]
    q = torch.linalg.qr(torch.stack(stored, 1))[0]
    F.cross_entropy(model(x.double()), y).backward()
    g, before = model.weight.grad.flatten().clone(), copies(model)[0].flatten()
    optimizer.step()
    classic = -(g - q @ (q.T @ g))
    assert torch.allclose(model.weight.detach().flatten() - before, classic, atol=1e-12)


def test_bad_arguments_are_named():
    with pytest.raises(UnknownNameError, match="no project 'gradients'; choose one of: orthogonal"):
        opt.ogd("gradients")
    with pytest.raises(InputError, match="rank >= 1, got 0"):
        opt.ogd(rank=0)
    for bad in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"threshold in \(0, 1\], got"):
            opt.ogd(threshold=bad)


def test_a_failed_anchor_leaves_the_bases_as_they_were():
    model, plugin = mlp(), opt.ogd()
    _ = optimizer = tg.SGD(model.parameters(), lr=0.05, plugin=plugin)
    close(model, 1)
    before = bases(plugin)
    with pytest.raises(AnchorError, match=r"opt.ogd learns what to protect .* data=batches"):
        arch.anchor_from(model, "a", fisher=None)
    with pytest.raises(AnchorError, match="data held no example"):
        arch.anchor_from(model, "a", fisher=None, data=[])
    with torch.no_grad():
        model[0].weight.fill_(10.0)
    model[1] = nn.Identity()
    with pytest.raises(AnchorError, match=r"the inputs of '2.weight' hold NaN or Inf"):
        arch.anchor_from(model, "a", fisher=None, data=[torch.full((2, 20), 3e38)])
    assert all(torch.equal(m, before[i]) for i, m in bases(plugin).items())
    assert optimizer.param_groups


def test_a_state_of_another_model_and_a_half_tied_pair_are_refused():
    model, plugin = mlp(), opt.ogd()
    _ = optimizer = tg.SGD(model.parameters(), lr=0.05, plugin=plugin)
    close(model, 1)
    other = tg.SGD(nn.Linear(3, 2).parameters(), lr=0.05, plugin=opt.ogd())
    with pytest.raises(InputError, match="the saved state is of parameters of other shapes"):
        other.load_state_dict({**other.state_dict(), "plugins": [plugin.state_dict()]})
    pair = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    pair[1].weight = pair[0].weight
    tied = tg.SGD(pair.parameters(), lr=0.05, plugin=opt.ogd())
    with pytest.raises(AnchorError, match=r"share the weight '0.weight' and not the bias"):
        close(pair, 1)
    assert optimizer.param_groups
    assert tied.param_groups

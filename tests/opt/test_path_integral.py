"""SI's importance against the sum it is, written out step by step."""

import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import arch, loss, opt
from tessera import graph as tg
from tessera.arch import Anchor
from tessera.errors import AnchorError, InputError


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def rows(seed, n=12):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g).double(), torch.randint(0, 3, (n,), generator=g)


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


class Ledger:
    """W and omega by their definition, from gradients taken by `torch.autograd.grad`."""

    def __init__(self, model):
        self.model = model
        self.w = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        self.omega = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        self.start = snapshot(model)

    def around(self, task_loss, step):
        named = dict(self.model.named_parameters())
        grads = dict(
            zip(named, torch.autograd.grad(task_loss(), list(named.values())), strict=True)
        )
        before = snapshot(self.model)
        step()
        for n, p in named.items():
            self.w[n] -= grads[n] * (p.detach() - before[n])

    def close_task(self):
        for n, p in self.model.named_parameters():
            gap = p.detach() - self.start[n]
            self.omega[n] += (self.w[n] / (gap.square() + 0.1)).clamp(min=0)
            self.w[n].zero_()
        self.start = snapshot(self.model)
        return self.omega


def assert_same(anchor, omega):
    got = anchor.stats["path_integral"]
    assert set(got) == set(omega)
    for n in omega:
        torch.testing.assert_close(got[n], omega[n], rtol=1e-12, atol=1e-18)


OPTIMIZERS = {
    "sgd": lambda params, plugin: tg.SGD(params, lr=0.1, plugin=plugin),
    "momentum": lambda params, plugin: tg.SGD(params, lr=0.1, momentum=0.9, plugin=plugin),
    "decay": lambda params, plugin: tg.SGD(params, lr=0.1, weight_decay=0.1, plugin=plugin),
    "adam": lambda params, plugin: tg.Adam(params, lr=0.01, plugin=plugin),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_importance_is_the_hand_computation_over_three_tasks(kind):
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters(), opt.path_integral())
    ledger = Ledger(model)

    @tg.training_step
    def step(x, y):
        return F.cross_entropy(model(x), y)

    for task in range(3):
        for i in range(6):
            x, y = rows(10 * task + i)
            ledger.around(lambda: F.cross_entropy(model(x), y), lambda: step(x, y))
        anchor = arch.anchor_from(model, f"t{task}", fisher=None)
        assert_same(anchor, ledger.close_task())
    assert all(w.any() for w in anchor.stats["path_integral"].values())
    del optimizer


def test_one_step_of_plain_descent_by_hand():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = tg.SGD(model.parameters(), lr=0.5, plugin=opt.path_integral())

    @tg.training_step
    def step():
        return (model.weight - 3).square().sum()  # gradient 2 (1 - 3) = -4, step +2

    step()
    anchor = arch.anchor_from(model, "a", fisher=None)
    # W = 4 * 2 = 8, Delta = 2: 8 / (4 + 0.1)
    assert anchor.stats["path_integral"]["weight"].item() == pytest.approx(8 / 4.1, rel=1e-6)
    del optimizer


def test_damping_is_the_papers_xi():
    model = nn.Linear(1, 1, bias=False)
    optimizer = tg.SGD(model.parameters(), lr=0.5, plugin=opt.path_integral(damping=2.0))
    model.weight.grad = torch.full((1, 1), -4.0)
    optimizer.step()
    anchor = arch.anchor_from(model, "a", fisher=None)
    assert anchor.stats["path_integral"]["weight"].item() == pytest.approx(8 / 6, rel=1e-6)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match=r"opt\.path_integral needs damping > 0, got"):
            opt.path_integral(damping=bad)


def test_plain_descent_on_one_batch_gives_w_close_to_the_fall_of_the_loss():
    """W is the loss's fall, weight by weight: for small steps their sum is the whole of it."""
    model, (x, y) = net(), rows(0)
    plugin = opt.path_integral()
    optimizer = tg.SGD(model.parameters(), lr=1e-3, plugin=plugin)

    @tg.training_step
    def step():
        return F.cross_entropy(model(x), y)

    values = [step().item() for _ in range(51)]
    fall = values[0] - F.cross_entropy(model(x), y).item()
    total = sum(w.sum().item() for w in plugin.state_dict()["w"])
    assert total == pytest.approx(fall, rel=2e-3)
    del optimizer


# --- the task's gradient only -------------------------------------------------------------------


def penalties(model, anchor, si_anchor):
    return {
        "si": lambda: loss.si(model, si_anchor, c=5.0),
        "ewc": lambda: loss.ewc(model, anchor, lam=20.0),
        "l2sp": lambda: loss.l2sp(model, anchor, lam=3.0),
        "all": lambda: (
            loss.si(model, si_anchor, c=5.0)
            + 0.5 * loss.ewc(model, [anchor, anchor], lam=20.0)
            + loss.l2sp(model, anchor, lam=3.0)
        ),
    }


@pytest.mark.parametrize("kind", ["si", "ewc", "l2sp", "all"])
def test_a_penalty_in_the_loss_is_not_on_the_path(kind):
    model = net()
    far = {n: p + 1.0 for n, p in snapshot(model).items()}
    ones = {n: torch.ones_like(p) for n, p in far.items()}
    anchor = Anchor("a", far, {"fisher": ones, "path_integral": ones})
    penalty = penalties(model, anchor, anchor)[kind]
    optimizer = tg.SGD(model.parameters(), lr=0.01, plugin=opt.path_integral())
    ledger = Ledger(model)

    @tg.training_step
    def step(x, y):
        return F.cross_entropy(model(x), y) + penalty()

    for i in range(5):
        x, y = rows(i)
        ledger.around(lambda: F.cross_entropy(model(x), y), lambda: step(x, y))
    assert_same(arch.anchor_from(model, "b", fisher=None), ledger.close_task())
    # The mutant that takes the whole gradient would say something else.
    x, y = rows(9)
    whole = torch.autograd.grad(F.cross_entropy(model(x), y) + penalty(), model[0].weight)[0]
    task = torch.autograd.grad(F.cross_entropy(model(x), y), model[0].weight)[0]
    assert (whole - task).norm() > task.norm()
    del optimizer


@pytest.mark.parametrize("loop", ["decorated", "plain"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_consolidate_beside_it_is_not_on_the_path(order, loop):
    model = net()
    anchor = arch.anchor_from(model, "a", data=[rows(99)[0]])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    both = [opt.consolidate(anchor, lam=50.0), opt.path_integral()]
    if order == "after":
        both.reverse()
    optimizer = tg.SGD(model.parameters(), lr=0.01, plugin=both)
    ledger = Ledger(model)

    def value(x, y):
        return F.cross_entropy(model(x), y)

    def plain(x, y):
        optimizer.zero_grad()
        value(x, y).backward()
        optimizer.step()

    step = tg.training_step(value) if loop == "decorated" else plain
    for i in range(5):
        x, y = rows(i)
        ledger.around(lambda: F.cross_entropy(model(x), y), lambda: step(x, y))
    assert_same(arch.anchor_from(model, "b", fisher=None), ledger.close_task())


def test_looking_at_a_penaltys_gradient_is_not_on_the_path():
    """A step that measures the penalty's gradient before it returns its loss."""
    model = net()
    ones = {n: torch.ones_like(p) for n, p in snapshot(model).items()}
    anchor = Anchor("a", snapshot(model), {"fisher": ones})
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=opt.path_integral())
    ledger, norms = Ledger(model), []

    @tg.training_step
    def step(x, y):
        penalty = loss.ewc(model, anchor, lam=2.0)
        grads = torch.autograd.grad(penalty, list(model.parameters()), retain_graph=True)
        norms.append(sum(g.norm() for g in grads))
        return F.cross_entropy(model(x), y) + penalty

    for i in range(3):
        x, y = rows(i)
        ledger.around(lambda: F.cross_entropy(model(x), y), lambda: step(x, y))
    assert norms[-1] > 0
    assert_same(arch.anchor_from(model, "b", fisher=None), ledger.close_task())
    del optimizer


def test_distillation_is_part_of_the_task():
    model = net()
    teacher = arch.anchor_from(net(1), "teacher", fisher=None)
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=opt.path_integral())
    ledger, (x, y) = Ledger(model), rows(0)

    def value():
        return F.cross_entropy(model(x), y) + loss.lwf(model(x), teacher.model(x))

    ledger.around(value, tg.training_step(value))
    assert_same(arch.anchor_from(model, "b", fisher=None), ledger.close_task())
    del optimizer


def test_gradients_gathered_over_two_backwards_count_once_each():
    model = net()
    far = {n: p + 1.0 for n, p in snapshot(model).items()}
    anchor = Anchor("a", far, {"fisher": {n: torch.ones_like(p) for n, p in far.items()}})
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=opt.path_integral())
    ledger = Ledger(model)
    parts = [rows(1), rows(2)]

    def task():
        return sum(F.cross_entropy(model(x), y) for x, y in parts)

    def step():
        optimizer.zero_grad()
        for x, y in parts:
            (F.cross_entropy(model(x), y) + loss.ewc(model, anchor, lam=2.0)).backward()
        optimizer.step()

    for _ in range(3):
        ledger.around(task, step)
    assert_same(arch.anchor_from(model, "b", fisher=None), ledger.close_task())


# --- what it is, and how it goes on ---------------------------------------------------------------


def test_the_importance_is_never_negative_and_clamped_task_by_task():
    """A weight that climbed against its gradient (momentum) adds nothing, and takes nothing."""
    model, plugin = nn.Linear(1, 1, bias=False), opt.path_integral()
    optimizer = tg.SGD(model.parameters(), lr=1.0, plugin=plugin)

    def move(gradient, way):
        model.weight.grad = torch.full((1, 1), gradient)
        plugin.before_step()
        with torch.no_grad():
            model.weight.add_(way)
        plugin.after_step()

    move(1.0, -1.0)  # W = 1
    first = arch.anchor_from(model, "a", fisher=None).stats["path_integral"]["weight"].item()
    assert first == pytest.approx(1 / 1.1, rel=1e-6)
    move(1.0, 1.0)  # W = -1: clamped, not subtracted
    second = arch.anchor_from(model, "b", fisher=None).stats["path_integral"]["weight"].item()
    assert second == first
    move(-2.0, 1.0)  # W = 2
    third = arch.anchor_from(model, "c", fisher=None).stats["path_integral"]["weight"].item()
    assert third == pytest.approx(3 / 1.1, rel=1e-6)
    del optimizer


def test_an_anchor_without_steps_in_between_adds_nothing():
    model = net()
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=opt.path_integral())
    step = tg.training_step(lambda: F.cross_entropy(model(rows(0)[0]), rows(0)[1]))
    step()
    a = arch.anchor_from(model, "a", fisher=None).stats["path_integral"]
    b = arch.anchor_from(model, "b", data=[rows(0)[0]]).stats["path_integral"]
    assert all(torch.equal(a[n], b[n]) for n in a)
    del optimizer


def test_the_stored_importance_does_not_grow_with_the_next_task():
    model = net()
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=opt.path_integral())
    step = tg.training_step(lambda: F.cross_entropy(model(rows(0)[0]), rows(0)[1]))
    step()
    anchor = arch.anchor_from(model, "a", fisher=None)
    kept = {n: w.clone() for n, w in anchor.stats["path_integral"].items()}
    step()
    arch.anchor_from(model, "b", fisher=None)
    assert all(torch.equal(kept[n], w) for n, w in anchor.stats["path_integral"].items())
    del optimizer


def test_two_optimizers_over_two_halves_both_hand_over_their_part():
    model, (x, y) = net(), rows(0)
    body = tg.Adam(model[0].parameters(), lr=0.01, plugin=opt.path_integral())
    head = tg.SGD(model[2].parameters(), lr=0.1, plugin=opt.path_integral())
    ledger = Ledger(model)
    step = tg.training_step(lambda: F.cross_entropy(model(x), y))
    for _ in range(3):
        ledger.around(lambda: F.cross_entropy(model(x), y), step)
    assert_same(arch.anchor_from(model, "a", fisher=None), ledger.close_task())
    del body, head


def test_a_parameter_without_a_gradient_has_no_path():
    model, (x, y) = net(), rows(0)
    model[0].weight.requires_grad_(False)
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=opt.path_integral())
    tg.training_step(lambda: F.cross_entropy(model(x), y))()
    omega = arch.anchor_from(model, "a", fisher=None).stats["path_integral"]
    assert not omega["0.weight"].any()
    assert omega["0.bias"].any()
    del optimizer


def train(model, optimizer, seeds):
    @tg.training_step(optimizer=optimizer)
    def step(x, y):
        return F.cross_entropy(model(x), y)

    for s in seeds:
        step(*rows(s))


def test_a_new_optimizer_for_the_next_task_goes_on_with_the_plugin():
    model, plugin = net(), opt.path_integral()
    ledger = Ledger(model)
    for task in range(3):
        optimizer = tg.SGD(model.parameters(), lr=0.1 / (task + 1), plugin=plugin)
        for i in range(4):
            x, y = rows(10 * task + i)
            ledger.around(
                lambda: F.cross_entropy(model(x), y),
                lambda o=optimizer, s=10 * task + i: train(model, o, [s]),
            )
        anchor = arch.anchor_from(model, f"t{task}", fisher=None)
        assert_same(anchor, ledger.close_task())
        del optimizer
        gc.collect()


def test_a_new_optimizer_still_leaves_the_penalties_out():
    """The old optimizer and its watch are gone; the new one's watch must be there."""
    model, plugin = net(), opt.path_integral()
    far = {n: p + 1.0 for n, p in snapshot(model).items()}
    anchor = Anchor("a", far, {"fisher": {n: torch.ones_like(p) for n, p in far.items()}})
    ledger = Ledger(model)
    for i in range(3):
        optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=plugin)
        gc.collect()
        x, y = rows(i)
        step = tg.training_step(
            lambda: F.cross_entropy(model(x), y) + loss.ewc(model, anchor, lam=1.0)
        )
        ledger.around(lambda: F.cross_entropy(model(x), y), step)
    assert_same(arch.anchor_from(model, "b", fisher=None), ledger.close_task())
    del optimizer


def test_the_path_survives_a_round_trip_of_the_optimizers_state():
    whole = net()
    a = tg.Adam(whole.parameters(), lr=0.01, plugin=opt.path_integral())
    train(whole, a, range(3))
    arch.anchor_from(whole, "t0", fisher=None)
    train(whole, a, range(3, 6))

    resumed = net(seed=5)
    b = tg.Adam(resumed.parameters(), lr=0.01, plugin=opt.path_integral())
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for model, optimizer in ((whole, a), (resumed, b)):
        train(model, optimizer, range(6, 9))
    one, two = (arch.anchor_from(m, "t1", fisher=None) for m in (whole, resumed))
    for n in one.params:
        assert torch.equal(one.params[n], two.params[n])
        assert torch.equal(one.stats["path_integral"][n], two.stats["path_integral"][n])


def test_a_saved_state_does_not_follow_and_is_not_followed():
    model, plugin = net(), opt.path_integral()
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=plugin)
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    kept = [t.clone() for t in state["plugins"][0]["w"]]
    train(model, optimizer, range(2))
    assert all(map(torch.equal, kept, state["plugins"][0]["w"]))


def test_a_plugin_of_one_model_is_refused_by_another():
    plugin = opt.path_integral()
    kept = net()
    first = tg.SGD(kept.parameters(), lr=0.1, plugin=plugin)
    with pytest.raises(AnchorError, match="already integrates along the path of other parameters"):
        tg.SGD(net(1).parameters(), lr=0.1, plugin=plugin)
    del first


def test_a_state_of_other_shapes_is_refused_and_changes_nothing():
    model = net()
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=opt.path_integral())
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["plugins"])
    state["plugins"][0]["omega"][1] = torch.zeros(2)
    with pytest.raises(InputError, match="saved state is of parameters of other shapes"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()["plugins"]
    for key in ("w", "omega", "start"):
        assert all(map(torch.equal, before[0][key], after[0][key]))


def test_si_remembers_and_naive_training_forgets():
    """End to end: the penalty with the real importance holds the important weights."""
    drift = {}
    for c in (0.0, 5.0):
        model = net()
        optimizer = tg.SGD(model.parameters(), lr=0.05, plugin=opt.path_integral())
        train(model, optimizer, [0] * 20)
        anchor = arch.anchor_from(model, "t0", fisher=None)

        @tg.training_step
        def step(x, y):
            return F.cross_entropy(model(x), y) + loss.si(model, anchor, c=c)

        for _ in range(20):
            step(*rows(7))
        omega = anchor.stats["path_integral"]
        drift[c] = sum(
            (omega[n] * (p - anchor.params[n]).square()).sum().item()
            for n, p in model.named_parameters()
        )
        del optimizer
    assert drift[5.0] < 0.2 * drift[0.0]

"""The training step: what it clears, what steps, and what it refuses."""

import copy
import functools
import gc
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import graph as tg
from tessera.errors import InputError, NonFiniteError
from tessera.graph.ownership import owner, owners


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def rows(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(10, 4, generator=g), torch.randint(0, 3, (10,), generator=g)


def by_hand(model, optimizers, seeds):
    for s in seeds:
        x, y = rows(s)
        for o in optimizers:
            o.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for o in optimizers:
            o.step()


def same(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


# --- the bare form ------------------------------------------------------------------------------


def test_the_bare_form_finds_the_owner_and_equals_the_loop_by_hand():
    model, twin = net(), net()
    optimizer = tg.SGD(model.parameters(), lr=0.1, momentum=0.9)

    @tg.training_step
    def step(x, y):
        return F.cross_entropy(model(x), y)

    for s in range(5):
        step(*rows(s))
    by_hand(twin, [torch.optim.SGD(twin.parameters(), 0.1, 0.9)], range(5))
    assert same(model, twin)
    del optimizer


def test_two_optimizers_over_two_halves_both_step():
    model, twin = net(), net()
    body = tg.Adam(model[0].parameters(), lr=0.01)
    head = tg.SGD(model[2].parameters(), lr=0.1)

    @tg.training_step
    def step(x, y):
        return F.cross_entropy(model(x), y)

    for s in range(4):
        step(*rows(s))
    halves = [
        torch.optim.Adam(twin[0].parameters(), 0.01, fused=True),
        torch.optim.SGD(twin[2].parameters(), 0.1),
    ]
    by_hand(twin, halves, range(4))
    assert same(model, twin)
    del body, head


def test_only_the_owners_of_what_the_loss_reaches_step():
    model = net()
    body = tg.SGD(model[0].parameters(), lr=0.1, weight_decay=0.1)
    head = tg.SGD(model[2].parameters(), lr=0.1)
    before = copy.deepcopy(model)
    model[0].weight.grad = torch.ones(6, 4)

    @tg.training_step
    def step(x, y):
        with tg.no_grad():
            h = model[1](model[0](x))
        return F.cross_entropy(model[2](h), y)

    step(*rows(0))
    assert same(model[0], before[0])
    assert not same(model[2], before[2])
    assert torch.equal(model[0].weight.grad, torch.ones(6, 4))  # not its to clear
    del body, head


def test_without_an_owner_the_gradients_are_left():
    model = net()
    before = copy.deepcopy(model)
    x, y = rows(0)

    @tg.training_step
    def step():
        return F.cross_entropy(model(x), y)

    want = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for _ in range(2):  # cleared, not gathered
        step()
        assert all(map(torch.equal, (p.grad for p in model.parameters()), want))
    assert same(model, before)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    assert not same(model, before)


def test_a_plain_torch_optimizer_owns_nothing():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert owners(model.parameters()) == []
    assert optimizer is not None


def test_ownership_is_weak():
    model = net()
    optimizer = tg.SGD(model.parameters(), lr=0.1)
    assert owner(model[0].weight) is optimizer
    del optimizer
    gc.collect()
    assert owner(model[0].weight) is None
    before = copy.deepcopy(model)
    tg.training_step(lambda: F.cross_entropy(model(rows(0)[0]), rows(0)[1]))()
    assert same(model, before)
    assert model[0].weight.grad is not None


def test_the_newest_owner_counts():
    model, twin = net(), net()
    old = tg.SGD(model.parameters(), lr=100.0)
    new = tg.SGD(model.parameters(), lr=0.1)
    tg.training_step(lambda: F.cross_entropy(model(rows(0)[0]), rows(0)[1]))()
    by_hand(twin, [torch.optim.SGD(twin.parameters(), 0.1)], [0])
    assert same(model, twin)
    assert owners(model.parameters()) == [new]
    del old


def test_when_the_newest_owner_is_gone_the_one_before_counts_again():
    """Else a look with a short-lived optimizer would silently end all learning."""
    model = net()
    oldest = tg.SGD(model.parameters(), lr=100.0)
    old = tg.SGD(model.parameters(), lr=0.1)
    new = tg.SGD(model[2].parameters(), lr=0.1)
    del new
    gc.collect()
    assert owners(model[2].parameters()) == [old]
    before = copy.deepcopy(model)
    x, y = rows(0)
    h = model[1](model[0](x)).detach()
    tg.training_step(lambda: F.cross_entropy(model[2](h), y))()
    assert not same(model[2], before[2])
    del oldest


def test_a_parameter_added_to_an_optimizer_is_owned_by_it():
    model = net()
    optimizer = tg.SGD(model[0].parameters(), lr=0.1)
    optimizer.add_param_group({"params": model[2].parameters()})
    assert owners(model[2].parameters()) == [optimizer]
    before = copy.deepcopy(model)
    x, y = rows(0)
    h = model[1](model[0](x)).detach()
    tg.training_step(lambda: F.cross_entropy(model[2](h), y))()
    assert not same(model[2], before[2])


# --- the optimizer= form ------------------------------------------------------------------------


def test_an_explicit_torch_optimizer_steps_in_place_of_the_owner():
    model, twin = net(), net()
    owning = tg.SGD(model.parameters(), lr=100.0)
    optimizer = torch.optim.RMSprop(model.parameters(), 0.01)

    @tg.training_step(optimizer=optimizer)
    def step(x, y):
        return F.cross_entropy(model(x), y)

    for s in range(3):
        step(*rows(s))
    by_hand(twin, [torch.optim.RMSprop(twin.parameters(), 0.01)], range(3))
    assert same(model, twin)
    del owning


def test_gradients_outside_the_optimizer_are_cleared_too():
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)

    @tg.training_step(optimizer=optimizer)
    def step(x, y):
        return F.cross_entropy(model(x), y)

    x, y = rows(0)
    step(x, y)
    want = torch.autograd.grad(F.cross_entropy(model(x), y), model[2].weight)[0]
    step(x, y)
    assert torch.equal(model[2].weight.grad, want)


# --- what a call is -------------------------------------------------------------------------------


def test_it_returns_the_detached_loss_before_the_step():
    model = net()
    optimizer = tg.SGD(model.parameters(), lr=0.1)
    x, y = rows(0)
    want = F.cross_entropy(model(x), y)
    got = tg.training_step(lambda: F.cross_entropy(model(x), y))()
    assert torch.equal(got, want.detach())
    assert not got.requires_grad
    assert got.shape == ()
    del optimizer


def test_the_decorated_function_keeps_its_name_its_doc_and_its_arguments():
    @tg.training_step
    def learn(x, y, *, weight=1.0):
        """What it does."""
        return weight * (w * (x - y)).square().sum()

    w = torch.ones(1, requires_grad=True)
    assert learn.__name__ == "learn"
    assert learn.__doc__ == "What it does."
    assert list(inspect.signature(learn).parameters) == ["x", "y", "weight"]
    assert learn(torch.tensor([3.0]), y=torch.tensor([1.0]), weight=0.5).item() == 2.0
    assert w.grad.item() == 4.0


def test_it_decorates_methods_lambdas_partials_and_callable_objects():
    w = torch.ones(1, requires_grad=True)

    class Learner:
        @tg.training_step
        def step(self, x):
            return (w * x).sum()

        def __call__(self, x):
            return (2 * w * x).sum()

    one = torch.ones(1)
    assert Learner().step(one).item() == 1.0
    assert tg.training_step(lambda x: (w * x).sum())(one).item() == 1.0
    assert tg.training_step(functools.partial(lambda k, x: (k * w * x).sum(), 3))(one).item() == 3
    assert tg.training_step(Learner())(one).item() == 2.0


def test_it_learns_inside_no_grad():
    w = torch.ones(1, requires_grad=True)
    optimizer = tg.SGD([w], lr=0.5)
    with tg.no_grad():
        tg.training_step(lambda: w.square().sum())()
        assert not torch.is_grad_enabled()
    assert w.item() == 0.0
    del optimizer


def test_a_step_inside_a_step_is_a_step_of_its_own():
    w, v = (torch.ones(1, requires_grad=True) for _ in range(2))
    outer, inner = tg.SGD([w], lr=0.25), tg.SGD([v], lr=0.25)

    @tg.training_step
    def critic():
        return v.square().sum()

    @tg.training_step
    def actor():
        critic()
        return (w * v.detach()).square().sum()

    assert actor().item() == 0.25  # with the critic's new weight, 0.5
    assert v.item() == 0.5
    assert w.item() == 1 - 0.25 * 2 * 0.25
    del outer, inner


def test_a_tensor_used_many_times_is_one_leaf():
    w = torch.ones(1, requires_grad=True)
    optimizer = tg.SGD([w], lr=0.1)
    value = w
    for _ in range(40):
        value = value + value * 0  # 2^40 paths through 80 nodes
    tg.training_step(lambda: value.sum())()
    assert w.item() == pytest.approx(0.9)
    del optimizer


def test_a_deep_graph_is_no_recursion():
    w = torch.ones(1, requires_grad=True)

    def deep():
        value = w
        for _ in range(20_000):
            value = value + 0.0
        return value.sum()

    tg.training_step(deep)()
    assert w.grad.item() == 1.0


def test_a_bare_parameter_can_be_the_loss():
    w = torch.tensor(2.0, requires_grad=True)
    optimizer = tg.SGD([w], lr=0.5)
    assert tg.training_step(lambda: w)().item() == 2.0
    assert w.item() == 1.5
    del optimizer


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", ["bare", "explicit"])
def test_a_loss_that_is_not_finite_changes_nothing(bad, form):
    model = net()
    optimizer = tg.Adam(model.parameters(), lr=0.1)
    factor = [1.0]

    def fit(x, y):
        return F.cross_entropy(model(x), y) * factor[0]

    step = tg.training_step(fit) if form == "bare" else tg.training_step(optimizer=optimizer)(fit)
    step(*rows(0))
    weights, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    factor[0] = bad
    with pytest.raises(NonFiniteError, match=r"the loss of fit is (nan|-?inf); no weight was") as e:
        step(*rows(1))
    assert isinstance(e.value, FloatingPointError)
    assert same(model, weights)
    for p, (tensor, value) in zip(model.parameters(), grads, strict=True):
        assert p.grad is tensor
        assert torch.equal(tensor, value)
    for k, s in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, state["state"][k][n]) for n, v in s.items())
    factor[0] = 1.0
    step(*rows(1))  # and it goes on
    assert not same(model, weights)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (lambda w: None, "NoneType"),
        (lambda w: 1.0, "float"),
        (lambda w: (w.sum(), 1), "tuple"),
        (lambda w: w * 2, r"shape \(3,\)"),
        (lambda w: w.sum().reshape(1), r"shape \(1,\)"),
    ],
)
def test_what_is_no_loss_is_named(value, got):
    w = torch.ones(3, requires_grad=True)

    def compute():
        return value(w)

    with pytest.raises(InputError, match=rf"compute must return a 0-d loss, got {got}"):
        tg.training_step(compute)()
    assert w.grad is None


def test_a_loss_that_reaches_no_parameter_is_refused():
    w = torch.ones(3, requires_grad=True)
    for value in (lambda: w.detach().sum(), lambda: torch.tensor(1.0)):
        with pytest.raises(InputError, match=r"depends on no parameter .*tg\.no_grad\(\)"):
            tg.training_step(value)()


def test_an_error_inside_the_function_passes_through_and_changes_nothing():
    model = net()
    optimizer = tg.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model)
    model[0].weight.grad = torch.ones(6, 4)

    @tg.training_step
    def step():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        step()
    assert same(model, before)
    assert torch.equal(model[0].weight.grad, torch.ones(6, 4))
    del optimizer


def test_no_grad_records_nothing_as_context_and_as_decorator():
    w = torch.ones(1, requires_grad=True)
    with tg.no_grad():
        assert not (w * 2).requires_grad
    assert not tg.no_grad()(lambda: w * 2)().requires_grad
    assert (w * 2).requires_grad

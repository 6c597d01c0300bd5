"""`tg.Adam` and `tg.SGD` against PyTorch's own, and the life of a plugin."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import arch, opt
from tessera import graph as tg
from tessera.errors import InputError, TesseraError
from tessera.graph.optim import InnerAdam


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def rows(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(10, 4, generator=g).to(dtype), torch.randint(0, 3, (10,), generator=g)


def train(model, optimizer, seeds, dtype=torch.float32):
    for s in seeds:
        x, y = rows(s, dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def same(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


class Recorder(tg.Transform):
    """Writes down when it is called; its memory is how often."""

    def __init__(self, log, name="r"):
        self.log, self.name, self.count = log, name, 0

    def before_step(self):
        self.log.append((self.name, "before", [p.detach().clone() for p in self.params]))

    def after_step(self):
        self.count += 1
        self.log.append((self.name, "after", [p.detach().clone() for p in self.params]))

    def on_anchor(self, names):
        return {f"{self.name}_steps": self.count, "named": dict.fromkeys(names.values(), self.name)}

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


# --- against PyTorch ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"betas": (0.8, 0.95), "eps": 1e-4}, {"weight_decay": 0.1}, {"lr": 0.05}],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_equals_pytorchs_plain_loop(options, dtype):
    ours, theirs = net(dtype=dtype), net(dtype=dtype)
    train(ours, tg.Adam(ours.parameters(), **options), range(20), dtype)
    plain = torch.optim.Adam(theirs.parameters(), **options, foreach=False, fused=False)
    train(theirs, plain, range(20), dtype)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    start = net(dtype=dtype)
    assert (ours[0].weight - start[0].weight).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}])
def test_sgd_equals_pytorchs_bit_for_bit(options):
    ours, theirs = net(), net()
    train(ours, tg.SGD(ours.parameters(), lr=0.1, **options), range(20))
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, **options), range(20))
    assert same(ours, theirs)


def forms(model):
    return {
        "parameters": lambda: model.parameters(),
        "list": lambda: list(model.parameters()),
        "named": lambda: model.named_parameters(),
        "groups of lists": lambda: [{"params": list(m.parameters())} for m in (model[0], model[2])],
        "groups of generators": lambda: [{"params": m.parameters()} for m in (model[0], model[2])],
        "groups of named": lambda: [
            {"params": m.named_parameters(prefix=str(i))} for i, m in ((0, model[0]), (2, model[2]))
        ],
        "groups of one": lambda: [{"params": p} for p in model.parameters()],
        "generator of groups": lambda: ({"params": m.parameters()} for m in (model[0], model[2])),
    }


@pytest.mark.parametrize("form", forms(None))
@pytest.mark.parametrize("build", [tg.Adam, tg.SGD], ids=["adam", "sgd"])
def test_parameters_come_in_every_form_pytorch_takes(build, form):
    model, twin = net(), net()
    optimizer = build(forms(model)[form](), lr=0.1)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4
    train(model, optimizer, range(2))
    train(twin, build(twin.parameters(), lr=0.1), range(2))
    assert same(model, twin)


def test_groups_keep_their_own_settings():
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    before = copy.deepcopy(model)
    train(model, tg.Adam(groups, lr=0.1), range(2))
    assert same(model[0], before[0])
    assert not same(model[2], before[2])


def test_a_callers_groups_are_left_alone():
    model = net()
    groups = [{"params": list(model.parameters())}]
    tg.Adam(groups, lr=0.1)
    assert set(groups[0]) == {"params"}


def test_a_learning_rate_schedule_works_and_does_not_warn():
    model = net()
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=Recorder([]))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    @tg.training_step
    def step(x, y):
        return F.cross_entropy(model(x), y)

    rates = []
    for s in range(3):
        step(*rows(s))
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.05, 0.025, 0.0125]


# --- the specification of an inner loop ---------------------------------------------------------


def test_an_inner_sgd_is_a_value():
    for spec, steps in ((tg.SGD(1e-2), None), (tg.SGD(net(), lr=1e-2, steps=5), 5)):
        assert isinstance(spec, tg.InnerSGD)
        assert (spec.lr, spec.steps) == (1e-2, steps)
        with pytest.raises(AttributeError):
            spec.lr = 1.0
    assert tg.SGD(1).lr == 1.0
    assert tg.SGD(0.1, steps=3).steps == 3


def test_an_inner_step_is_differentiable_in_both_arguments():
    w, g = (torch.tensor([2.0, -1.0], requires_grad=True) for _ in range(2))
    out, slots = tg.SGD(0.5).update({"w": w}, {"w": g}, {})
    assert slots == {}
    assert torch.equal(out["w"], w - 0.5 * g)
    a, b = torch.autograd.grad(out["w"].sum(), [w, g])
    assert a.tolist() == [1.0, 1.0]
    assert b.tolist() == [-0.5, -0.5]


RULES = {
    "sgd": (tg.SGD(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        tg.SGD(0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ),
    "adam": (
        tg.Adam(0.1, betas=(0.8, 0.95), eps=1e-3),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-3),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_an_inner_rule_steps_as_the_optimizer_does(name):
    rule, build = RULES[name]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, dtype=torch.float64, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    optimizer, ours, slots = build([theirs]), {"w": start}, {}
    for step in range(5):
        grad = torch.randn(4, dtype=torch.float64, generator=generator)
        theirs.grad = grad
        optimizer.step()
        ours, slots = rule.update(ours, {"w": grad}, slots, step)
        torch.testing.assert_close(ours["w"], theirs.detach(), rtol=1e-13, atol=0)
    assert set(slots) == {"sgd": set(), "momentum": {"momentum"}, "adam": {"mean", "square"}}[name]


@pytest.mark.parametrize("name", RULES)
def test_an_inner_rule_is_differentiable_through_its_memory(name):
    rule, _ = RULES[name]

    def three(w, a, b, c):
        params, slots = {"w": w}, {}
        for step, g in enumerate((a, b, c)):
            params, slots = rule.update(params, {"w": g}, slots, step)
        return params["w"]

    inputs = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(three, inputs)


def test_an_inner_adam_has_a_finite_derivative_where_no_gradient_came():
    g = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    out, _ = tg.Adam(0.1, eps=0.5).update({"w": torch.zeros(2, dtype=torch.float64)}, {"w": g}, {})
    (d,) = torch.autograd.grad(out["w"].sum(), g)
    # At 0 the step is -lr g / (|g| + eps), whose derivative is -lr / eps.
    torch.testing.assert_close(d, torch.full((2,), -0.2, dtype=torch.float64), rtol=1e-12, atol=0)


def test_rates_may_be_tensors_by_parameter_and_by_step():
    rate = torch.tensor([0.5, 1.0], requires_grad=True)
    each = {"w": rate, "b": torch.tensor(2.0)}
    grads = {"w": torch.tensor([2.0, 4.0]), "b": torch.ones(1)}
    zeros = {"w": torch.zeros(2), "b": torch.zeros(1)}
    out, _ = tg.SGD(each).update(zeros, grads, {})
    assert (out["w"].tolist(), out["b"].tolist()) == ([-1.0, -4.0], [-2.0])
    assert torch.autograd.grad(out["w"].sum(), rate)[0].tolist() == [-2.0, -4.0]
    rule = tg.SGD(net(), lr=[torch.tensor(1.0), 0.5, each])
    assert [rule.update(zeros, grads, {}, k)[0]["b"].item() for k in range(3)] == [-1.0, -0.5, -2.0]
    assert tg.SGD([0.1, 0.2]).lr == [0.1, 0.2]
    with pytest.raises(InputError, match=r"has 3 learning rates, one a step, and comes to step 4"):
        rule.update(zeros, grads, {}, 3)
    with pytest.raises(InputError, match=r"rate of shape \(3,\) is none for.*of shape \(2,\)"):
        tg.SGD({"w": torch.ones(3), "b": 0.1}).update(zeros, grads, {})
    with pytest.raises(InputError, match=r"learning rates for b, and none for 'w'"):
        tg.SGD({"b": 0.1}).update(zeros, grads, {})


def test_an_inner_adam_is_a_value_and_parameters_make_an_optimizer():
    model = net()
    for rule, steps in ((tg.Adam(1e-2), None), (tg.Adam(model, lr=1e-2, steps=5), 5)):
        assert isinstance(rule, InnerAdam)
        assert (rule.lr, rule.steps) == (1e-2, steps)
    scalar = torch.nn.Parameter(torch.tensor(1.0))
    for params in (model.parameters(), [scalar], [{"params": [scalar]}], model.named_parameters()):
        assert isinstance(tg.Adam(params), torch.optim.Adam)
    assert isinstance(tg.SGD([scalar], lr=0.1), torch.optim.SGD)
    assert tg.Adam(model.parameters()).param_groups[0]["lr"] == 1e-3
    with pytest.raises(InputError, match=r"tg\.Adam over parameters needs lr= and takes no steps="):
        tg.Adam(model.parameters(), lr=0.1, steps=3)
    with pytest.raises(InputError, match=r"an inner Adam takes no weight_decay and no plugin"):
        tg.Adam(1e-2, weight_decay=0.1)
    with pytest.raises(InputError, match=r"betas in \[0, 1\) and eps > 0"):
        tg.Adam(1e-2, betas=(1.0, 0.9))


def test_the_two_forms_of_sgd_are_not_mixed():
    model = net()
    for bad in (0, -1.0, math.nan, 0.0):
        with pytest.raises(InputError, match=r"an inner SGD needs lr > 0, got"):
            tg.SGD(bad)
    with pytest.raises(InputError, match=r"an inner SGD needs lr > 0, got None"):
        tg.SGD(model)
    with pytest.raises(InputError, match=r"lr"):
        tg.SGD(1e-2, lr=1e-3)
    for extra in ({"weight_decay": 0.1}, {"plugin": Recorder([])}):
        with pytest.raises(InputError, match=r"an inner SGD takes no weight_decay and no plugin"):
            tg.SGD(model, lr=0.1, **extra)
    with pytest.raises(InputError, match=r"momentum in \[0, 1\), got 1\.5"):
        tg.SGD(0.1, momentum=1.5)
    with pytest.raises(InputError, match=r"steps >= 0, got -1"):
        tg.SGD(0.1, steps=-1)
    with pytest.raises(InputError, match=r"tg\.SGD over parameters needs lr="):
        tg.SGD(model.parameters())
    with pytest.raises(InputError, match=r"takes no steps="):
        tg.SGD(model.parameters(), lr=0.1, steps=3)


# --- plugins --------------------------------------------------------------------------------------


def test_plugins_act_in_order_around_every_step():
    model, log = net(), []
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=[Recorder(log, "a"), Recorder(log, "b")])
    start = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(2))
    assert [(n, when) for n, when, _ in log[:4]] == [
        ("a", "before"), ("b", "before"), ("a", "after"), ("b", "after")
    ]  # fmt: skip
    assert all(map(torch.equal, log[0][2], start))
    assert not any(map(torch.equal, log[2][2], start))
    assert len(log) == 8


def test_a_plugin_may_change_the_gradient_and_the_weights():
    class Clip(tg.Transform):
        def before_step(self):
            for p in self.params:
                p.grad.clamp_(-0.01, 0.01)

        @torch.no_grad()
        def after_step(self):
            for p in self.params:
                p.clamp_(max=1.0)

    w = torch.tensor([0.5, 5.0], requires_grad=True)
    optimizer = tg.SGD([w], lr=1.0, plugin=Clip())
    w.square().sum().backward()
    optimizer.step()
    assert w.tolist() == pytest.approx([0.49, 1.0])


def test_a_plugin_sees_all_parameters_in_order():
    model, plugin = net(), Recorder([])
    groups = [{"params": model[2].parameters()}, {"params": model[0].parameters()}]
    optimizer = tg.Adam(groups, plugin=plugin)
    want = [*model[2].parameters(), *model[0].parameters()]
    assert all(a is b for a, b in zip(plugin.params, want, strict=True))
    del optimizer


def test_a_new_anchor_is_told_to_the_plugins_of_every_owner():
    model = net()
    body = tg.SGD(model[0].parameters(), lr=0.1, plugin=Recorder([], "body"))
    head = tg.SGD(model[2].parameters(), lr=0.1, plugin=Recorder([], "head"))
    bystander = tg.SGD(net().parameters(), lr=0.1, plugin=Recorder([], "other"))
    stats = arch.anchor_from(model, "a", fisher=None).stats
    assert stats["body_steps"] == stats["head_steps"] == 0
    assert "other_steps" not in stats
    assert stats["named"] == dict.fromkeys(dict(model.named_parameters()), "head")
    del body, head, bystander


def test_what_is_no_plugin_is_refused():
    model = net()
    for bad in (opt.path_integral, "ogd", [opt.path_integral(), 3]):
        with pytest.raises(InputError, match=r"plugin= takes graph\.Transform objects such as"):
            tg.SGD(model.parameters(), lr=0.1, plugin=bad)


def test_an_optimizer_with_plugins_takes_no_closure():
    w = torch.ones(1, requires_grad=True)
    optimizer = tg.SGD([w], lr=0.1, plugin=Recorder([]))
    for call in (lambda: optimizer.step(lambda: w.sum()), lambda: optimizer.step(closure=w.sum)):
        with pytest.raises(InputError, match="takes no closure: call backward"):
            call()
    assert w.item() == 1.0
    optimizer.step(None)
    optimizer.step(closure=None)
    plain = tg.SGD([w], lr=0.1)

    def closure():
        plain.zero_grad()
        value = w.sum()
        value.backward()
        return value

    plain.step(closure)
    assert w.item() == pytest.approx(0.9)


def test_the_state_with_plugins_goes_on_bit_identically():
    def build(model):
        plugins = [opt.path_integral(), Recorder([])]
        return tg.Adam(model.parameters(), lr=0.01, plugin=plugins), plugins

    whole, resumed = net(), net(seed=9)
    a, plugins = build(whole)
    train(whole, a, range(4))
    b, restored = build(resumed)
    resumed.load_state_dict(whole.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    train(whole, a, range(4, 8))
    train(resumed, b, range(4, 8))
    assert same(whole, resumed)
    assert restored[1].count == plugins[1].count == 8
    for key in ("w", "omega", "start"):
        assert all(map(torch.equal, plugins[0].state_dict()[key], restored[0].state_dict()[key]))
    one, two = a.state_dict()["state"], b.state_dict()["state"]
    assert all(torch.equal(one[k][n], two[k][n]) for k in one for n in one[k])


def test_the_state_of_an_optimizer_without_plugins_is_pytorchs():
    model = net()
    ours, theirs = tg.Adam(model.parameters()), torch.optim.Adam(model.parameters(), fused=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())


def test_a_state_with_other_plugins_is_refused():
    model = net()
    one = tg.SGD(model.parameters(), lr=0.1, plugin=Recorder([]))
    two = tg.SGD(model.parameters(), lr=0.1, plugin=[Recorder([]), Recorder([])])
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"has 2 plugins, the saved state has 1"):
        two.load_state_dict(one.state_dict())
    with pytest.raises(InputError, match=r"has 1 plugins, the saved state has 0"):
        one.load_state_dict(plain.state_dict())


def test_a_state_pytorch_refuses_leaves_the_plugins_alone():
    model = net()
    one = tg.SGD(model.parameters(), lr=0.1, plugin=opt.path_integral())
    halves = [{"params": m.parameters()} for m in (model[0], model[2])]
    two = tg.SGD(halves, lr=0.1, plugin=opt.path_integral())
    train(model, two, range(1))
    with pytest.raises(ValueError, match="parameter groups"):
        one.load_state_dict(two.state_dict())
    assert not any(w.any() for w in one.state_dict()["plugins"][0]["w"])


def test_an_optimizer_is_freed_with_its_last_reference():
    import gc
    import weakref

    model = net()
    optimizer = tg.Adam(model.parameters(), plugin=[opt.path_integral(), Recorder([])])
    train(model, optimizer, range(1))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


def test_transform_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        tg.Transform()
    assert issubclass(InputError, (TesseraError, ValueError))

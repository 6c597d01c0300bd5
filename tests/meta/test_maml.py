"""One inner loop: closed forms, central differences, and a model nobody touched."""

import copy
import gc
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import arch
from tessera import graph as tg
from tessera import ops as T
from tessera.arch.delta import Delta
from tessera.arch.overlay import overlay
from tessera.data import Batch
from tessera.errors import InputError, NonFiniteError, UnknownNameError
from tessera.meta.adapted import MetaState
from tessera.meta.maml import maml_step
from tessera.meta.rates import learned_rates

DOUBLE = torch.float64


def net(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)]
    return nn.Sequential(*layers).to(DOUBLE)


def shots(n=6, seed=0, classes=2):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, dtype=DOUBLE, generator=g)
    return Batch(x, torch.randint(0, classes, (n,), generator=g))


def outer(model, query=None, **how):
    """The query loss after the inner loop; kept small and free of ReLU for central differences."""
    query = query or shots(7, 1)
    adapted, _ = maml_step(model, how.pop("batch", shots()), **how)
    return T.cross_entropy(adapted(query.x), query.y)


def assert_central(loss, tensors, *, directions=3, eps=3e-6):
    """d loss / d tensors along random directions equals central differences."""
    tensors = list(tensors)
    grads = torch.autograd.grad(loss(), tensors, allow_unused=True)
    generator = torch.Generator().manual_seed(3)
    for _ in range(directions):
        way = [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in tensors]
        ours = sum((g * w).sum() for g, w in zip(grads, way, strict=True) if g is not None)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for t, w in zip(tensors, way, strict=True):
                    t.add_(w, alpha=sign * eps)
            ends.append(loss().detach())
            with torch.no_grad():
                for t, w in zip(tensors, way, strict=True):
                    t.sub_(w, alpha=sign * eps)
        theirs = (ends[0] - ends[1]) / (2 * eps)
        torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=1e-10)


# --- closed forms -------------------------------------------------------------------------------


class Quadratic:
    """f(w) = 1/2 (w - b)^T A (w - b) inside, the same with B and c outside; w is a Linear's."""

    def __init__(self, d=4):
        g = torch.Generator().manual_seed(0)
        a, b = (torch.randn(d, d, dtype=DOUBLE, generator=g) for _ in range(2))
        self.A, self.B = a @ a.T / d + 0.1 * torch.eye(d), b @ b.T / d
        self.b, self.c = (torch.randn(d, dtype=DOUBLE, generator=g) for _ in range(2))
        self.model = nn.Linear(d, 1, bias=False).to(DOUBLE)
        self.eye = torch.eye(d, dtype=DOUBLE)
        self.support = Batch(self.eye, self.b)

    def inner(self, output, y):
        e = output[:, 0] - y
        return 0.5 * e @ self.A @ e

    def run(self, **how):
        adapted, state = maml_step(
            self.model, self.support, inner_opt=tg.SGD(0.1), loss_fn=self.inner, **how
        )
        e = adapted(self.eye)[:, 0] - self.c
        (0.5 * e @ self.B @ e).backward()
        return adapted, state

    def closed(self, K):
        """w_K, and the outer loss's gradient there."""
        step = torch.linalg.matrix_power(self.eye - 0.1 * self.A, K)
        w = self.b + step @ (self.model.weight.detach()[0] - self.b)
        return step, w, self.B @ (w - self.c)


@pytest.mark.parametrize("K", [0, 1, 5, 20, 100])
@pytest.mark.parametrize("remat", [False, True])
def test_the_meta_gradient_of_a_quadratic_is_the_closed_form(K, remat):
    q = Quadratic()
    adapted, state = q.run(K=K, remat=remat)
    step, w, g = q.closed(K)
    torch.testing.assert_close(adapted.params["weight"][0], w, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(q.model.weight.grad[0], step @ g, rtol=1e-10, atol=1e-12)
    assert (len(state.losses), state.steps) == (K, K)


@pytest.mark.parametrize("K", [0, 1, 20])
def test_first_order_is_the_gradient_at_the_end(K):
    q = Quadratic()
    q.run(K=K, create_graph=False)
    torch.testing.assert_close(q.model.weight.grad[0], q.closed(K)[2], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", [0, 3, 8, 20])
def test_truncation_is_second_order_in_the_last_steps_alone(n):
    q = Quadratic()
    q.run(K=8, truncate=n)
    last = torch.linalg.matrix_power(q.eye - 0.1 * q.A, min(n, 8))
    torch.testing.assert_close(q.model.weight.grad[0], last @ q.closed(8)[2], rtol=1e-11, atol=0)


def test_steps_in_two_calls_are_the_steps_of_one():
    for rule in (tg.SGD(0.1, momentum=0.8), tg.Adam(0.05)):
        model, query, grads = net(), shots(7, 1), []
        for parts in ((5,), (2, 0, 3)):
            state = None
            for K in parts:
                adapted, state = maml_step(model, shots(), inner_opt=rule, K=K, state=state)
            loss = T.cross_entropy(adapted(query.x), query.y)
            grads.append([state.losses, *torch.autograd.grad(loss, list(model.parameters()))])
            assert state.steps == 5
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)


def test_a_loop_may_begin_at_tensors_of_ones_own():
    model, query = net(), shots(7, 1)
    head = torch.randn(2, 5, dtype=DOUBLE, requires_grad=True)
    state = MetaState.at({"3.weight": head * 2})
    how = {"inner_opt": tg.SGD(0.1), "K": 3}

    def loss():
        adapted, _ = maml_step(model, shots(), state=MetaState.at({"3.weight": head * 2}), **how)
        return T.cross_entropy(adapted(query.x), query.y)

    assert_central(loss, [head, model[0].weight])
    adapted, after = maml_step(model, shots(), state=state, **how)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[3].weight.copy_(head * 2)
    expected, _ = maml_step(other, shots(), **how)
    assert all(torch.equal(adapted.params[n], p) for n, p in expected.params.items())
    assert after.steps == 3


def test_a_support_set_made_by_the_model_is_data_to_the_inner_loop():
    model, query = net(), shots(7, 1)
    rate = 0.3

    def by_hand():
        x = model[0](shots().x)
        w, b = model[3].weight, model[3].bias
        body = [p.detach().requires_grad_() for p in (w, b)]
        grads = torch.autograd.grad(T.cross_entropy(F.linear(x, *body), shots().y), body)
        w, b = (p - rate * g for p, g in zip((w, b), grads, strict=True))
        return T.cross_entropy(F.linear(model[0](query.x), w, b), query.y)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = model[3]

        def forward(self, x):
            return self.head(x)

    # The features depend on the head: only what the forward reads of it is differentiated.
    support = Batch(model[0](shots().x) + 0 * model[3].weight.sum(), shots().y)
    adapted, _ = maml_step(Head(), support, inner_opt=tg.SGD(rate), K=1, create_graph=False)
    loss = T.cross_entropy(adapted(model[0](query.x)), query.y)
    torch.testing.assert_close(loss, by_hand(), rtol=1e-13, atol=0)
    shifted = Batch(model[0](shots().x) + model[3].bias.sum(), shots().y)
    bias_moves, _ = maml_step(Head(), shifted, inner_opt=tg.SGD(rate), K=1)
    fixed = Batch(shifted.x.detach(), shifted.y)
    bias_alone, _ = maml_step(Head(), fixed, inner_opt=tg.SGD(rate), K=1)
    torch.testing.assert_close(bias_moves.params["head.bias"], bias_alone.params["head.bias"])


# --- central differences --------------------------------------------------------------------------

RULES = {
    "sgd": tg.SGD(0.3),
    "momentum": tg.SGD(0.2, momentum=0.9),
    "adam": tg.Adam(0.05, eps=0.1),  # a small one is a kink, where differences are no derivative
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("buffers", ["batch", "frozen", "per_task"])
def test_the_meta_gradient_equals_central_differences(rule, buffers):
    model = net()
    model[1].running_var += 0.5
    assert_central(
        lambda: outer(model, inner_opt=RULES[rule], K=5, buffers=buffers), model.parameters()
    )


@pytest.mark.parametrize("per", ["parameter", "element"])
@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("build", [tg.SGD, partial(tg.Adam, eps=0.1)])
def test_learned_rates_get_their_gradient(per, steps, build):
    model = net()
    rates = learned_rates(model, 0.1, steps=steps, per=per)
    assert all(p.dtype == DOUBLE for p in rates.parameters())

    def loss(**how):
        return outer(model, inner_opt=build(model, lr=rates()), K=4, **how)

    assert_central(loss, [*rates.parameters(), *model.parameters()], directions=2)
    again = torch.autograd.grad(loss(remat=True), list(rates.parameters()))
    once = torch.autograd.grad(loss(), list(rates.parameters()))
    for a, b in zip(again, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_one_rate_may_be_a_tensor_of_ones_own():
    model, raw = net(), torch.tensor(-1.0, dtype=DOUBLE, requires_grad=True)
    assert_central(lambda: outer(model, inner_opt=tg.SGD(F.softplus(raw)), K=3), [raw])
    first = outer(model, inner_opt=tg.SGD(F.softplus(raw)), K=1, create_graph=False)
    assert torch.autograd.grad(first, raw)[0].item() != 0  # reaches the rate in first order too


def test_gradcheck_over_the_parameters():
    model, query = net(), shots(5, 1)
    names = list(dict(model.named_parameters()))

    def meta(*tensors):
        state = MetaState.at(dict(zip(names, tensors, strict=True)))
        adapted, _ = maml_step(model, shots(), inner_opt=tg.SGD(0.2), K=2, state=state)
        return T.cross_entropy(adapted(query.x), query.y)

    inputs = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(meta, inputs)


# --- what is adapted ------------------------------------------------------------------------------


@pytest.mark.parametrize("only", ["3", "3.*", ["3.weight", "3.bias"]])
def test_anil_adapts_the_head_and_the_body_gets_its_gradient(only):
    model = net()
    adapted, state = maml_step(model, shots(), inner_opt=tg.SGD(0.3), K=3, only=only)
    assert set(state.params) == {"3.weight", "3.bias"}
    assert adapted.params["0.weight"] is model[0].weight
    assert_central(lambda: outer(model, inner_opt=tg.SGD(0.3), K=3, only=only), model.parameters())


def test_a_frozen_parameter_stays():
    model = net()
    model[0].weight.requires_grad_(False)
    _, state = maml_step(model, shots(), inner_opt=tg.SGD(0.3), K=1)
    assert "0.weight" not in state.params
    with pytest.raises(InputError, match=r"nothing to adapt: '0\.weight' and the others"):
        maml_step(model, shots(), inner_opt=tg.SGD(0.3), K=1, only="0.weight")


def lora(model):
    g = torch.Generator().manual_seed(4)
    A, B = (torch.randn(s, dtype=DOUBLE, generator=g) for s in ((2, 3), (5, 2)))
    return Delta(
        kind="lora",
        tensors={"0.A": A.requires_grad_(), "0.B": B.requires_grad_()},
        scales={"0": 0.5},
        base_hash=arch.base_hash(model),
    )


def test_a_delta_is_adapted_and_the_base_gets_no_gradient():
    model, query = net(), shots(7, 1)
    delta = lora(model)
    assert_central(lambda: outer(model, inner_opt=tg.SGD(0.3), K=3, only=delta), delta.parameters())
    outer(model, inner_opt=tg.SGD(0.3), K=3, only=delta).backward()
    assert all(p.grad is None for p in model.parameters())
    adapted, _ = maml_step(model, shots(), inner_opt=tg.SGD(0.3), K=3, only=delta)
    mine = adapted.delta()
    assert set(adapted.params) == {"0.A", "0.B"}
    assert mine.parameters() == []  # a snapshot
    assert not torch.equal(mine.tensors["0.B"], delta.tensors["0.B"])
    torch.testing.assert_close(overlay(model, [(mine, 1.0)])(query.x), adapted(query.x))
    frozen, _ = maml_step(model, shots(), inner_opt=tg.SGD(0.3), K=0, only=delta)
    assert torch.equal(frozen.delta().tensors["0.A"], delta.tensors["0.A"])
    with pytest.raises(InputError, match=r"no trainable tensor"):
        maml_step(model, shots(), inner_opt=tg.SGD(0.3), K=1, only=mine)
    with pytest.raises(InputError, match=r"adapted no delta"):
        maml_step(model, shots(), inner_opt=tg.SGD(0.3), K=1)[0].delta()


# --- what is left alone ---------------------------------------------------------------------------


def snapshot(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        n: (
            id(t),
            t._version,
            t.clone(),
            t.requires_grad,
            None if t.grad is None else t.grad.clone(),
        )
        for n, t in tensors.items()
    }, [m.training for m in model.modules()]


def assert_unchanged(model, before):
    (then, modes), (now, modes_now) = before, snapshot(model)
    assert modes == modes_now
    for name, (i, version, value, wanted, grad) in then.items():
        j, version_now, value_now, wanted_now, grad_now = now[name]
        assert (i, version, wanted) == (j, version_now, wanted_now), name
        assert torch.equal(value, value_now), name
        assert (grad is None) == (grad_now is None), name
        assert grad is None or torch.equal(grad, grad_now), name


@pytest.mark.parametrize("buffers", ["batch", "frozen", "per_task"])
def test_the_model_is_untouched_also_after_an_exception(buffers):
    model = net()
    model(shots().x).sum().backward()
    before = snapshot(model)
    adapted, _ = maml_step(model, shots(), inner_opt=tg.SGD(0.3), K=3, buffers=buffers)
    adapted(shots().x)

    def broken(output, y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        maml_step(model, shots(), inner_opt=tg.SGD(0.3), K=3, buffers=buffers, loss_fn=broken)
    assert_unchanged(model, before)
    T.cross_entropy(adapted(shots().x), shots().y).backward()  # which is what .grad is for
    assert not torch.equal(model[0].weight.grad, before[0]["0.weight"][4])


def test_per_task_statistics_are_returned_and_used_by_the_adapted_model():
    model = net()
    adapted, state = maml_step(model, shots(), inner_opt=tg.SGD(0.3), K=3, buffers="per_task")
    trained = copy.deepcopy(model)
    assert state.running["1.num_batches_tracked"].item() == 3
    assert trained[1].num_batches_tracked.item() == 0
    trained.load_state_dict(adapted.state_dict())
    torch.testing.assert_close(trained.eval()(shots(4, 5).x), adapted(shots(4, 5).x))
    assert all(not t.requires_grad for t in adapted.state_dict().values())


def test_under_no_grad_it_adapts_and_keeps_no_graph():
    model = net()
    with torch.no_grad():
        adapted, state = maml_step(model, shots(), inner_opt=tg.SGD(0.3, momentum=0.5), K=3)
        assert not adapted(shots().x).requires_grad
    kept = [*adapted.params.values(), *state.slots["momentum"].values(), state.losses]
    assert not any(t.requires_grad for t in kept)
    with_graph, _ = maml_step(model, shots(), inner_opt=tg.SGD(0.3, momentum=0.5), K=3)
    assert all(torch.equal(adapted.params[n], p) for n, p in with_graph.params.items())
    with torch.inference_mode(), pytest.raises(InputError, match=r"use torch\.no_grad\(\)"):
        maml_step(model, shots(), inner_opt=tg.SGD(0.3), K=1)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("graph", [True, False])
def test_two_hundred_adaptations_leave_memory_flat(graph):
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 2)).to(DOUBLE)
    support = shots(256)  # a step's graph is about half a megabyte

    def evaluate(times):
        for _ in range(times):
            with torch.set_grad_enabled(graph):
                adapted, _ = maml_step(model, support, inner_opt=tg.SGD(0.3), K=2)
                adapted(support.x)

    gc.collect()
    gc.disable()  # nothing may wait for it in a cycle
    try:
        evaluate(30)
        before = resident_bytes()
        evaluate(200)
        assert resident_bytes() - before < 20e6
    finally:
        gc.enable()


def test_three_threads_adapt_one_model():
    model, wrong = net(), []
    expected = [outer(model, batch=shots(6, s), inner_opt=tg.SGD(0.3), K=3) for s in range(3)]
    gate = threading.Barrier(3)

    def work(s):
        gate.wait()
        for _ in range(15):
            got = outer(model, batch=shots(6, s), inner_opt=tg.SGD(0.3), K=3)
            if not torch.equal(got, expected[s]):
                wrong.append(s)

    before = snapshot(model)
    threads = [threading.Thread(target=work, args=(s,)) for s in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    assert_unchanged(model, before)


# --- bad input ------------------------------------------------------------------------------------

GOOD = {"inner_opt": tg.SGD(0.1), "K": 1}
BAD = {
    "K < 0": ({"K": -1}, InputError, r"K >= 0 steps, got K=-1"),
    "K no count": ({"K": 1.5}, InputError, r"got K=1\.5"),
    "no K": ({"K": None}, InputError, r"how many steps\? Give K=5"),
    "optimizer": (
        {"inner_opt": torch.optim.SGD([torch.zeros(1)], lr=0.1)},
        InputError,
        r"rule of an inner loop.*got SGD",
    ),
    "only": (
        {"only": "body"},
        UnknownNameError,
        r"there is no parameter 'body'; choose one of: 0\.w",
    ),
    "buffers": ({"buffers": "eval"}, UnknownNameError, r"batch, frozen, per_task"),
    "truncate": ({"truncate": -1}, InputError, r"truncate= is a number of last steps"),
    "both": ({"truncate": 1, "create_graph": False}, InputError, r"is truncate=0 already"),
    "loss shape": (
        {"loss_fn": lambda o, y: F.cross_entropy(o, y, reduction="none")},
        InputError,
        r"0-d tensor, got shape \(6,\)",
    ),
    "detached": (
        {"loss_fn": lambda o, y: F.cross_entropy(o.detach(), y)},
        InputError,
        r"depends on none of the 6 parameters",
    ),
    "state": (
        {"state": MetaState.at({"3.weight": torch.zeros(1, dtype=DOUBLE)})},
        InputError,
        r"of another inner loop: it has \(1,\) for '3\.weight', this one adapts \(2, 5\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        maml_step(net(), shots(), **{**GOOD, **change})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch(torch.zeros(0, 3), torch.zeros(0)), r"at least one, got x \(0, 3\)"),
        (Batch(torch.zeros(3, 3), torch.zeros(2)), r"x \(3, 3\) and y \(2,\)"),
        (torch.zeros(3, 3), r"data\.Batch\(x, y\), got Tensor"),
        (Batch(torch.zeros(3, 3), None), r"tensors x \[n, \.\.\.\]"),
    ],
)
def test_bad_support_sets_are_named(batch, message):
    with pytest.raises(InputError, match=message):
        maml_step(net(), batch, **GOOD)


def test_a_loss_that_blows_up_says_at_which_step():
    model = nn.Linear(1, 1, bias=False)
    support = Batch(torch.full((1, 1), 1e3), torch.zeros(1, 1))
    rule = tg.SGD(1e12)
    with pytest.raises(NonFiniteError, match=r"the inner loss is (inf|nan) at step 2 \(counted"):
        maml_step(model, support, inner_opt=rule, K=6, loss_fn=F.mse_loss)
    _, state = maml_step(model, support, inner_opt=rule, K=2, loss_fn=F.mse_loss)
    with pytest.raises(NonFiniteError, match=r"at step 2 \(counted"):
        maml_step(model, support, inner_opt=rule, K=2, loss_fn=F.mse_loss, state=state)


def test_a_parameter_the_loss_does_not_use_stays_where_it_is():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).to(DOUBLE)

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["used"](x)

    for rule in RULES.values():
        adapted, _ = maml_step(Uses(), shots(), inner_opt=rule, K=2)
        assert torch.equal(adapted.params["parts.idle.weight"], model["idle"].weight)
        assert not torch.equal(adapted.params["parts.used.weight"], model["used"].weight)


class Reads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_are_differentiated_twice_on_a_cpu(kind):
    model = Reads(kind).to(DOUBLE)
    pairs = Batch(shots(12).x.unflatten(0, (6, 2)), shots(6).y)

    def loss(model, pairs):
        return outer(model, pairs, batch=pairs, inner_opt=tg.SGD(0.3), K=3)

    assert_central(lambda: loss(model, pairs), model.parameters())
    wide = torch.autograd.grad(loss(model, pairs), list(model.parameters()))
    small = copy.deepcopy(model).float()  # which runs other kernels
    found = loss(small, Batch(pairs.x.float(), pairs.y))
    narrow = torch.autograd.grad(found, list(small.parameters()))
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a.to(DOUBLE), b, rtol=1e-3, atol=1e-6)

"""A whole meta-gradient in one call: equal to the parts, compiled or not, and never wrong."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import graph as tg
from tessera import peft
from tessera.data import Batch
from tessera.errors import InputError, NonFiniteError, UnknownNameError
from tessera.graph.ir import execute
from tessera.meta import compiled_cache, compiled_graph
from tessera.meta.compiled import MetaStep
from tessera.meta.compiled_cache import Unbuilt
from tessera.meta.rates import learned_rates
from tessera.meta.tasks import maml_tasks

DOUBLE = torch.float64


def mlp(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), *between, nn.Tanh(), nn.Linear(6, 3)).to(DOUBLE)


def batches(tasks=3, n=4, seed=1):
    draw = torch.Generator().manual_seed(seed)
    x = [torch.randn(tasks, n, 2, generator=draw, dtype=DOUBLE) for _ in range(2)]
    y = [torch.randint(3, (tasks, n), generator=draw) for _ in range(2)]
    return Batch(x[0], y[0]), Batch(x[1], y[1])


def grads(*modules):
    found = [p.grad for m in modules for p in m.parameters()]
    for m in modules:
        m.zero_grad()
    return found


def by_hand(model, support, query, **how):
    """The parts, as the guide writes them."""
    adapted, _ = maml_tasks(model, support, **how)
    outer = F.cross_entropy(adapted(query.x).flatten(0, 1), query.y.flatten())
    outer.backward()
    return outer.detach()


class Interpreted:
    """In place of the compiler: runs the traced graph, op by op, and counts."""

    def __init__(self):
        self.programs, self.traced, self.calls = {}, 0, 0
        self.change = lambda outputs: outputs

    def place(self, program, devices):
        self.traced += 1
        self.programs[Path(str(self.traced))] = program
        return Path(str(self.traced))

    def load(self, path, device):
        def kernel(values):
            self.calls += 1
            return self.change(execute(self.programs[path], values))

        return kernel


@pytest.fixture
def interpreted(monkeypatch):
    fake = Interpreted()
    monkeypatch.setattr(compiled_graph, "place", fake.place)
    monkeypatch.setattr(compiled_graph, "load", fake.load)
    return fake


CASES = {
    "second order": (mlp, {}),
    "first order": (mlp, {"create_graph": False}),
    "no step": (mlp, {"K": 0}),
    "part": (mlp, {"only": "2"}),
    "momentum": (mlp, {"inner_opt": tg.SGD(0.1, momentum=0.9)}),
    "adam": (mlp, {"inner_opt": tg.Adam(0.05)}),
    "batch norm": (lambda: mlp(nn.BatchNorm1d(6)), {}),
    "frozen": (lambda: mlp(nn.BatchNorm1d(6)), {"buffers": "frozen"}),
    "per task": (lambda: mlp(nn.BatchNorm1d(6)), {"buffers": "per_task"}),
    "layer norm": (lambda: mlp(nn.LayerNorm(6)), {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compile", [False, True])
def test_it_is_what_the_parts_make(case, compile, interpreted):
    build, given = CASES[case]
    model, how = build(), {"inner_opt": tg.SGD(0.3), "K": 3, **given}
    step = MetaStep(model, compile=compile, **how)
    for seed in range(3):
        support, query = batches(seed=seed)
        expected, there = by_hand(model, support, query, **how), grads(model)
        outer, here = step(support, query), grads(model)
        torch.testing.assert_close(outer, expected, rtol=1e-12, atol=1e-14)
        assert not outer.requires_grad
        for a, b in zip(here, there, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        with torch.no_grad():  # a compiled graph sees what training makes of the model
            for p, g in zip(model.parameters(), there, strict=True):
                p.sub_(0.1 * g)
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.add_(0.25)
    assert step.ready() is compile
    assert (interpreted.traced, interpreted.calls) == ((1, 3) if compile else (0, 0))


def test_learned_rates_and_what_the_loss_closes_over_get_their_gradients(interpreted):
    model, found = mlp(), []
    for compile in (False, True):
        rates = learned_rates(model, 0.2, steps=2)
        scale = torch.tensor([1.0, 2.0, 0.5], dtype=DOUBLE, requires_grad=True)

        def weighed(z, y, scale=scale):
            return F.cross_entropy(z * scale, y)

        step = MetaStep(
            model, inner_opt=tg.SGD(model, lr=rates()), K=2, loss_fn=weighed, compile=compile
        )
        for _ in range(2):
            step(*batches())
        found.append([*grads(model, rates), scale.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        assert b.abs().sum() > 0


def test_the_inner_loop_over_a_delta(interpreted):
    model = mlp()
    found = []
    for compile in (False, True):
        torch.manual_seed(1)
        delta = peft.lora(model, r=2)
        step = MetaStep(model, inner_opt=tg.SGD(0.5), K=2, only=delta, compile=compile)
        for seed in range(2):
            step(*batches(seed=seed))
        found.append([t.grad for t in delta.tensors.values() if t.grad is not None])
        assert all(p.grad is None for p in model.parameters())
    assert found[0]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_hooks_see_the_gradient_and_it_is_added(interpreted):
    model, seen = mlp(), []
    step = MetaStep(model, inner_opt=tg.SGD(0.3), K=1, compile=True)
    step(*batches())
    once = [g.clone() for g in grads(model)]
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    step(*batches())
    step(*batches())
    assert len(seen) == 2
    for a, b in zip(grads(model), once, strict=True):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize("compile", [False, True])
def test_a_support_loss_that_is_not_finite_changes_nothing(compile, interpreted):
    model = mlp()
    step = MetaStep(model, inner_opt=tg.SGD(0.3), K=2, compile=compile)
    support, query = batches()
    step(support, query)
    step(support, query)
    grads(model)
    broken = support.x.clone()
    broken[1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="of task 1 is nan at step 0"):
        step(Batch(broken, support.y), query)
    assert all(p.grad is None for p in model.parameters())
    step(support, query)  # and it goes on, still compiled
    assert step.ready() is compile


def test_a_graph_that_computes_something_else_is_found_out(interpreted):
    model = mlp()
    step = MetaStep(model, inner_opt=tg.SGD(0.3), K=2, compile=True)
    interpreted.change = lambda outputs: [*outputs[:-1], outputs[-1] * 1.001]
    expected = by_hand(model, *batches(), inner_opt=tg.SGD(0.3), K=2)
    there = grads(model)
    with pytest.warns(UserWarning, match=r"runs uncompiled .* its result was another one \(call 1"):
        outer = step(*batches())
    torch.testing.assert_close(outer, expected, rtol=1e-12, atol=1e-14)
    for a, b in zip(grads(model), there, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert not step.ready()


def test_a_number_that_changes_is_found_out_later(interpreted):
    model, weight = mlp(), [1.0]
    step = MetaStep(
        model,
        inner_opt=tg.SGD(0.3),
        K=1,
        loss_fn=lambda z, y: weight[0] * F.cross_entropy(z, y),
        compile=True,
    )
    for _ in range(5):
        step(*batches())
    weight[0] = 2.0
    for _ in range(4):
        step(*batches())
    with pytest.warns(UserWarning, match=r"\(call 10\)"):
        step(*batches())
    assert not step.ready()


def test_a_kernel_that_fails_gives_way(interpreted):
    model = mlp()
    step = MetaStep(model, inner_opt=tg.SGD(0.3), K=1, compile=True)
    first = step(*batches())

    def fail(outputs):
        raise RuntimeError("out of luck")

    interpreted.change = fail
    with pytest.warns(UserWarning, match="it failed: out of luck"):
        assert torch.equal(step(*batches()), first)


def test_shapes_modes_and_dtypes_are_traced_anew_and_no_more_than_eight(interpreted):
    model = mlp(nn.BatchNorm1d(6))
    step = MetaStep(model, inner_opt=tg.SGD(0.3), K=1, compile=True)
    for change in (lambda: None, model.eval, model.float, model[0].weight.requires_grad_):
        change()
        dtype = model[0].weight.dtype
        support, query = (Batch(b.x.to(dtype), b.y) for b in batches())
        step(support, query)
        step(support, query)
    assert interpreted.traced == 3
    model[0].weight.requires_grad_(False)
    step(support, query)
    assert interpreted.traced == 4
    model.requires_grad_()
    for n in range(5, 9):
        step(*(Batch(b.x.float(), b.y) for b in batches(n=n)))
    with pytest.warns(UserWarning, match="8 shapes"):
        step(*(Batch(b.x.float(), b.y) for b in batches(n=9)))
    step(*(Batch(b.x.float(), b.y) for b in batches(n=10)))  # says it once
    assert interpreted.traced == 8


def test_what_cannot_be_traced_runs_as_it_is(interpreted):
    model = mlp()

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.level = model, nn.Buffer(torch.ones(()))

        def forward(self, x):
            return self.inner(x) if self.level.item() > 0 else x

    step = MetaStep(Branching(), inner_opt=tg.SGD(0.3), K=1, compile=True)
    with pytest.warns(UserWarning, match=r"runs uncompiled .* it cannot be traced"):
        got = step(*batches())
    assert torch.equal(got, by_hand(model, *batches(), inner_opt=tg.SGD(0.3), K=1))


def test_without_a_compiler_it_says_which(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-g++")
    step = MetaStep(mlp(), inner_opt=tg.SGD(0.3), K=1, compile=True)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler 'no-such-g\+\+'"):
        step(*batches())
    assert not step.ready()


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "tessera").mkdir()
    (tmp_path / "tessera").chmod(0o777)
    with pytest.raises(Unbuilt, match="can be written by others"):
        compiled_cache.cache_folder()


def test_in_the_background_it_goes_on_uncompiled(interpreted, monkeypatch):
    may_go_on = threading.Event()

    def slow(path, device):
        may_go_on.wait(10)
        return interpreted.load(path, device)

    monkeypatch.setattr(compiled_graph, "load", slow)
    model = mlp()
    step = MetaStep(model, inner_opt=tg.SGD(0.3), K=2, compile="background")
    early = step(*batches())
    assert not step.ready()
    assert interpreted.calls == 0
    may_go_on.set()
    assert step.ready(wait_s=10)
    torch.testing.assert_close(step(*batches()), early, rtol=1e-12, atol=1e-14)
    assert interpreted.calls == 1


def test_what_fails_in_the_background_is_told_to_the_next_call(interpreted, monkeypatch):
    def broken(path, device):
        raise Unbuilt("the disk is full")

    monkeypatch.setattr(compiled_graph, "load", broken)
    monkeypatch.setattr(compiled_graph, "build", lambda program, devices, path: None)
    step = MetaStep(mlp(), inner_opt=tg.SGD(0.3), K=1, compile="background")
    step._compiled([t for b in batches() for t in b])
    with pytest.warns(UserWarning, match="the disk is full"):
        step.ready(wait_s=10)
    assert not step.ready()
    step(*batches())  # says it once


def test_a_program_that_ends_while_it_compiles_leaves_nothing_behind(tmp_path):
    script = """
import torch
from torch import nn
from tessera import graph as tg
from tessera.data import Batch
from tessera.meta.compiled import MetaStep
step = MetaStep(nn.Linear(2, 3), inner_opt=tg.SGD(0.3), K=1, compile="background")
tasks = Batch(torch.ones(2, 4, 2), torch.zeros(2, 4, dtype=torch.int64))
step(tasks, tasks)
print(step.ready())
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
    assert list((tmp_path / "tessera").iterdir()) == []


def test_what_is_refused():
    model = mlp()
    with pytest.raises(UnknownNameError, match="background"):
        MetaStep(model, inner_opt=tg.SGD(0.3), K=1, compile="later")
    with pytest.raises(InputError, match="rule of an inner loop"):
        MetaStep(model, inner_opt=torch.optim.SGD(model.parameters(), lr=0.1), K=1)
    with pytest.raises(InputError, match="how many steps"):
        MetaStep(model, inner_opt=tg.SGD(0.3))
    step = MetaStep(model, inner_opt=tg.SGD(0.3), K=1)
    support, query = batches()
    with pytest.raises(InputError, match="same number of tasks, got 3 and 2"):
        step(support, Batch(query.x[:2], query.y[:2]))
    with pytest.raises(InputError, match="maml_step takes a single one"):
        step(Batch(torch.ones(3), torch.ones(3)), query)


@pytest.mark.slow
def test_compiled_for_real_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = mlp()
    support, query = batches()
    expected, there = by_hand(model, support, query, inner_opt=tg.SGD(0.3), K=2), grads(model)
    for _ in range(2):
        step = MetaStep(model, inner_opt=tg.SGD(0.3), K=2, compile=True)
        for _ in range(2):  # the first is compared, the second is the compiled one alone
            outer, here = step(support, query), grads(model)
            torch.testing.assert_close(outer, expected, rtol=1e-12, atol=1e-14)
            for a, b in zip(here, there, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert step.ready()
        assert [f.suffix for f in (tmp_path / "tessera").iterdir()] == [".pt2"]
        monkeypatch.setenv("CXX", "no-such-g++")  # the second time nothing is compiled
    (file,) = (tmp_path / "tessera").iterdir()
    file.write_bytes(b"not a package")
    step = MetaStep(model, inner_opt=tg.SGD(0.3), K=2, compile=True)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler"):
        step(support, query)
    assert not file.exists()


def test_on_a_gpu_it_stays_uncompiled_and_says_so():
    elsewhere = [torch.zeros(2, device="meta")]
    made = compiled_graph.Compiled(lambda given: None, elsewhere, background=False, held=None)
    with pytest.warns(UserWarning, match="compiled for the CPU alone, and the batches are on meta"):
        assert not made.ready()

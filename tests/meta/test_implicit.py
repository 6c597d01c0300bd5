"""Implicit gradients: against closed forms, central differences and each other; how they end."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch
from tessera.errors import InputError, NonFiniteError, UnknownNameError
from tessera.meta.implicit import implicit_bilevel


def doubles(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner(lr, steps):
    return lambda m: tg.SGD(m, lr=lr, steps=steps)


# --- closed forms ----------------------------------------------------------------------------


class Ridge:
    """1/2n |X w - y|^2 + lam/2 |w|^2 with lam = exp(h): every quantity in closed form."""

    def __init__(self):
        self.x, self.xv = doubles(50, 20, seed=1), doubles(30, 20, seed=2)
        self.y, self.yv = doubles(50, 1, seed=3), doubles(30, 1, seed=4)
        self.h = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        self.model = nn.Linear(20, 1, bias=False).double()
        n = len(self.x)
        lam = self.h.detach().exp()
        self.H = self.x.T @ self.x / n + lam * torch.eye(20, dtype=torch.float64)
        self.w = torch.linalg.solve(self.H, self.x.T @ self.y / n)
        g = self.xv.T @ (self.xv @ self.w - self.yv) / len(self.xv)
        self.answer = -(g.T @ torch.linalg.solve(self.H, lam * self.w)).item()

    def fit(self, out, y):
        return 0.5 * (out - y).square().mean()

    def decayed(self, out, y):
        decay = sum(p.square().sum() for p in self.model.parameters())
        return self.fit(out, y) + 0.5 * self.h.exp() * decay

    def outer(self, K=100, tol=1e-10, **more):
        return implicit_bilevel(
            self.model,
            inner=inner(0.3, K),
            train_batch=(self.x, self.y),
            val_batch=(self.xv, self.yv),
            loss_fn=self.decayed,
            **{"prox": 0, "hparams": [self.h], "tol": tol, "val_loss_fn": self.fit, **more},
        )


@pytest.mark.parametrize("solver", ["CG", "Neumann"])
def test_the_hypergradient_of_ridge_regression(solver):
    ridge = Ridge()
    outer = ridge.outer(inner_solve=solver, max_iter=500)
    outer.backward()
    assert abs(ridge.h.grad.item() / ridge.answer - 1) < 1e-9
    assert outer.residual <= 1e-10
    assert 0 < outer.iterations <= 500
    assert outer.stopped == "converged"
    assert outer.inner_grad_norm < 1e-10
    assert ridge.model.weight.grad is None
    ridge.h.grad = None
    ridge.outer(tol=1e-3, inner_solve=solver).backward()
    assert 0 < abs(ridge.h.grad.item() / ridge.answer - 1) < 1e-2


def test_the_error_shrinks_as_the_inner_loop_converges():
    ridge, errors, slopes = Ridge(), [], []
    for K in (1, 5, 20):
        ridge.h.grad = None
        outer = ridge.outer(K)
        outer.backward()
        errors.append(abs(ridge.h.grad.item() / ridge.answer - 1))
        slopes.append(outer.inner_grad_norm)
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert slopes[0] > 3 * slopes[1] > 9 * slopes[2]


def test_a_loss_that_is_also_the_outer_one_adds_its_direct_gradient():
    ridge = Ridge()
    ridge.outer(val_loss_fn=None).backward()
    lam = ridge.h.detach().exp()
    g = ridge.xv.T @ (ridge.xv @ ridge.w - ridge.yv) / 30 + lam * ridge.w
    implicit = -(g.T @ torch.linalg.solve(ridge.H, lam * ridge.w)).item()
    direct = (0.5 * lam * ridge.w.square().sum()).item()
    assert math.isclose(ridge.h.grad.item(), implicit + direct, rel_tol=1e-9)


def test_hparams_that_are_computed_from_others_and_weights_of_examples():
    # 50 example weights, computed once outside the loss; the closed form by autograd.
    x, y, xv, yv = doubles(50, 4, seed=1), doubles(50, 1, seed=2), doubles(9, 4), doubles(9, 1)
    raw = doubles(50, 1, seed=3).requires_grad_()
    shares = raw.sigmoid()

    def weighted(out, y):
        return (shares * (out - y).square()).mean() if len(y) == 50 else F.mse_loss(out, y)

    model = nn.Linear(4, 1, bias=False).double()
    given = {"inner": inner(0.5, 300), "train_batch": (x, y), "val_batch": (xv, yv), "tol": 1e-11}
    for hparams in ([raw], [shares]):
        outer = implicit_bilevel(model, prox=0, hparams=hparams, loss_fn=weighted, **given)
        (mine,) = torch.autograd.grad(outer, raw, retain_graph=True)
        w = torch.linalg.solve(x.T @ (raw.sigmoid() * x), x.T @ (raw.sigmoid() * y))
        (exact,) = torch.autograd.grad(F.mse_loss(xv @ w, yv), raw)
        torch.testing.assert_close(mine, exact, rtol=1e-8, atol=1e-12)


class Quadratic(nn.Module):
    """1/2 (w - b)^T A (w - b) through mse_loss: x is A's root, the target x b."""

    def __init__(self, theta):
        super().__init__()
        self.w = nn.Parameter(theta.clone())

    def forward(self, x):
        return x @ self.w


def half(out, y):
    return 0.5 * (out - y).square().sum()


@pytest.mark.parametrize("solver", ["CG", "Neumann"])
@pytest.mark.parametrize("lam", [0.5, 2.0])
def test_imaml_of_a_quadratic(solver, lam):
    root, valued = doubles(6, 6, seed=1) / 3, doubles(6, 6, seed=2)
    b, c, theta = doubles(6, seed=3), doubles(6, seed=4), doubles(6, seed=5)
    A, B = root.T @ root, valued.T @ valued
    eye = torch.eye(6, dtype=torch.float64)
    w = torch.linalg.solve(A + lam * eye, A @ b + lam * theta)
    exact = torch.linalg.solve(eye + A / lam, B @ (w - c))
    model = Quadratic(theta)
    outer = implicit_bilevel(
        model,
        inner=inner(0.3, 300),
        train_batch=(root, root @ b),
        val_batch=(valued, valued @ c),
        prox=lam,
        inner_solve=solver,
        tol=1e-12,
        max_iter=500,
        loss_fn=half,
    )
    torch.testing.assert_close(outer.detach(), half(valued @ w, valued @ c))
    (3 * outer).backward()
    torch.testing.assert_close(model.w.grad, 3 * exact, rtol=1e-10, atol=1e-11)


NETS = {
    "batchnorm": lambda: nn.BatchNorm1d(5),
    "layernorm": lambda: nn.LayerNorm(5),
    "plain": lambda: nn.Identity(),
}


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("plain", tg.SGD(0.2, steps=180)),
        ("batchnorm", tg.SGD(0.2, steps=180)),
        ("layernorm", tg.SGD(0.2, steps=600)),
        ("plain", tg.SGD(0.1, momentum=0.7, steps=180)),
    ],
)
def test_central_differences_of_a_tanh_network(kind, rule):
    model = nn.Sequential(nn.Linear(3, 5), NETS[kind](), nn.Tanh(), nn.Linear(5, 2)).double()
    train, val = (
        (doubles(12, 3), torch.arange(12) % 2),
        (doubles(8, 3, seed=1), torch.arange(8) % 2),
    )

    def value():
        return implicit_bilevel(
            model, inner=lambda m: rule, train_batch=train, val_batch=val, tol=1e-11
        )

    outer = value()
    outer.backward()
    assert outer.inner_grad_norm < 1e-9
    params = list(model.parameters())
    for seed in (1, 2):
        vs = [doubles(*p.shape, seed=10 * i + seed) for i, p in enumerate(params)]
        values = []
        for step in (3e-6, -3e-6):
            with torch.no_grad():
                torch._foreach_add_(params, vs, alpha=step)
                values.append(value().item())
                torch._foreach_add_(params, vs, alpha=-step)
        slope = (values[0] - values[1]) / 6e-6
        ours = sum((p.grad * v).sum().item() for p, v in zip(params, vs, strict=True))
        assert abs(ours - slope) < 1e-6 * (1 + abs(slope))


# --- the contract ----------------------------------------------------------------------------


def small(**more):
    """A call that works, on 2 classes, but for what is given; and its model."""
    torch.manual_seed(0)
    model = more.pop("model", None) or nn.Linear(3, 2)
    g = torch.Generator().manual_seed(1)
    batch = Batch(torch.randn(8, 3, generator=g), torch.arange(8) % 2)
    given = {"inner": inner(0.1, 5), "train_batch": batch, "val_batch": batch, **more}
    return implicit_bilevel(model, **given), model


def test_the_guides_block():
    model = nn.Linear(3, 2)
    meta_opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    task_support = task_query = Batch(torch.randn(6, 3), torch.arange(6) % 2)
    before = model.weight.detach().clone()
    outer = implicit_bilevel(
        model,
        inner=lambda m: tg.SGD(m, lr=1e-2, steps=5),
        train_batch=task_support,
        val_batch=task_query,
        hvp="pearlmutter",
        tol=1e-3,
    )
    assert outer.dim() == 0
    assert (outer.iterations, outer.residual) == (None, None)
    outer.backward()
    meta_opt.step()
    assert not torch.equal(model.weight, before)
    assert 0 < outer.residual <= 1e-3
    assert isinstance(outer.iterations, int)


def test_it_is_a_loss_for_a_training_step():
    model = nn.Linear(3, 2)
    optimizer = tg.SGD(model.parameters(), lr=0.5)

    @tg.training_step
    def step():
        return small(model=model)[0]

    values = [step().item() for _ in range(4)]
    assert values == sorted(values, reverse=True)
    assert values[3] < values[0]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_meta_batch_accumulates_as_any_loss_does():
    one, model = small()
    one.backward()
    single = model.weight.grad.clone()
    first, _ = small(model=model)
    second, _ = small(model=model)
    model.weight.grad = None
    ((first + second) / 2).backward()
    torch.testing.assert_close(model.weight.grad, single)
    assert first.iterations == second.iterations == one.iterations


def test_adam_as_the_inner_rule_ends_in_the_same_place():
    results = []
    for rule in (tg.SGD(0.3, steps=500), tg.Adam(0.02, steps=1500)):
        outer, model = small(model=nn.Linear(3, 2), inner=lambda m, rule=rule: rule, tol=1e-6)
        outer.backward()
        results.append(model.weight.grad)
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-4)


def test_frozen_parameters_are_used_and_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    outer, _ = small(model=model)
    outer.backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad.abs().sum() > 0


def test_prox_with_hparams_and_under_no_grad():
    h = torch.tensor(0.1, requires_grad=True)
    outer, model = small(
        hparams=[h], loss_fn=lambda out, y: T.cross_entropy(out, y) * h.exp(), prox=0.5
    )
    outer.backward()
    assert h.grad.isfinite()
    assert model.weight.grad is None
    with torch.no_grad():
        outer, _ = small()
    assert not outer.requires_grad
    assert outer.inner_grad_norm > 0


class Once(nn.Module):
    """Raises in the call of that number."""

    def __init__(self, at):
        super().__init__()
        self.calls = [at]

    def forward(self, x):
        self.calls[0] -= 1
        if self.calls[0] == 0:
            raise RuntimeError("on purpose")
        return x


@pytest.mark.parametrize("fails_at", [0, 1, 4, 7, 8])
def test_the_model_is_left_as_it_was(fails_at):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Once(fails_at), nn.Linear(4, 2))
    model[0].weight.grad = torch.ones(4, 3)
    held = {n: t.clone() for n, t in model.state_dict().items()}
    ids = [id(t) for t in (*model.parameters(), *model.buffers())]
    expected = pytest.raises(RuntimeError, match="on purpose") if fails_at else nullcontext()
    with expected:
        outer, _ = small(model=model)
        torch.autograd.grad(outer, list(model.parameters()))
    assert all(torch.equal(t, held[n]) for n, t in model.state_dict().items())
    assert ids == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3))
    assert [p.grad for p in model.parameters()][1:] == [None] * 5
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_three_threads_with_one_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    batches = [Batch(torch.randn(6, 3), torch.arange(6) % 2) for _ in range(3)]

    def gradient(batch):
        outer, _ = small(model=model, train_batch=batch, val_batch=batch)
        return torch.autograd.grad(outer, list(model.parameters()))

    expected = [gradient(b) for b in batches]
    wrong = []

    def work(i):
        for _ in range(15):
            got = gradient(batches[i])
            if not all(torch.equal(a, b) for a, b in zip(got, expected[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_the_same_bits_twice_and_nothing_is_kept():
    grads = []
    for _ in range(2):
        outer, model = small()
        outer.backward()
        grads.append(model.weight.grad)
    assert torch.equal(*grads)
    watched = weakref.ref(outer.grad_fn)
    del outer
    gc.collect()
    assert watched() is None


def test_what_is_kept_for_gradients_does_not_grow_with_the_steps():
    class Kept:
        live = peak = 0

        def __init__(self, t):
            self.t = t
            Kept.live += 1
            Kept.peak = max(Kept.peak, Kept.live)

        def __del__(self):
            Kept.live -= 1

    peaks = []
    for K in (3, 40):
        Kept.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.t):
            small(
                model=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
                inner=inner(0.1, K),
            )
        assert Kept.live == 0  # and what backward() builds, it builds at one point
        peaks.append(Kept.peak)
    assert peaks[0] == peaks[1] > 0


def test_a_second_backward_and_a_second_derivative_are_refused():
    outer, model = small()
    outer.backward()
    with pytest.raises(RuntimeError, match="second time"):
        outer.backward()
    outer, model = small()
    (grad,) = torch.autograd.grad(outer * outer, model.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    here, model = small(model=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), tol=1e-5)
    (expected,) = torch.autograd.grad(here, [model[0].weight])
    g = torch.Generator().manual_seed(1)
    batch = Batch(torch.randn(8, 3, generator=g).cuda(), (torch.arange(8) % 2).cuda())
    outer, _ = small(model=model.cuda(), train_batch=batch, val_batch=batch, tol=1e-5)
    outer.backward()
    torch.testing.assert_close(model[0].weight.grad.cpu(), expected, rtol=1e-3, atol=1e-5)
    assert outer.residual <= 1e-5


def test_parameters_that_moved_before_backward_are_noticed():
    outer, model = small()
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outer.backward()


# --- how the solver ends ---------------------------------------------------------------------


def test_no_convergence_is_a_warning_with_the_residual_and_a_defined_result():
    outer, model = small(prox=1e-3, tol=1e-7, max_iter=1)
    with pytest.warns(UserWarning, match=r"max_iter after 1 .* residual .*raise max_iter="):
        outer.backward()
    assert (outer.stopped, outer.iterations) == ("max_iter", 1)
    assert outer.residual > 1e-7
    assert model.weight.grad.isfinite().all()


def test_negative_curvature_is_a_warning_and_a_defined_result():
    def hill(out, y):
        return -out.square().mean()

    outer, model = small(loss_fn=hill, prox=1e-3, inner=inner(1e-3, 1))
    with pytest.warns(UserWarning, match="negative curvature.*more prox="):
        outer.backward()
    assert outer.stopped == "negative curvature"
    assert model.weight.grad.isfinite().all()
    outer, _ = small(loss_fn=hill, prox=1e-3, damping=50.0, inner=inner(1e-3, 1))
    outer.backward()
    assert outer.stopped == "converged"


# --- bad input -------------------------------------------------------------------------------

EMPTY = Batch(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"prox": 0}, r"prox=0 .*hparams=\["),
        ({"prox": -1.0}, "prox >= 0"),
        ({"prox": math.nan}, "prox >= 0"),
        ({"damping": -1.0}, "damping >= 0"),
        ({"max_iter": 0}, "max_iter >= 1, got 0"),
        ({"tol": 0.0}, r"tol in \(0, 1\)"),
        ({"train_batch": EMPTY}, r"train_batch has no rows, got shape \(0, 3\)"),
        ({"val_batch": EMPTY}, "val_batch has no rows"),
        ({"val_batch": torch.zeros(2, 3)}, r"val_batch=\(x, y\).*Tensor"),
        ({"hparams": torch.ones(1, requires_grad=True)}, "as a list"),
        ({"hparams": []}, "at least one"),
        ({"hparams": [torch.ones(1)]}, r"hparams\[0\] must be a tensor that requires"),
        ({"hparams": [torch.ones(3, requires_grad=True)]}, r"no loss uses hparams\[0\], .*\(3,\)"),
        ({"inner": inner(0.1, None)}, "at least one step, got steps=None"),
        ({"inner": inner(0.1, 0)}, "at least one step, got steps=0"),
        ({"inner": lambda m: torch.optim.SGD(m.parameters(), lr=0.1)}, "gives SGD"),
        ({"loss_fn": lambda out, y: out}, r"train_batch must be a 0-d tensor, got \(8, 2\)"),
        ({"loss_fn": lambda out, y: out.detach().sum()}, "train_batch depends on no parameter"),
        ({"val_loss_fn": lambda out, y: out.detach().sum()}, "val_batch depends on no parameter"),
        ({"model": nn.Linear(3, 2).requires_grad_(False)}, "no parameter of Linear requires"),
    ],
)
def test_messages(more, words):
    with pytest.raises(InputError, match=words):
        small(**more)


@pytest.mark.parametrize("more", [{"inner_solve": "GMRES"}, {"hvp": "finite"}])
def test_unknown_names(more):
    with pytest.raises(UnknownNameError, match="choose one of"):
        small(**more)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(InputError, match="no_grad"):
        small()


def test_a_non_finite_inner_loss_names_its_step():
    with pytest.raises(NonFiniteError, match=r"inner loss is \w+ at step \d+ of 400; lower the"):
        small(inner=inner(1e3, 400), loss_fn=lambda out, y: out.square().mean())
    with pytest.raises(NonFiniteError, match="loss of val_batch is nan"):
        small(val_loss_fn=lambda out, y: out.mean() * math.nan)


def test_a_penalty_that_cannot_be_replaced_is_refused_not_wrong():
    model = nn.Linear(3, 2)

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return w.square().sum()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad * ctx.saved_tensors[0]

    with pytest.raises(InputError, match="own 'weight' where the inner loop cannot"):
        small(model=model, loss_fn=lambda out, y: T.cross_entropy(out, y) + Own.apply(model.weight))

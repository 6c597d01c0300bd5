"""Hessian-vector products: against the Hessian itself, forward over reverse, and by their laws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera.errors import InputError
from tessera.meta.calling import Functional
from tessera.meta.hvp import Curvature, hvp

# torch.func.jvp loads its rules through it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is dep:DeprecationWarning")


def net(kind):
    """A loss of a tanh, norm, conv or attention network, and its parameters, in float64."""
    layers = {
        "mlp": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        "norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()),
        "conv": lambda: nn.Sequential(nn.Conv1d(3, 2, 1), nn.Tanh(), nn.Flatten()),
        "attention": lambda: nn.TransformerEncoderLayer(
            4, 2, 5, dropout=0.0, activation="gelu", batch_first=True
        ),
    }
    shape = {"conv": (5, 3, 2), "attention": (2, 3, 4)}.get(kind, (5, 3))
    model = layers[kind]().double()
    x = torch.randn(shape, dtype=torch.float64)
    run = Functional(model)
    target = torch.randn_like(model(x)).detach()
    params = {n: p.detach() for n, p in run.params().items()}
    return (lambda w: (run(w, x) - target).square().mean()), params


def like(params, seed):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in params.items()}


def dot(a, b):
    return sum((a[n] * b[n]).sum() for n in a)


@pytest.mark.parametrize("kind", ["mlp", "norm", "conv", "attention"])
def test_three_ways_to_the_same_product(kind):
    fn, params = net(kind)
    v = like(params, 1)
    ours = hvp(fn, params, v)
    forward = torch.func.jvp(torch.func.grad(fn), (params,), (v,))[1]
    for n in params:
        torch.testing.assert_close(ours[n], forward[n], rtol=1e-10, atol=1e-12)
    # Row by row: torch.func.hessian maps over rows by vmap, and under it PyTorch's layer_norm has
    # a wrong second derivative.
    at = {n: p.clone().requires_grad_() for n, p in params.items()}
    grads = torch.autograd.grad(fn(at), list(at.values()), create_graph=True)
    flat_v = torch.cat([t.reshape(-1) for t in v.values()])
    for n, g in zip(at, grads, strict=True):
        rows = [torch.autograd.grad(e, list(at.values()), retain_graph=True) for e in g.reshape(-1)]
        H = torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in rows])
        torch.testing.assert_close(ours[n].reshape(-1), H @ flat_v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_symmetric_and_linear(kind):
    fn, params = net(kind)
    u, v = like(params, 1), like(params, 2)
    Hu, Hv = hvp(fn, params, u), hvp(fn, params, v)
    torch.testing.assert_close(dot(u, Hv), dot(v, Hu), rtol=1e-12, atol=1e-14)
    both = hvp(fn, params, {n: 2 * u[n] - 3 * v[n] for n in u})
    for n in params:
        torch.testing.assert_close(both[n], 2 * Hu[n] - 3 * Hv[n], rtol=1e-10, atol=1e-13)


def test_one_graph_gives_the_products_of_hvp():
    fn, params = net("mlp")
    at = {n: p.clone().requires_grad_() for n, p in params.items()}
    bent = Curvature(fn(at), list(at.values()))
    for seed in (1, 2):
        v = like(params, seed)
        for ours, other in zip(bent(list(v.values())), hvp(fn, params, v).values(), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-14)


def test_the_mixed_derivative_by_hand():
    w, h = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    bent = Curvature((h.square() * w.pow(3)).sum(), [w])  # d2/dh dw = 6 h w^2
    assert bent.mixed([torch.tensor([10.0])], [h])[0].item() == 10 * 6 * 3 * 4


def test_what_is_linear_or_unused_has_no_curvature():
    a, b = torch.ones(2), torch.ones(3)
    got = hvp(
        lambda p: p["a"].sum() + 0 * p["a"].square().sum(), {"a": a, "b": b}, {"a": a, "b": b}
    )
    assert got["a"].tolist() == [0, 0]
    assert got["b"].tolist() == [0, 0, 0]
    x = torch.ones(2, requires_grad=True)
    assert Curvature(x.sum(), [x])([torch.ones(2)])[0].tolist() == [0, 0]


def test_it_composes_with_vmap_and_keeps_the_structure():
    x = torch.tensor([1.0, 2.0])
    rows = torch.eye(2)
    got = torch.vmap(lambda v: hvp(lambda p: p[0].pow(4).sum(), [x], [v])[0])(rows)
    torch.testing.assert_close(got, torch.diag(12 * x**2))
    third = torch.func.grad(lambda p: hvp(lambda q: q.pow(3).sum(), p, torch.ones(2)).sum())(x)
    assert third.tolist() == [6, 6]


def test_fused_attention_takes_its_math_path():
    q = torch.randn(1, 1, 3, 4)
    got = hvp(lambda p: F.scaled_dot_product_attention(p, p, p).square().sum(), q, q)
    assert got.shape == q.shape
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("fn", "v", "words"),
    [
        (lambda p: p.sum(), torch.ones(3), r"\(3,\).*\(2,\)"),
        (lambda p: p.sum(), [torch.ones(2)], "structure"),
        (lambda p: p, torch.ones(2), r"0-d tensor, got \(2,\)"),
        (lambda p: 3.0, torch.ones(2), "0-d tensor, got float"),
        (lambda p: F.dropout(p, 0.5).sum(), torch.ones(2), "dropout"),
    ],
)
def test_messages(fn, v, words):
    with pytest.raises(InputError, match=words):
        hvp(fn, torch.ones(2), v)

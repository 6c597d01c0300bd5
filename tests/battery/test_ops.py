"""Laws of every first-class op: one node above, every derivative below."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera import arch, loss
from tessera import graph as tg
from tessera.ops.registry import OPS

# PyTorch's own forward AD still scripts its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is dep:DeprecationWarning")


def f64(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op as a function of the tensors it is differentiable in, and of its strength."""

    inputs: tuple[Tensor, ...]
    call: Callable[..., Tensor]
    args: tuple[Any, ...]  # for opcheck
    strength: Callable[[float], Tensor] | None = None  # linear in it
    at_rest: Callable[[], Tensor] | None = None  # zero there


W, B0, C, D = f64(3, 4), f64(3, seed=1), f64(3, 4, seed=2), f64(3, seed=3)
FW, FB = f64(3, 4, seed=4).square(), f64(3, seed=5).square()
Z, OLD = f64(5, 4, seed=6), f64(5, 4, seed=7)
X, A, B = f64(5, 4, seed=8), f64(2, 4, seed=9), f64(3, 2, seed=10)
AN, BN = f64(5, 2, 4, seed=11), f64(5, 3, 2, seed=12)
ops = torch.ops.tessera


def inner_loss(params: list[Tensor], batch: list[Tensor]) -> Tensor:
    hidden = torch.tanh(batch[0] @ params[0].mT + params[1])
    return nn.functional.cross_entropy(hidden, batch[1])


LABELS = torch.tensor([0, 1, 2, 0, 1])
REGION = tg.gradient_region(inner_loss, [W, B0], [X, LABELS])


def adapted_loss(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    new = ops.maml_step([w, b], [x, LABELS], REGION, 3, 0.5, True)
    return inner_loss(new, [x + 1, LABELS])


CASES = {
    "ewc": Case(
        inputs=(W, B0),
        call=lambda w, b: ops.ewc([w, b], [C, D], [FW, FB], 1.5, 0.25),
        args=([W, B0], [C, D], [FW, FB], 1.5, 0.25),
        strength=lambda s: ops.ewc([W, B0], [C, D], [FW, FB], s, 0.25),
        at_rest=lambda: ops.ewc([C, D], [C, D], [FW, FB], 1.5, 0.0),
    ),
    "si": Case(
        inputs=(W, B0),
        call=lambda w, b: ops.si([w, b], [C, D], [FW, FB], 1.5),
        args=([W, B0], [C, D], [FW, FB], 1.5),
        strength=lambda s: ops.si([W, B0], [C, D], [FW, FB], s),
        at_rest=lambda: ops.si([C, D], [C, D], [FW, FB], 1.5),
    ),
    "l2sp": Case(
        inputs=(W, B0),
        call=lambda w, b: ops.l2sp([w, b], [C, D], 1.5),
        args=([W, B0], [C, D], 1.5),
        strength=lambda s: ops.l2sp([W, B0], [C, D], s),
        at_rest=lambda: ops.l2sp([C, D], [C, D], 1.5),
    ),
    "lwf": Case(
        inputs=(Z,),
        call=lambda z: ops.lwf(z, OLD, 2.0, 1.5),
        args=(Z, OLD, 2.0, 1.5),
        strength=lambda s: ops.lwf(Z, OLD, 2.0, s),
        at_rest=lambda: ops.lwf(Z, Z, 2.0, 1.5),
    ),
    "kl_divergence": Case(
        inputs=(Z.log_softmax(1),),
        call=lambda z: ops.kl_divergence(z, OLD.softmax(1)),
        args=(Z.log_softmax(1), OLD.softmax(1)),
        at_rest=lambda: ops.kl_divergence(Z.log_softmax(1), Z.softmax(1)),
    ),
    "der": Case(
        inputs=(Z,),
        call=lambda z: ops.der(z, OLD, 1.5),
        args=(Z, OLD, 1.5),
        strength=lambda s: ops.der(Z, OLD, s),
        at_rest=lambda: ops.der(Z, Z, 1.5),
    ),
    "recency_weighted": Case(
        inputs=(f64(1, seed=13)[0], f64(1, seed=14)[0]),
        call=lambda new, replay: ops.recency_weighted(new, replay, 0.3),
        args=(f64(1, seed=13)[0], f64(1, seed=14)[0], 0.3),
    ),
    "delta_apply": Case(
        inputs=(X, W, B0, A, B),
        call=lambda x, w, b, a, bb: ops.delta_apply(x, w, b, a, bb, 0.5).square().sum(),
        args=(X, W, B0, A, B, 0.5),
        at_rest=lambda: ops.delta_apply(X, W, None, A, 0 * B, 0.5) - X @ W.T,
    ),
    "parameter": Case(
        inputs=(W,),
        call=lambda w: ops.parameter(w, "0.weight", "task1").square().sum(),
        args=(W, "0.weight", "task1"),
    ),
    "maml_step": Case(
        inputs=(W, B0, X),
        call=adapted_loss,
        args=([W, B0], [X, LABELS], REGION, 3, 0.5, True),
    ),
}


def test_every_op_has_a_case() -> None:
    assert set(CASES) == set(OPS)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_opcheck_passes() -> None:
    for name, case in CASES.items():
        result = torch.library.opcheck(getattr(ops, name).default, case.args)
        assert set(result.values()) == {"SUCCESS"}, (name, result)


def test_gradients_agree_with_finite_differences_twice(case: Case) -> None:
    inputs = tuple(t.clone().requires_grad_() for t in case.inputs)
    assert torch.autograd.gradcheck(case.call, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(case.call, inputs)


def test_jvp_agrees_with_finite_differences(case: Case) -> None:
    tangents = tuple(torch.cos(t + 1) for t in case.inputs)
    _, slope = torch.func.jvp(case.call, case.inputs, tangents)
    e = 1e-6
    ahead, behind = (
        case.call(*[t + s * e * d for t, d in zip(case.inputs, tangents, strict=True)])
        for s in (1, -1)
    )
    torch.testing.assert_close(slope, (ahead - behind) / (2 * e), rtol=1e-6, atol=1e-7)


def test_vmap_of_grad_equals_a_loop(case: Case) -> None:
    many = tuple(torch.stack([t, 2 * t, t - 1]) for t in case.inputs)
    where = tuple(range(len(many)))
    got = torch.func.vmap(torch.func.grad(case.call, argnums=where))(*many)
    for i in range(3):
        one = tuple(t[i].clone().requires_grad_() for t in many)
        expected = torch.autograd.grad(case.call(*one), one)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g[i], e)


def test_hessian_is_the_derivative_of_the_gradient(case: Case) -> None:
    first, *rest = case.inputs
    got = torch.func.hessian(lambda t: case.call(t, *rest))(first)
    expected = torch.autograd.functional.hessian(lambda t: case.call(t, *rest), first)
    torch.testing.assert_close(got, expected)


def test_export_keeps_one_node_and_survives_a_round_trip(request: pytest.FixtureRequest) -> None:
    for name, case in CASES.items():

        class Net(nn.Module):
            def __init__(self, call: Callable[..., Tensor]) -> None:
                super().__init__()
                self.call = call

            def forward(self, *inputs: Tensor) -> Tensor:
                return self.call(*inputs)

        program = torch.export.export(Net(case.call), case.inputs)
        targets = [str(n.target) for n in program.graph.nodes]
        assert targets.count(f"tessera.{name}.default") == 1, (name, targets)
        file = io.BytesIO()
        torch.export.save(program, file)
        again = torch.export.load(io.BytesIO(file.getvalue()))
        assert [str(n.target) for n in again.graph.nodes] == targets
        torch.testing.assert_close(again.module()(*case.inputs), case.call(*case.inputs))


def test_the_compiler_takes_it_whole(case: Case) -> None:
    torch.compiler.reset()
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*case.inputs), case.call(*case.inputs))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.strength])
def test_it_is_linear_in_its_strength(name: str) -> None:
    strength = CASES[name].strength
    assert strength is not None
    torch.testing.assert_close(strength(3.0), 3 * strength(1.0))
    assert strength(0.0).item() == 0


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.at_rest])
def test_it_is_zero_at_its_anchor(name: str) -> None:
    at_rest = CASES[name].at_rest
    assert at_rest is not None
    assert at_rest().abs().max().item() < 1e-15


def test_maml_steps_are_the_unrolled_loop_and_first_order_differs() -> None:
    def unrolled(w: Tensor, b: Tensor) -> Tensor:
        params = [w, b]
        for _ in range(3):
            found = torch.autograd.grad(inner_loss(params, [X, LABELS]), params, create_graph=True)
            params = [p - 0.5 * g for p, g in zip(params, found, strict=True)]
        return inner_loss(params, [X + 1, LABELS])

    def first_order(w: Tensor, b: Tensor) -> Tensor:
        new = ops.maml_step([w, b], [X, LABELS], REGION, 3, 0.5, False)
        return inner_loss(new, [X + 1, LABELS])

    leaves = [W.clone().requires_grad_(), B0.clone().requires_grad_()]
    expected = torch.autograd.grad(unrolled(*leaves), leaves)
    got = torch.autograd.grad(adapted_loss(*leaves, X), leaves)
    first = torch.autograd.grad(first_order(*leaves), leaves)
    for e, g, f in zip(expected, got, first, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-14)
        assert (f - e).abs().max() > 1e-3
    assert first_order(*leaves).item() == adapted_loss(*leaves, X).item()


def test_a_delta_for_every_row_is_that_rows_delta() -> None:
    got = ops.delta_apply(X, W, B0, AN, BN, 0.5)
    rows = [ops.delta_apply(X[i : i + 1], W, B0, AN[i], BN[i], 0.5) for i in range(5)]
    torch.testing.assert_close(got, torch.cat(rows))
    deep = ops.delta_apply(X[:, None].expand(5, 2, 4), W, B0, AN, BN, 0.5)
    torch.testing.assert_close(deep, got[:, None].expand(5, 2, 3))


@pytest.mark.parametrize("several", [1, 2])
def test_a_step_with_penalties_compiles_without_a_break(several: int) -> None:
    torch.compiler.reset()
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    anchors = [arch.anchor_from(net, f"t{i}", data=[torch.randn(8, 4)]) for i in range(several)]
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    x, old = torch.randn(5, 4), torch.randn(5, 2)

    def step(x: Tensor) -> Tensor:
        z = net(x)
        return z.sum() + loss.ewc(net, anchors, lam=2.0) + loss.lwf(z, old)

    expected = step(x)
    graphs: list[list[str]] = []

    def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append([str(n.target) for n in gm.graph.nodes])
        return gm.forward

    got = torch.compile(step, backend=look, fullgraph=True)(x)
    torch.testing.assert_close(got, expected)
    assert len(graphs) == 1
    for op in ("tessera.ewc.default", "tessera.lwf.default"):
        assert graphs[0].count(op) == 1, graphs[0]
    expected.backward()
    by_hand = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    torch.compile(step, backend="aot_eager", fullgraph=True)(x).backward()
    for p, g in zip(net.parameters(), by_hand, strict=True):
        torch.testing.assert_close(p.grad, g)

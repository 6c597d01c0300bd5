"""The weighted square: its value at size, its two paths, and who is told of its gradient."""

import gc

import pytest
import torch

from tessera import ops as T
from tessera.ops.kernels import available
from tessera.ops.quadratic import PenaltyTap, forget, is_watched, report, weighted_square


def drawn(n, seed, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_it_is_right_to_1e_6_over_five_million_elements():
    n = 5_000_000
    theta, centre, w = drawn(n, 0), drawn(n, 1), drawn(n, 2).square()
    theta.requires_grad_()
    value = T.weighted_square([theta], [centre], [w])
    gap = theta.detach().double() - centre.double()
    want = 0.5 * (w.double() * gap.square()).sum()
    assert value.dtype == torch.float32
    assert abs(value.item() / want.item() - 1) < 1e-6
    (grad,) = torch.autograd.grad(value, theta)
    torch.testing.assert_close(grad, (w.double() * gap).float(), rtol=1e-6, atol=1e-6)


def test_one_number_may_weigh_all():
    theta, centre = drawn(7, 0, torch.float64).requires_grad_(), drawn(7, 1, torch.float64)
    for w in (3.0, 3):
        value = T.weighted_square([theta], [centre], w)
        torch.testing.assert_close(value, 1.5 * (theta - centre).square().sum())
        (grad,) = torch.autograd.grad(value, theta)
        torch.testing.assert_close(grad, 3 * (theta - centre))


def test_shapes_of_all_kinds_add_up():
    shapes = [(), (1,), (0,), (3, 2), (2, 1, 4), (70_000,)]
    thetas = [torch.ones(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    centres = [torch.zeros_like(t) for t in thetas]
    value = T.weighted_square(thetas, centres, [2 * torch.ones_like(t) for t in thetas])
    assert value.item() == sum(t.numel() for t in thetas)
    grads = torch.autograd.grad(value, thetas)
    assert all(torch.equal(g, torch.full_like(t, 2.0)) for g, t in zip(grads, thetas, strict=True))


def test_a_centre_or_a_weight_of_another_shape_is_never_read_past_its_end():
    """Whether a compiled kernel is at work or not."""
    available(wait_s=60)
    theta = drawn(100_000, 0).requires_grad_()
    full = torch.ones(100_000)
    want = 0.5 * theta.detach().double().sub(1.0).square().sum()
    one = torch.ones(1)
    for centre, w in ((one, full), (full, one), (one, one)):
        value = T.weighted_square([theta], [centre], [w])
        assert value.item() == pytest.approx(want.item(), rel=1e-6)
        (grad,) = torch.autograd.grad(value, theta)
        torch.testing.assert_close(grad, theta.detach() - 1.0)
    with pytest.raises(RuntimeError):
        T.weighted_square([theta], [full[:7]], [full])
    with pytest.raises(ValueError, match="zip"):
        T.weighted_square([theta], [full, full], [full])


def test_memory_may_be_laid_out_in_any_way():
    theta = drawn(12, 0, torch.float64).reshape(3, 4).T.requires_grad_()
    centre = drawn(12, 1, torch.float64).reshape(4, 3)
    value = T.weighted_square([theta], [centre], [centre.square()])
    torch.testing.assert_close(value, 0.5 * (centre.square() * (theta - centre).square()).sum())


def test_the_constant_is_added_to_the_value_and_not_to_the_gradient():
    theta = torch.tensor([2.0], requires_grad=True)
    value = T.weighted_square([theta], [torch.zeros(1)], 1.0, constant=5.0)
    assert value.item() == 7.0
    assert torch.autograd.grad(value, theta)[0].item() == 2.0
    assert (
        torch.func.vmap(lambda t: T.weighted_square([t], [torch.zeros(1)], 1.0, constant=5.0))(
            theta.detach()[None]
        ).item()
        == 7.0
    )


def test_nothing_to_weigh_is_the_constant():
    assert T.weighted_square([], [], 1.0).item() == 0.0
    assert T.weighted_square([], [], [], constant=2.5).item() == 2.5


def test_precisions_may_be_mixed():
    a = torch.ones(3, requires_grad=True)
    b = torch.ones(3, dtype=torch.float64, requires_grad=True)
    c = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    centres = [torch.zeros(3), torch.zeros(3, dtype=torch.float64), torch.zeros(3).bfloat16()]
    value = T.weighted_square([a, b, c], centres, 2.0)
    assert value.item() == 9.0
    grads = torch.autograd.grad(value, [a, b, c])
    assert [g.dtype for g in grads] == [torch.float32, torch.float64, torch.bfloat16]
    assert all((g == 2).all() for g in grads)


def test_half_precision_sums_do_not_stand_still():
    """Ten thousand ones in bfloat16: a running sum would stop at 256."""
    theta = torch.ones(10_000, dtype=torch.bfloat16, requires_grad=True)
    value = T.weighted_square([theta], [torch.zeros_like(theta)], 2.0)
    assert value.item() == pytest.approx(10_000, rel=2**-8)


def test_it_compiles_into_one_graph():
    theta = drawn(8, 0).requires_grad_()
    centre, w = drawn(8, 1), drawn(8, 2).square()

    def penalty(t):
        return T.weighted_square([t, 2 * t], [centre, centre], [w, w], constant=1.0)

    compiled = torch.compile(penalty, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(theta), penalty(theta))
    one, two = (torch.autograd.grad(f(theta), theta)[0] for f in (compiled, penalty))
    torch.testing.assert_close(one, two)


def test_both_paths_agree_on_value_and_gradient():
    theta = drawn(500, 0, torch.float64)
    centre, w = drawn(500, 1, torch.float64), drawn(500, 2, torch.float64).square()

    def penalty(t):
        return T.weighted_square([t], [centre], [w], constant=0.5)

    leaf = theta.clone().requires_grad_()
    value = penalty(leaf)
    grad, transformed = torch.func.grad_and_value(penalty)(theta)
    torch.testing.assert_close(transformed, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(value, leaf)[0], rtol=1e-13, atol=0)


def test_a_weight_changed_between_forward_and_backward_is_an_error():
    """As for any operation of PyTorch: never a silently stale gradient through a second pass."""
    theta = torch.ones(2, requires_grad=True)
    value = T.weighted_square([theta], [torch.zeros(2)], 1.0)
    with torch.no_grad():
        theta.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_the_gradient_belongs_to_the_caller():
    theta, centre = torch.ones(4, requires_grad=True), torch.zeros(4)
    w = torch.full((4,), 2.0)
    value = T.weighted_square([theta], [centre], [w])
    value.backward(retain_graph=True)
    theta.grad.fill_(100.0)
    theta.grad = None
    value.backward()
    assert theta.grad.tolist() == [2.0] * 4
    assert w.tolist() == [2.0] * 4
    assert centre.tolist() == [0.0] * 4


# --- who is told -----------------------------------------------------------------------------


def test_a_tap_hears_what_every_penalty_sends_and_only_that():
    w, v = (torch.ones(2, requires_grad=True) for _ in range(2))
    tap = PenaltyTap([w, v])
    zero = torch.zeros(2)
    value = weighted_square([w], [zero], 3.0) + 0.5 * weighted_square([w, v], [zero, zero], 4.0)
    (value + w.square().sum() * 10).backward()
    heard = tap.take()
    assert heard[0].tolist() == [5.0, 5.0]
    assert heard[1].tolist() == [2.0, 2.0]
    assert w.grad.tolist() == [25.0, 25.0]
    assert tap.take() == [None, None]


def test_a_tap_keeps_its_own_copy():
    w = torch.ones(2, requires_grad=True)
    tap = PenaltyTap([w])
    weighted_square([w], [torch.zeros(2)], 3.0).backward()
    w.grad.zero_()
    assert tap.take()[0].tolist() == [3.0, 3.0]


def test_the_newest_tap_listens_and_a_dropped_one_is_gone():
    w = torch.ones(2, requires_grad=True)
    old = PenaltyTap([w])
    new = PenaltyTap([w])
    report([w], [torch.ones(2)])
    assert old.take() == [None]
    assert new.take()[0].tolist() == [1.0, 1.0]
    del old
    gc.collect()
    assert is_watched(w)  # the old one's end does not end the new one's watch
    del new
    gc.collect()
    assert not is_watched(w)


def test_what_was_heard_can_be_forgotten_for_some():
    w, v = (torch.ones(1, requires_grad=True) for _ in range(2))
    tap = PenaltyTap([w, v])
    report([w, v], [torch.ones(1), torch.ones(1)])
    report([v], [None])
    forget([w, torch.ones(1)])
    heard = tap.take()
    assert heard[0] is None
    assert heard[1].item() == 1.0

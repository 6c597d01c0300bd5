"""CG and the Neumann series: against a direct solve, and in how they end."""

from __future__ import annotations

import math

import pytest
import torch

from tessera.errors import NonFiniteError
from tessera.meta.solvers import SOLVERS, conjugate_gradient, neumann


def spectrum(values, dtype=torch.float64):
    """A symmetric matrix with these eigenvalues, as dense numbers and as an operator on a pair."""
    n = len(values)
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    A = (Q * torch.tensor(values, dtype=torch.float64)) @ Q.T
    A = A.to(dtype)
    b = torch.randn(n, generator=g, dtype=torch.float64).to(dtype)

    def operator(v):
        whole = A @ torch.cat([t.reshape(-1) for t in v])
        return [whole[:2].reshape(1, 2), whole[2:]]

    return A, [b[:2].reshape(1, 2), b[2:]], operator, Q


def flat(v):
    return torch.cat([t.reshape(-1) for t in v])


@pytest.mark.parametrize("name", SOLVERS)
def test_they_solve_and_leave_the_right_hand_side(name):
    A, b, operator, _ = spectrum([1.0, 1.5, 2.0, 3.0, 4.0])
    before = flat(b).clone()
    found = SOLVERS[name](operator, b, tol=1e-12, max_iter=400)
    torch.testing.assert_close(flat(found.x), torch.linalg.solve(A, before), rtol=1e-10, atol=1e-11)
    assert found.converged
    assert torch.equal(flat(b), before)
    assert [t.shape for t in found.x] == [t.shape for t in b]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("tol", [1e-1, 1e-4])
def test_the_residual_is_that_of_the_result(name, tol):
    A, b, operator, _ = spectrum([1.0, 2.0, 5.0, 9.0])
    found = SOLVERS[name](operator, b, tol=tol, max_iter=500)
    true = (flat(b) - A @ flat(found.x)).norm() / flat(b).norm()
    assert math.isclose(found.residual, true.item(), rel_tol=1e-9)
    assert found.residual <= tol
    cut = SOLVERS[name](operator, b, tol=1e-14, max_iter=2)
    true = (flat(b) - A @ flat(cut.x)).norm() / flat(b).norm()
    assert (cut.stopped, cut.iterations) == ("max_iter", 2)
    assert math.isclose(cut.residual, true.item(), rel_tol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_damping_is_a_shift_of_the_diagonal(name):
    A, b, operator, _ = spectrum([0.0, 0.0, 1.0, 2.0])
    found = SOLVERS[name](operator, b, tol=1e-12, max_iter=400, damping=0.5)
    shifted = A + 0.5 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(flat(found.x), torch.linalg.solve(shifted, flat(b)))


def test_cg_ends_after_as_many_steps_as_there_are_eigenvalues():
    _, b, operator, _ = spectrum([1.0, 1.0, 7.0, 7.0, 7.0, 50.0])
    assert conjugate_gradient(operator, b, tol=1e-10, max_iter=100).iterations == 3


@pytest.mark.parametrize("name", SOLVERS)
def test_negative_curvature_ends_with_the_best_iterate_so_far(name):
    A, _, operator, Q = spectrum([-1.0, 2.0, 3.0, 4.0])
    # Mostly along the positive directions, so that some steps come before it shows.
    whole = Q @ torch.tensor([1e-3, 1.0, 1.0, 1.0], dtype=torch.float64)
    b = [whole[:2].reshape(1, 2), whole[2:]]
    found = SOLVERS[name](operator, b, tol=1e-12, max_iter=500)
    assert found.stopped == "negative curvature"
    assert found.iterations > 0
    assert 0 < found.residual < 1
    true = (whole - A @ flat(found.x)).norm() / whole.norm()
    assert math.isclose(found.residual, true.item(), rel_tol=1e-9)
    at_once = SOLVERS[name](lambda v: [-t for t in v], b, tol=1e-3, max_iter=9)
    assert (at_once.iterations, at_once.residual) == (0, 1.0)
    assert not flat(at_once.x).any()


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_says_so_when_the_tolerance_is_beyond_it(name):
    A, b, operator, _ = spectrum([1.0, 3.0, 7.0, 20.0], torch.float32)
    found = SOLVERS[name](operator, b, tol=1e-12, max_iter=2000)
    true = (flat(b).double() - A.double() @ flat(found.x).double()).norm() / flat(b).double().norm()
    assert found.stopped == "rounding"
    assert true < 1e-4
    assert found.residual > 1e-12


def test_neumann_takes_back_a_step_that_was_too_long():
    # The first residual barely sees the largest eigenvalue: 1 / |A r| is far above 2 / |A|.
    _, _, operator, Q = spectrum([1.0, 1.0, 1.0, 100.0])
    whole = Q @ torch.tensor([1.0, 1.0, 1.0, 1e-9], dtype=torch.float64)
    found = neumann(operator, [whole[:2].reshape(1, 2), whole[2:]], tol=1e-6, max_iter=5000)
    assert found.converged


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_on_the_right_and_the_same_bits_twice(name):
    _, b, operator, _ = spectrum([1.0, 2.0, 5.0, 9.0])
    zero = SOLVERS[name](operator, [torch.zeros_like(t) for t in b], tol=1e-3, max_iter=9)
    assert (zero.iterations, zero.residual, zero.converged) == (0, 0.0, True)
    one, two = (SOLVERS[name](operator, b, tol=1e-6, max_iter=99) for _ in range(2))
    assert torch.equal(flat(one.x), flat(two.x))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_product_that_is_not_finite(name):
    with pytest.raises(NonFiniteError, match="iteration 1 is NaN"):
        SOLVERS[name](lambda v: [t * torch.nan for t in v], [torch.ones(2)], tol=0.1, max_iter=3)

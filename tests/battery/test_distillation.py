"""Laws of the losses that match one answer to another: `lwf`, `der`, `kl_divergence`."""

import math

import pytest
import torch
import torch.nn.functional as F

from tessera import loss
from tessera import ops as T
from tessera.errors import InputError


def kl_of_logits(z, target):
    return loss.kl_divergence(T.log_softmax(z), T.softmax(target))


LOSSES = {
    "lwf": lambda z, target: loss.lwf(z, target, T=3.0, lam=0.7),
    "der": lambda z, target: loss.der(z, target, alpha=0.7),
    "kl_divergence": kl_of_logits,
}


def logits(seed, *shape, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape or (6, 4), generator=g, dtype=torch.float64)


every = pytest.mark.parametrize("fn", LOSSES.values(), ids=LOSSES)


@every
def test_it_is_zero_where_the_two_agree_and_positive_elsewhere(fn):
    z = logits(0)
    assert abs(fn(z, z.clone()).item()) < 1e-15
    for seed in range(1, 9):
        assert fn(z, logits(seed)) > 0


@every
def test_its_gradient_is_right_by_finite_differences(fn):
    target = logits(1)
    z = logits(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: fn(a, target), z)
    assert torch.autograd.gradgradcheck(lambda a: fn(a, target), z)


@every
def test_no_gradient_reaches_the_target(fn):
    z, target = logits(0).requires_grad_(), logits(1).requires_grad_()
    fn(z, target).backward()
    assert z.grad.any()
    assert target.grad is None


@every
def test_an_empty_batch_asks_for_nothing(fn):
    z = torch.zeros(0, 4, requires_grad=True)
    value = fn(z, torch.zeros(0, 4))
    assert value.shape == ()
    assert value.item() == 0.0
    value.backward()
    assert z.grad.shape == (0, 4)


@every
def test_it_is_a_mean_over_the_batch(fn):
    z, target = logits(0), logits(1)
    each = torch.stack([fn(z[i : i + 1], target[i : i + 1]) for i in range(len(z))])
    torch.testing.assert_close(fn(z, target), each.mean(), rtol=1e-12, atol=0)


@every
def test_shapes_that_differ_are_refused(fn):
    with pytest.raises(InputError, match=r"of one shape, got \(6, 4\) and \(6, 1\)"):
        fn(logits(0), logits(1, 6, 1))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_kl_is_what_the_definition_says(scale):
    p, q = T.softmax(logits(0, scale=scale)), T.softmax(logits(1, scale=scale))
    want = (q * (q.log() - p.log())).sum(1).mean()
    torch.testing.assert_close(loss.kl_divergence(p.log(), q), want, rtol=1e-12, atol=0)


def test_kl_bears_a_target_that_is_certain():
    q = torch.tensor([[1.0, 0.0, 0.0]])
    z = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    value = loss.kl_divergence(T.log_softmax(z), q)
    torch.testing.assert_close(value, F.cross_entropy(z, torch.tensor([0])))
    value.backward()
    assert torch.isfinite(z.grad).all()


def test_lwf_is_the_scaled_divergence_of_softened_answers():
    z, target = logits(0), logits(1)
    for temperature, lam in ((1.0, 1.0), (2.0, 1.0), (4.0, 0.3)):
        p, q = (z / temperature).softmax(1), (target / temperature).softmax(1)
        want = lam * temperature**2 * (q * (q.log() - p.log())).sum(1).mean()
        got = loss.lwf(z, target, T=temperature, lam=lam)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert loss.lwf(z, target) == loss.lwf(z, target, T=2.0, lam=1.0)


def test_the_gradient_of_lwf_does_not_depend_on_the_temperature_to_first_order():
    """(softmax(z/T) - softmax(t/T)) T / n tends to the centred difference of logits over nC."""
    z, target = logits(0, scale=1.0).requires_grad_(), logits(1, scale=1.0)
    gap = z.detach() - target
    limit = (gap - gap.mean(1, keepdim=True)) / gap.numel()

    def gradient(temperature):
        return torch.autograd.grad(loss.lwf(z, target, T=temperature), z)[0]

    off = {t: ((gradient(t) - limit).norm() / limit.norm()).item() for t in (10.0, 20.0, 40.0)}
    assert off[10.0] < 0.2
    assert off[20.0] == pytest.approx(off[10.0] / 2, rel=0.2)  # what is left falls like 1/T
    assert off[40.0] == pytest.approx(off[20.0] / 2, rel=0.1)
    # Without T^2, as elsewhere in the field, it would fall like 1/T^2.
    assert (gradient(20.0) / 400).norm() < 0.01 * gradient(10.0).norm()


def test_der_is_a_mean_over_elements():
    z, target = logits(0), logits(1)
    want = 0.5 * (z - target).square().sum() / 24
    torch.testing.assert_close(loss.der(z, target, alpha=0.5), want, rtol=1e-12, atol=0)


def test_der_takes_stored_logits_of_another_precision():
    z, target = logits(0).float(), logits(1).half()
    value = loss.der(z, target, alpha=1.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, (z - target.float()).square().mean())


def test_bad_strengths_and_temperatures_are_refused():
    z = logits(0)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=r"loss\.lwf needs a finite lam >= 0"):
            loss.lwf(z, z, lam=bad)
        with pytest.raises(InputError, match=r"loss\.der needs a finite alpha >= 0"):
            loss.der(z, z, alpha=bad)
    for bad in (0.0, -2.0, math.nan, math.inf):
        with pytest.raises(InputError, match=r"loss\.lwf needs a .*temperature T > 0, got"):
            loss.lwf(z, z, T=bad)

"""Laws that every penalty around an anchor obeys.

A penalty is any public function of `tessera.loss` whose first two parameters are `model` and
`anchor`; its strength is its one keyword-only parameter. A new one is picked up with no edit.
Every law also meets a mutant that breaks it.
"""

import inspect
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tessera import arch, loss
from tessera.arch import Anchor
from tessera.errors import AnchorError, InputError


def discover(module):
    found = {}
    for name in module.__all__:
        parameters = inspect.signature(getattr(module, name)).parameters
        if list(parameters)[:2] == ["model", "anchor"]:
            (strength,) = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
            found[name] = (getattr(module, name), strength)
    return found


# PyTorch's forward AD loads its own TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is dep:DeprecationWarning")

PENALTIES = discover(loss)
SHAPES = {"0.weight": (3, 2), "0.bias": (3,), "2.weight": (2, 3), "2.bias": (2,)}


def made(seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(s, generator=g, dtype=torch.float64) for n, s in SHAPES.items()}


def net(params):
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    model.load_state_dict(params)
    return model


def importance(seed):
    return {n: t.square() for n, t in made(seed).items()}


def anchor_at(params, name="t0", **stats):
    return Anchor(name, params, {"fisher": importance(5), "path_integral": importance(6), **stats})


class At(nn.Module):
    """`penalty(model, anchor, strength)` as a function of the model's parameters."""

    def __init__(self, penalty, model, anchor, strength=1.7):
        super().__init__()
        self.model = model
        self._value = lambda: penalty(model, anchor, strength)

    def forward(self):
        return self._value()

    def of(self, *tensors):
        names = [f"model.{n}" for n in SHAPES]
        return functional_call(self, dict(zip(names, tensors, strict=True)), ())


def grads_of(value, model):
    return torch.autograd.grad(value, list(model.parameters()), allow_unused=True)


# --- the laws: functions of penalty(model, anchor, strength) ------------------------------------


def zero_dimensional(penalty):
    value = penalty(net(made(1)), anchor_at(made(2)), 1.0)
    assert value.shape == ()
    assert value.dtype == torch.float64


def positive(penalty):
    for seed in range(10, 20):
        assert penalty(net(made(seed)), anchor_at(made(2)), 1.0) > 0


def exactly_zero_at_its_anchor(penalty):
    for seed in range(10, 14):
        for dtype in (torch.float32, torch.float64):
            model = net(made(seed)).to(dtype)
            here = {n: p.detach().clone() for n, p in model.named_parameters()}
            weights = {n: w.to(dtype) for n, w in importance(5).items()}
            anchor = Anchor("t0", here, {"fisher": weights, "path_integral": weights})
            value = penalty(model, anchor, 3.0)
            assert value.item() == 0.0
            assert all(g is None or not g.any() for g in grads_of(value, model))


def linear_in_its_strength(penalty):
    model, anchor = net(made(1)), anchor_at(made(2))
    one = penalty(model, anchor, 1.0)
    for k in (0.25, 3.0, 1e6):
        value = penalty(model, anchor, k)
        torch.testing.assert_close(value, k * one, rtol=1e-13, atol=0)
        for a, b in zip(grads_of(value, model), grads_of(one, model), strict=True):
            torch.testing.assert_close(a, k * b, rtol=1e-13, atol=0)
        one = penalty(model, anchor, 1.0)


def nothing_at_strength_zero(penalty):
    model = net(made(1))
    value = penalty(model, anchor_at(made(2)), 0.0)
    assert value.item() == 0.0
    assert all(g is None or not g.any() for g in grads_of(value, model))


def gradient_by_finite_differences(penalty):
    at = At(penalty, net(made(1)), anchor_at(made(2)))
    inputs = [t.requires_grad_() for t in made(1).values()]
    assert torch.autograd.gradcheck(at.of, inputs)
    assert torch.autograd.gradgradcheck(at.of, inputs)


def gradient_scaled_and_kept(penalty):
    """Through a later factor, and twice through one graph."""
    model = net(made(1))
    value = penalty(model, anchor_at(made(2)), 1.0)
    params = list(model.parameters())
    once = torch.autograd.grad(value, params, retain_graph=True)
    again = torch.autograd.grad(-2.5 * value, params)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(b, -2.5 * a, rtol=1e-13, atol=0)


def no_gradient_into_the_anchor(penalty):
    stats = {"fisher": importance(5), "path_integral": importance(6)}
    params = made(2)
    tensors = [*params.values(), *stats["fisher"].values(), *stats["path_integral"].values()]
    for t in tensors:
        t.requires_grad_()
    model = net(made(1))
    penalty(model, Anchor("t0", params, stats), 1.0).backward()
    grads = torch.autograd.grad(
        penalty(model, Anchor("t0", params, stats), 1.0),
        list(model.parameters()),
        create_graph=True,
    )
    sum(g.square().sum() for g in grads).backward()
    assert all(t.grad is None for t in tensors)
    assert any(p.grad is not None for p in model.parameters())

    def value(*some):
        return At(penalty, model, Anchor("t0", params, stats)).of(*some)

    torch.func.grad(lambda w: value(w, *list(made(1).values())[1:]))(made(1)["0.weight"])
    assert all(t.grad is None for t in tensors)


def refuses_the_anchor_of_another_model(penalty):
    model = net(made(1))
    for params in (
        {**made(2), "extra": torch.zeros(2, dtype=torch.float64)},
        {**made(2), "0.weight": torch.zeros(3, 3, dtype=torch.float64)},
    ):
        ones = {n: torch.ones_like(t) for n, t in params.items()}
        foreign = Anchor("far", params, {"fisher": ones, "path_integral": ones})
        for _ in range(2):  # a cache must not let the second call pass
            with pytest.raises(AnchorError, match="anchor 'far' is of another model"):
                penalty(model, foreign, 1.0)


def refuses_a_bad_strength(penalty):
    for bad in (-1.0, -1e-30, math.nan, math.inf, -math.inf):
        with pytest.raises(InputError, match=r"needs a finite .* >= 0, got"):
            penalty(net(made(1)), anchor_at(made(2)), bad)


def same_through_torch_func(penalty):
    at = At(penalty, net(made(1)), anchor_at(made(2)))
    theta = tuple(made(1).values())
    places = tuple(range(len(theta)))
    leaves = [t.clone().requires_grad_() for t in theta]
    value = at.of(*leaves)
    want = torch.autograd.grad(value, leaves, create_graph=True)
    torch.testing.assert_close(at(), value, rtol=1e-13, atol=0)  # without functional_call

    for got, g in zip(torch.func.grad(at.of, places)(*theta), want, strict=True):
        torch.testing.assert_close(got, g, rtol=1e-13, atol=1e-15)

    tangent = tuple(made(9).values())
    slope = sum((g * t).sum() for g, t in zip(want, tangent, strict=True))
    primal, forward = torch.func.jvp(at.of, theta, tangent)
    torch.testing.assert_close(primal, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(forward, slope, rtol=1e-12, atol=0)

    several = [made(seed) for seed in (1, 2, 3)]
    stacked = [torch.stack([m[n] for m in several]) for n in SHAPES]
    each = torch.stack([at.of(*m.values()) for m in several])
    torch.testing.assert_close(torch.func.vmap(at.of)(*stacked), each, rtol=1e-13, atol=0)
    per_model = torch.func.vmap(torch.func.grad(at.of))(*stacked)
    torch.testing.assert_close(per_model[0], torch.func.grad(at.of)(*theta), rtol=1e-13, atol=0)

    curvature = torch.func.hessian(at.of)(*theta).reshape(6, 6)
    rows = [torch.autograd.grad(w, leaves[0], retain_graph=True)[0] for w in want[0].reshape(-1)]
    torch.testing.assert_close(curvature, torch.stack(rows).reshape(6, 6), rtol=1e-12, atol=1e-15)
    assert curvature.diagonal().min() > 0


def same_under_forward_mode(penalty):
    at = At(penalty, net(made(1)), anchor_at(made(2)))
    theta, tangent = made(1), made(9)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(theta[n], tangent[n]) for n in SHAPES]
        got = torch.autograd.forward_ad.unpack_dual(at.of(*duals)).tangent
    grads = torch.func.grad(at.of, tuple(range(4)))(*theta.values())
    slope = sum((g * t).sum() for g, t in zip(grads, tangent.values(), strict=True))
    torch.testing.assert_close(got, slope, rtol=1e-12, atol=0)


def leaves_unnamed_weights_free(penalty):
    """A head that came after the anchor pays nothing and gets no gradient."""
    known = {n: t for n, t in made(2).items() if n.startswith("0.")}
    kept = {n: t for n, t in importance(5).items() if n in known}
    anchor = Anchor("t0", known, {"fisher": kept, "path_integral": kept})
    model = net(made(1))
    value = penalty(model, anchor, 1.0)
    grads = dict(zip(SHAPES, grads_of(value, model), strict=True))
    assert grads["2.weight"] is None
    assert grads["0.weight"].any()
    with torch.no_grad():
        model[2].weight.add_(7.0)
    assert torch.equal(penalty(model, anchor, 1.0), value)


def respects_frozen_weights(penalty):
    model = net(made(1))
    value = penalty(model, anchor_at(made(2)), 1.0)
    model[0].weight.requires_grad_(False)
    frozen = penalty(model, anchor_at(made(2)), 1.0)
    torch.testing.assert_close(frozen, value, rtol=1e-13, atol=0)
    frozen.backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad.any()


def changes_nothing_but_gradients(penalty):
    params, model = made(2), net(made(1))
    anchor = anchor_at({n: t.clone() for n, t in params.items()})
    penalty(model, anchor, 2.0).backward()
    assert all(torch.equal(anchor.params[n], params[n]) for n in SHAPES)
    assert all(torch.equal(anchor.fisher[n], importance(5)[n]) for n in SHAPES)
    assert all(torch.equal(p, made(1)[n]) for n, p in model.named_parameters())
    g = [p.grad.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad.add_(100.0)  # the optimizer may use the memory as it likes
    again = penalty(model, anchor, 2.0)
    assert all(map(torch.equal, g, grads_of(again, model)))


LAWS = [
    zero_dimensional,
    positive,
    exactly_zero_at_its_anchor,
    linear_in_its_strength,
    nothing_at_strength_zero,
    gradient_by_finite_differences,
    gradient_scaled_and_kept,
    no_gradient_into_the_anchor,
    refuses_the_anchor_of_another_model,
    refuses_a_bad_strength,
    same_through_torch_func,
    same_under_forward_mode,
    leaves_unnamed_weights_free,
    respects_frozen_weights,
    changes_nothing_but_gradients,
]


def called(name):
    fn, strength = PENALTIES[name]
    return lambda model, anchor, value: fn(model, anchor, **{strength: value})


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_obeys(name, law):
    law(called(name))


def test_the_battery_finds_the_penalties_of_today():
    strengths = {name: strength for name, (_, strength) in PENALTIES.items()}
    assert strengths.items() >= {"ewc": "lam", "l2sp": "lam", "si": "c"}.items()


@pytest.mark.parametrize("name", ["ewc", "si"])
def test_a_penalty_without_its_importance_says_how_to_get_it(name):
    with pytest.raises(AnchorError, match=r"anchor 'bare' has none\. (Make it|Train) with"):
        called(name)(net(made(1)), Anchor("bare", made(2)), 1.0)


# --- every law can fail -------------------------------------------------------------------------


def plain(model, anchor, strength):
    """A right penalty, written plainly; each mutant below spoils it in one way."""
    if not 0 <= strength < math.inf:
        raise InputError(f"plain needs a finite strength >= 0, got {strength}")
    current = dict(model.named_parameters())
    arch.anchor.require_fit(anchor, current)
    terms = [
        (anchor.fisher[n].detach() * (current[n] - c.detach()).square()).sum()
        for n, c in anchor.params.items()
    ]
    return 0.5 * strength * torch.stack(terms).sum()


def leaking(model, anchor, strength):
    current = dict(model.named_parameters())
    return sum(
        (anchor.fisher[n] * (current[n] - c).square()).sum() for n, c in anchor.params.items()
    )


class Opaque(torch.autograd.Function):
    """A value whose gradient is right to first order only, and unknown to torch.func."""

    @staticmethod
    def forward(ctx, strength, anchor, names, *params):
        gaps = [p - anchor.params[n] for n, p in zip(names, params, strict=True)]
        ctx.pulls = [strength * anchor.fisher[n] * g for n, g in zip(names, gaps, strict=True)]
        return 0.5 * sum((g * h).sum() for g, h in zip(gaps, ctx.pulls, strict=True))

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, *[grad * g for g in ctx.pulls]


class Stingy(Opaque):
    """Forgets the factor that comes from above."""

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, *ctx.pulls


def by(function):
    def penalty(model, anchor, strength):
        names, params = zip(*model.named_parameters(), strict=True)
        return function.apply(strength, anchor, names, *params)

    return penalty


def wearing_out(model, anchor, strength):
    value = plain(model, anchor, strength)
    anchor.fisher["0.bias"].mul_(1 - 1e-12)
    return value


def all_weights(model, anchor, strength):
    return plain(model, anchor, strength) + strength * model[2].weight.square().sum()


def detached(model, anchor, strength):
    frozen = any(not p.requires_grad for p in model.parameters())
    return plain(model, anchor, strength) * (0 if frozen else 1)


MUTANTS = {
    zero_dimensional: lambda m, a, s: plain(m, a, s).reshape(1),
    positive: lambda m, a, s: -plain(m, a, s),
    exactly_zero_at_its_anchor: lambda m, a, s: plain(m, a, s) + 1e-12 * s,
    linear_in_its_strength: lambda m, a, s: plain(m, a, s) * s,
    nothing_at_strength_zero: lambda m, a, s: plain(m, a, max(s, 1e-3)),
    gradient_by_finite_differences: by(Opaque),
    gradient_scaled_and_kept: by(Stingy),
    no_gradient_into_the_anchor: leaking,
    refuses_the_anchor_of_another_model: lambda m, a, s: sum(
        p.square().sum() for p in m.parameters()
    ),
    refuses_a_bad_strength: lambda m, a, s: plain(
        m, a, abs(s) if s == s and s != math.inf else 1.0
    ),
    same_through_torch_func: by(Opaque),
    same_under_forward_mode: by(Opaque),
    leaves_unnamed_weights_free: all_weights,
    respects_frozen_weights: detached,
    changes_nothing_but_gradients: wearing_out,
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_every_law_catches_a_mutant(law):
    law(plain)  # the laws ask for nothing a right penalty lacks
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        law(MUTANTS[law])

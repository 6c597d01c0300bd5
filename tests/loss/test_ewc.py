"""EWC by hand, several anchors as one, and the cache behind that."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from tessera import loss
from tessera.arch import Anchor
from tessera.arch.merge import merged
from tessera.errors import AnchorError

NAMES = ("weight", "bias")


def lin(dtype=torch.float64, fill=0.0):
    model = nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(2, 3) + fill)
        model.bias.fill_(fill)
    return model


def drawn(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = {"weight": (2, 3), "bias": (2,)}
    return {n: torch.randn(s, generator=g, dtype=dtype) for n, s in shapes.items()}


def anchor(seed, names=NAMES, zeros=False, dtype=torch.float64, name=None):
    params = {n: t for n, t in drawn(seed, dtype).items() if n in names}
    fisher = {n: t.square() for n, t in drawn(seed + 100, dtype).items() if n in names}
    if zeros:
        for f in fisher.values():
            f.flatten()[:: seed % 2 + 1] = 0.0
    return Anchor(name or f"t{seed}", params, {"fisher": fisher})


def by_hand(model, anchors, lam):
    """Python numbers only."""
    total = 0.0
    for a in anchors:
        for n, f in a.fisher.items():
            now, then = dict(model.named_parameters())[n].flatten(), a.params[n].flatten()
            for w, x, y in zip(f.flatten().tolist(), now.tolist(), then.tolist(), strict=True):
                total += 0.5 * lam * w * (x - y) ** 2
    return total


def gradients(value, model):
    return torch.autograd.grad(value, list(model.parameters()), allow_unused=True)


def test_ewc_is_half_lambda_times_the_weighted_squares():
    model = lin()
    assert loss.ewc(model, anchor(1), lam=3.0).item() == pytest.approx(
        by_hand(model, [anchor(1)], 3.0), rel=1e-13
    )


def test_the_gradient_of_ewc_is_lambda_f_times_the_gap():
    model, a = lin(), anchor(1)
    grads = gradients(loss.ewc(model, a, lam=3.0), model)
    for n, p, g in zip(NAMES, model.parameters(), grads, strict=True):
        torch.testing.assert_close(g, 3.0 * a.fisher[n] * (p - a.params[n]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("lam", [1.0, 250.0])
def test_several_anchors_are_the_sum_of_their_penalties(lam, zeros):
    model = lin()
    anchors = [
        anchor(1, zeros=zeros),
        anchor(2, names=("weight",), zeros=zeros),
        anchor(3, names=("bias",)),
        anchor(4, zeros=zeros),
    ]
    together = loss.ewc(model, anchors, lam=lam)
    apart = sum(loss.ewc(model, a, lam=lam) for a in anchors)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=0)
    assert together.item() == pytest.approx(by_hand(model, anchors, lam), rel=1e-12)
    for a, b in zip(gradients(together, model), gradients(apart, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_disjoint_anchors_each_hold_their_own():
    model = lin()
    for fit in (("weight",), ("bias",)):
        grads = dict(
            zip(NAMES, gradients(loss.ewc(model, anchor(1, fit), lam=1.0), model), strict=True)
        )
        assert {n for n, g in grads.items() if g is not None} == set(fit)
    both = [anchor(1, ("weight",)), anchor(2, ("bias",))]
    assert loss.ewc(model, both, lam=2.0).item() == pytest.approx(by_hand(model, both, 2.0))


def test_a_weight_that_matters_to_nobody_is_free():
    a, b = anchor(1), anchor(2)
    for x in (a, b):
        x.fisher["weight"][0, 0] = 0.0
    model = lin()
    value = loss.ewc(model, [a, b], lam=5.0)
    assert gradients(value, model)[0][0, 0] == 0
    assert math.isfinite(value.item())
    with torch.no_grad():
        model.weight[0, 0] = 1e9
    torch.testing.assert_close(loss.ewc(model, [a, b], lam=5.0), value, rtol=1e-13, atol=0)


def test_several_anchors_keep_their_precision_in_float32():
    """The merged form must not cancel: the centre is near, the anchors are far from zero."""
    model = lin(torch.float32, fill=1000.0)
    anchors = []
    for seed in range(5):
        params = {
            n: p.detach() + 1e-2 * drawn(seed, torch.float32)[n]
            for n, p in model.named_parameters()
        }
        anchors.append(Anchor(f"t{seed}", params, {"fisher": anchor(seed).fisher}))
        for n in NAMES:
            anchors[-1].stats["fisher"][n] = anchors[-1].stats["fisher"][n].float()
    got = loss.ewc(model, anchors, lam=10.0)
    want = by_hand(model, anchors, 10.0)
    # One rounding of a centre at 1000 is 0.3 % of the gap: what float32 can hold at all.
    assert got.item() == pytest.approx(want, rel=5e-3)


def test_five_anchors_cost_one_quadratic():
    model, anchors = lin(), [anchor(k) for k in range(5)]
    current = dict(model.named_parameters())
    q = merged(tuple(anchors), current, who="t")
    assert set(q.centres) == set(NAMES)
    assert merged(tuple(anchors), current, who="t") is q


def test_no_anchor_is_no_penalty():
    value = loss.ewc(lin(), [], lam=1.0)
    assert value.shape == ()
    assert value.item() == 0.0
    (value + lin().weight.sum()).backward()


def test_any_sequence_of_anchors_will_do():
    model, a, b = lin(), anchor(1), anchor(2)
    want = loss.ewc(model, [a, b], lam=1.0)
    assert loss.ewc(model, (a, b), lam=1.0) == want
    assert loss.ewc(model, {"x": a, "y": b}.values(), lam=1.0) == want


def test_what_is_no_anchor_is_refused():
    with pytest.raises(AnchorError, match=r"loss\.ewc needs anchors made by .*, got str"):
        loss.ewc(lin(), ["task1"], lam=1.0)
    with pytest.raises(AnchorError, match=r"loss\.ewc needs anchors made by .*, got NoneType"):
        loss.ewc(lin(), None, lam=1.0)


def test_one_anchor_without_a_fisher_among_several_is_named():
    bare = Anchor("bare", drawn(1))
    with pytest.raises(AnchorError, match=r"anchor 'bare' has none.*loss\.l2sp"):
        loss.ewc(lin(), [anchor(1), bare], lam=1.0)


# --- the cache --------------------------------------------------------------------------------


def test_every_change_of_the_list_or_of_lambda_counts():
    model, a, b, c = lin(), anchor(1), anchor(2), anchor(3)
    calls = [([a, b], 1.0), ([a, b], 2.0), ([b], 2.0), ([c, b], 2.0), ([a, c, b], 2.0)]
    calls += [([a, b], 1.0), ([b, a], 1.0), ([b, b], 1.0), ([a], 1.0), ([b], 0.0)]
    for several, lam in calls * 2:
        got = loss.ewc(model, several, lam=lam).item()
        assert got == pytest.approx(by_hand(model, several, lam), rel=1e-12), (several, lam)


def test_the_same_list_grown_in_place_counts():
    model, several = lin(), [anchor(1)]
    for seed in (2, 3, 4):
        got = loss.ewc(model, several, lam=1.0).item()
        assert got == pytest.approx(by_hand(model, several, 1.0), rel=1e-12)
        several.append(anchor(seed))


def test_an_anchor_whose_neighbour_was_replaced_is_merged_again():
    """A new anchor may sit at the address of a dropped one."""
    model, last = lin(), anchor(9)
    for seed in range(1, 6):
        first = anchor(seed)
        got = loss.ewc(model, [first, last], lam=1.0).item()
        assert got == pytest.approx(by_hand(model, [first, last], 1.0), rel=1e-12)
        del first


def test_one_set_of_anchors_serves_two_models():
    a, b, several = lin(), lin(fill=2.0), [anchor(1), anchor(2)]
    for _ in range(2):
        for model in (a, b):
            got = loss.ewc(model, several, lam=1.0).item()
            assert got == pytest.approx(by_hand(model, several, 1.0), rel=1e-12)


def test_dropping_the_anchors_drops_the_sums():
    model, several = lin(), [anchor(1), anchor(2)]
    loss.ewc(model, several, lam=1.0)
    q = merged(tuple(several), dict(model.named_parameters()), who="t")
    gone = [*map(weakref.ref, several), *map(weakref.ref, q.weights(1.0))]
    del q, several
    gc.collect()
    assert [r() for r in gone] == [None] * len(gone)


def test_an_older_anchor_is_not_kept_alive_by_the_newest():
    model, old, new = lin(), anchor(1), anchor(2)
    loss.ewc(model, [old, new], lam=1.0)
    gone = weakref.ref(old)
    del old
    gc.collect()
    assert gone() is None
    assert loss.ewc(model, new, lam=1.0).item() == pytest.approx(by_hand(model, [new], 1.0))


def test_l2sp_is_ewc_with_every_importance_one():
    model, params = lin(), drawn(1)
    ones = {n: torch.ones_like(t) for n, t in params.items()}
    a = Anchor("a", params, {"fisher": ones})
    torch.testing.assert_close(
        loss.l2sp(model, a, lam=3.0), loss.ewc(model, a, lam=3.0), rtol=1e-14, atol=0
    )


def test_si_is_c_times_omega_times_the_squares_without_a_half():
    model, params = lin(), drawn(1)
    omega = {n: t.square() for n, t in drawn(2).items()}
    got = loss.si(model, Anchor("a", params, {"path_integral": omega}), c=0.3)
    want = 0.3 * sum(
        (omega[n] * (p - params[n]).square()).sum() for n, p in model.named_parameters()
    )
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)

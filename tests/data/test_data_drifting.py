"""Drifting streams: a row depends on its place alone, labels follow River's rules."""

import math

import numpy as np
import pytest
import torch
from river.datasets import synth

from tessera.data.drifting import bernoulli, hyperplane, sea, stagger
from tessera.errors import InputError

STREAMS = {
    "sea": lambda n, **k: sea(n, drifts=[4, 9], width=6.0, **k),
    "sea, abrupt": lambda n, **k: sea(n, drifts=[4, 9], **k),
    "stagger": lambda n, **k: stagger(n, drifts=[4, 9], width=6.0, noise=0.2, **k),
    "hyperplane": lambda n, **k: hyperplane(n, features=7, period=20.0, noise=0.2, **k),
    "bernoulli": lambda n, **k: (bernoulli(n, drifts=[4, 9], width=6.0, **k),),
}


def tail(k, n, p):
    """P(at least k of n) for k above the mean, else P(at most k)."""
    law = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)]
    return sum(law[k:]) if k > n * p else sum(law[: k + 1])


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_slice_of_the_stream_is_the_stream_of_the_slice(stream):
    whole = stream(40, seed=3)
    for start, n in ((5, 10), (0, 40), (39, 1), (7, 0)):
        for part, all_of_it in zip(stream(n, start=start, seed=3), whole, strict=True):
            assert part.dtype == all_of_it.dtype
            assert torch.equal(part, all_of_it[start : start + n])


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_another_seed_is_another_stream(stream):
    assert not torch.equal(stream(40, seed=0)[0], stream(40, seed=1)[0])


def test_shapes_and_dtypes():
    for batch, d in ((sea(6), 3), (stagger(6), 9), (hyperplane(6, features=4), 4)):
        assert (batch.x.dtype, batch.x.shape) == (torch.float32, (6, d))
        assert (batch.y.dtype, batch.y.shape) == (torch.int64, (6,))
    values = bernoulli(6)
    assert (values.dtype, values.shape) == (torch.float64, (6,))


@pytest.mark.parametrize("concept", range(4))
def test_sea_labels_are_those_river_gives_to_its_rows_but_called_the_other_way(concept):
    # River's rule is on its own rows: theta found there must separate ours.
    rows = list(synth.SEA(variant=concept, seed=1).take(3000))
    theirs = np.array([x[0] + x[1] for x, _ in rows])
    above = np.array([y for _, y in rows])
    batch = sea(3000, drifts=list(range(1, concept + 1)), noise=0.0, start=10, seed=concept)
    ours = batch.x.double()[:, :2].sum(1).numpy()
    low, high = theirs[~above].max(), theirs[above].min()  # theta lies between
    assert high - low < 0.05
    clear = (ours <= low) | (ours >= high)
    assert clear.sum() > 2900
    assert ((ours <= low) == (batch.y.numpy() == 1))[clear].all()


def test_sea_concepts_are_the_papers_thetas_in_turn_and_start_at_the_very_row():
    drifts = [100, 200, 300, 400]
    batch = sea(500, drifts=drifts, noise=0.0)
    sums = batch.x.double()[:, :2].sum(1)
    for k, theta in enumerate((8, 9, 7, 9.5, 8)):
        part = slice(100 * k, 100 * k + 100)
        assert torch.equal(batch.y[part], (sums[part] <= theta).long())
    # The row before a drift is still the old concept's, wherever theta tells them apart.
    for position in range(50, 90):
        moved = sea(100, drifts=[position], noise=0.0).y
        assert torch.equal(moved[:position], (sums[:position] <= 8).long())
        assert torch.equal(moved[position:], (sums[position:100] <= 9).long())


@pytest.mark.parametrize("concept", range(3))
def test_stagger_labels_are_rivers_for_every_row(concept):
    batch = stagger(400, drifts=list(range(1, concept + 1)), start=10, seed=5)
    rule = synth.STAGGER(classification_function=concept)._functions[concept]
    size, colour, shape = batch.x.reshape(-1, 3, 3).argmax(2).T.tolist()
    # River says red, blue, green and circle, square, triangle; we say red, green, blue and square,
    # circular, triangular.
    colour = [{0: 0, 1: 2, 2: 1}[c] for c in colour]
    shape = [{0: 1, 1: 0, 2: 2}[s] for s in shape]
    assert batch.y.tolist() == [rule(*row) for row in zip(size, colour, shape, strict=True)]
    assert torch.equal(batch.x.reshape(-1, 3, 3).sum(2), torch.ones(400, 3))


def test_stagger_has_all_27_kinds_of_rows_equally_often():
    kinds = stagger(27_000).x @ torch.tensor([0.0, 1, 2, 0, 3, 6, 0, 9, 18])
    counts = torch.bincount(kinds.long(), minlength=27).double()
    assert ((counts - 1000) ** 2 / 1000).sum() < 54.05  # chi square, 26 degrees, p = 0.001


@pytest.mark.parametrize(
    ("concept", "share"), [(0, 0.32), (1, 0.405), (2, 0.245), (3, 0.45125)]
)  # theta^2 / 200
def test_sea_class_balance_is_the_area_below_the_line(concept, share):
    y = sea(1000, drifts=list(range(1, concept + 1)), start=9, noise=0.0).y
    assert tail(int(y.sum()), 1000, share) > 1e-3


@pytest.mark.parametrize(("concept", "share"), [(0, 1 / 9), (1, 5 / 9), (2, 2 / 3)])
def test_stagger_class_balance(concept, share):
    y = stagger(1000, drifts=list(range(1, concept + 1)), start=9).y
    assert tail(int(y.sum()), 1000, share) > 1e-3


@pytest.mark.parametrize("stream", [sea, stagger, hyperplane])
@pytest.mark.parametrize("noise", [0.05, 0.3, 0.5])
def test_noise_flips_that_share_of_labels_and_no_feature(stream, noise):
    clean, noisy = stream(1000, noise=0.0), stream(1000, noise=noise)
    assert torch.equal(clean.x, noisy.x)
    assert tail(int((clean.y != noisy.y).sum()), 1000, noise) > 1e-3


def test_a_gradual_drift_mixes_by_the_sigmoid():
    values = bernoulli(4000, p=(0.0, 1.0), drifts=[2000], width=1000.0)
    for t in (500, 1500, 1900, 2100, 2500, 3500):
        around = values[t - 100 : t + 100]
        p = np.mean([1 / (1 + math.exp(-4 * (s - 2000) / 1000)) for s in range(t - 100, t + 100)])
        assert tail(int(around.sum()), 200, float(p)) > 1e-3


def test_a_very_narrow_gradual_drift_is_an_abrupt_one():
    narrow, abrupt = (sea(500, drifts=[250], width=w, noise=0.0) for w in (1e-9, 0.0))
    differ = (narrow.y != abrupt.y).nonzero().flatten().tolist()
    assert set(differ) <= {250}  # there the sigmoid is one half


def test_hyperplane_labels_follow_the_closed_form_and_its_weights_come_back():
    # Of two features with weights w the label is the side of x . w = sum(w) / 2: found by a fit.
    for t in (0, 5000, 20_000):
        batch = hyperplane(4000, start=t, features=2, drifting=0, noise=0.0)
        x = batch.x.double() - 0.5
        angles = torch.linspace(0, 2 * math.pi, 3601, dtype=torch.float64)
        sides = x @ torch.stack([angles.cos(), angles.sin()]) >= 0
        assert (sides.long() == batch.y[:, None]).double().mean(0).max() > 0.999
    one = hyperplane(500, features=3, drifting=3, period=100.0, noise=0.0)
    x = one.x.double() - 0.5
    normal = torch.linalg.lstsq(x[:100], one.y[:100].double() * 2 - 1).solution
    still = ((x @ normal >= 0).long() == one.y).double().mean()
    fixed = hyperplane(500, features=3, drifting=0, noise=0.0)
    x = fixed.x.double() - 0.5
    normal = torch.linalg.lstsq(x[:100], fixed.y[:100].double() * 2 - 1).solution
    assert ((x @ normal >= 0).long() == fixed.y).double().mean() > still + 0.05


@pytest.mark.parametrize("drifting", [0, 2, 5])
def test_hyperplane_classes_are_balanced(drifting):
    y = hyperplane(1000, features=5, drifting=drifting, noise=0.0).y
    assert tail(int(y.sum()), 1000, 0.5) > 1e-3  # x and 1 - x are equally likely


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sea(-1), "sea needs n >= 0 rows from start >= 0, got -1 from 0"),
        (lambda: stagger(3, start=-2), "got 3 from -2"),
        (lambda: sea(3, drifts=[5, 4]), r"ascending positions >= 0 as drifts, got \[5, 4\]"),
        (lambda: sea(3, drifts=[4, 4]), r"got \[4, 4\]"),
        (lambda: stagger(3, drifts=[-1]), r"got \[-1\]"),
        (lambda: sea(3, width=-1.0), "finite width >= 0 in rows, got -1.0"),
        (lambda: sea(3, width=math.nan), "width >= 0 in rows, got nan"),
        (lambda: sea(3, noise=0.6), r"sea needs a noise in \[0, 0.5\], got 0.6"),
        (lambda: hyperplane(3, noise=math.nan), r"noise in \[0, 0.5\], got nan"),
        (lambda: hyperplane(3, features=1), "features >= 2"),
        (lambda: hyperplane(3, features=3, drifting=4), "drifting in 0 .. features"),
        (lambda: hyperplane(3, period=0.0), "period > 0"),
        (lambda: bernoulli(3, p=[]), r"means p in \[0, 1\], got \[\]"),
        (lambda: bernoulli(3, p=[0.5, 1.5]), r"got \[0.5, 1.5\]"),
        (lambda: bernoulli(3, drifts=[2, 1]), "bernoulli needs ascending positions"),
    ],
)
def test_errors_say_what_is_needed(call, message):
    with pytest.raises(InputError, match=message):
        call()

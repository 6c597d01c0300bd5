"""The Fisher that is recycled from Adam's squared gradients."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import arch, loss
from tessera import graph as tg
from tessera.data import Batch
from tessera.errors import AnchorError


def rows(n, g):
    x = torch.randn(n, 6, generator=g)
    noisy = x[:, :3] + 0.7 * torch.randn(n, 3, generator=g)
    return x, noisy.argmax(1)


def trained(steps=7, size=16, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = tg.Adam(model.parameters(), lr=1e-2, **options)

    @tg.training_step
    def step(batch):
        return F.cross_entropy(model(batch.x), batch.y)

    g = torch.Generator().manual_seed(5)
    for _ in range(steps):
        step(Batch(*rows(size, g)))
    return model, optimizer


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_it_is_adams_corrected_second_moment_times_the_batch_size(betas):
    model, optimizer = trained(betas=betas)
    anchor = arch.anchor_from(model, "a")
    assert anchor.stats["approximate"] is True
    assert anchor.stats["estimator"] == "recycled"
    assert anchor.stats["batch_size"] == 16
    assert anchor.stats["samples"] == 0
    assert set(anchor.fisher) == set(anchor.params)
    for n, p in model.named_parameters():
        want = optimizer.state[p]["exp_avg_sq"].double() / (1 - betas[1] ** 7) * 16
        torch.testing.assert_close(anchor.fisher[n].double(), want, rtol=1e-5, atol=0)


def test_one_step_gives_the_squared_gradient_times_the_batch_size():
    """By hand: after one step the corrected second moment is g^2."""
    model, optimizer = trained(steps=1, size=8)
    got = arch.anchor_from(model, "a").fisher
    del optimizer
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    x, y = rows(8, torch.Generator().manual_seed(5))
    F.cross_entropy(twin(x), y).backward()
    for n, p in twin.named_parameters():
        torch.testing.assert_close(got[n], 8 * p.grad.square(), rtol=1e-5, atol=0)


def test_the_recycled_figure_does_not_follow_the_optimizer():
    model, optimizer = trained()
    anchor = arch.anchor_from(model, "a")
    kept = anchor.fisher["0.weight"].clone()
    optimizer.state[model[0].weight]["exp_avg_sq"].zero_()
    assert torch.equal(anchor.fisher["0.weight"], kept)


def ranks(v):
    return v.flatten().double().argsort().argsort().double()


def test_near_a_minimum_it_ranks_the_weights_like_the_exact_fisher():
    """Spearman's correlation over all weights of the net, and the scale to a factor of 4."""
    model, optimizer = trained(steps=600, size=32)
    recycled = arch.anchor_from(model, "a").fisher
    x, _ = rows(1000, torch.Generator().manual_seed(9))
    exact = arch.anchor_from(model, "b", data=[x]).fisher
    a, b = (torch.cat([f[n].flatten() for n in exact]) for f in (recycled, exact))
    spearman = torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1]
    assert spearman > 0.5
    assert 0.25 < a.sum() / b.sum() < 4
    shuffled = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(0))]
    assert torch.corrcoef(torch.stack([ranks(shuffled), ranks(b)]))[0, 1] < 0.5
    del optimizer


def test_frozen_parameters_are_not_recycled():
    model, optimizer = trained()
    model[0].weight.requires_grad_(False)
    anchor = arch.anchor_from(model, "a")
    assert "0.weight" not in anchor.fisher
    assert "0.weight" in anchor.params
    del optimizer


def test_a_recycled_fisher_works_in_a_penalty():
    model, optimizer = trained()
    anchor = arch.anchor_from(model, "a")
    assert loss.ewc(model, anchor, lam=1.0) == 0
    with torch.no_grad():
        model[0].weight.add_(1.0)
    want = 0.5 * anchor.fisher["0.weight"].double().sum()
    torch.testing.assert_close(loss.ewc(model, anchor, lam=1.0).double(), want, rtol=1e-5, atol=0)
    del optimizer


def test_the_batch_size_is_known_of_batches_tensors_and_keywords():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = tg.Adam(model.parameters())
    x, y = rows(10, torch.Generator().manual_seed(0))

    class Owner:
        @tg.training_step
        def step(self, a, b):
            return F.cross_entropy(model(a), b)

    @tg.training_step
    def of_batch(batch, weight=None):
        return F.cross_entropy(model(batch[0]), batch[1])

    @tg.training_step(optimizer=optimizer)
    def explicit(x, y):
        return F.cross_entropy(model(x), y)

    calls = [
        (lambda n: of_batch((x[:n], y[:n])), 2),
        (lambda n: of_batch(Batch(x[:n], y[:n]), 0.5), 3),
        (lambda n: of_batch([x[:n], y[:n]]), 4),
        (lambda n: Owner().step(x[:n], y[:n]), 5),
        (lambda n: explicit(x[:n], y[:n]), 6),
        (lambda n: explicit(x=x[:n], y=y[:n]), 7),
        (lambda n: of_batch(batch=Batch(x[:n], y[:n])), 8),
    ]
    for call, n in calls:
        call(n)
        assert arch.anchor_from(model, "a").stats["batch_size"] == n


def test_an_unknown_batch_size_warns_and_leaves_the_scale_alone():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = tg.Adam(model.parameters())
    x, y = rows(10, torch.Generator().manual_seed(0))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"could not be scaled.*Pass data=") as caught:
        anchor = arch.anchor_from(model, "a")
    assert caught[0].filename == __file__
    assert anchor.stats["batch_size"] is None
    torch.testing.assert_close(anchor.fisher["bias"], model.bias.grad.square())


def test_without_an_adam_that_stepped_the_error_names_data():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    message = r"arch\.anchor_from\(model, 't3'\) needs data.*arch\.anchor_from\(model, 't3', data="
    with pytest.raises(AnchorError, match=message):
        arch.anchor_from(model, "t3")
    adam = tg.Adam(model.parameters())
    with pytest.raises(AnchorError, match=message):
        arch.anchor_from(model, "t3")
    del adam
    sgd = tg.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(torch.zeros(2, 6)), torch.zeros(2, dtype=torch.int64)).backward()
    sgd.step()
    with pytest.raises(AnchorError, match=message):
        arch.anchor_from(model, "t3")


def test_data_is_preferred_to_recycling():
    model, optimizer = trained()
    x, _ = rows(20, torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert arch.anchor_from(model, "a", data=[x]).stats["estimator"] == "exact"
    del optimizer

"""Steps run again in the backward: the same gradients, for a fraction of what is kept."""

import pytest
import torch
from torch import nn

from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch
from tessera.errors import GraphError
from tessera.meta.maml import maml_step

DOUBLE = torch.float64


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)]
    return nn.Sequential(*layers).to(DOUBLE)


def shots(seed, n=6):
    g = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 3, dtype=DOUBLE, generator=g), torch.arange(n).remainder(2))


RULES = {"sgd": tg.SGD(0.1), "momentum": tg.SGD(0.1, momentum=0.9), "adam": tg.Adam(0.01)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("K", [0, 1, 2, 7, 16])
@pytest.mark.parametrize("buffers", ["batch", "per_task"])
def test_the_gradients_are_those_of_the_whole_graph(rule, K, buffers):
    model, query = net(), shots(1)
    results = []
    for remat in (False, True):
        adapted, state = maml_step(
            model, shots(0), inner_opt=RULES[rule], K=K, buffers=buffers, remat=remat
        )
        loss = T.cross_entropy(adapted(query.x), query.y)
        tensors = [state.losses, loss, *torch.autograd.grad(loss, list(model.parameters()))]
        results.append(tensors)
        assert state.steps == len(state.losses) == K
    for whole, again in zip(*results, strict=True):
        torch.testing.assert_close(again, whole, rtol=1e-12, atol=1e-16)


def test_what_the_loss_closes_over_gets_its_gradient():
    model, query = net(), shots(1)
    raw = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    scale = raw.exp()  # no leaf: its own graph is needed by every segment
    x = shots(0).x.requires_grad_()
    found = []
    for remat in (False, True):
        adapted, _ = maml_step(
            model,
            Batch(x, shots(0).y),
            inner_opt=tg.SGD(0.1),
            K=9,
            only="3",
            remat=remat,
            loss_fn=lambda o, y: scale * T.cross_entropy(o, y),
        )
        loss = T.cross_entropy(adapted(query.x), query.y)
        wanted = [raw, x, *model.parameters()]
        found.append(torch.autograd.grad(loss, wanted, retain_graph=True))
    assert all(g.abs().max() > 0 for g in found[0][:2])
    for whole, again in zip(*found, strict=True):
        torch.testing.assert_close(again, whole, rtol=1e-12, atol=1e-16)


def graph_nodes(tensors):
    seen, stack = set(), [t.grad_fn for t in tensors if t.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack += [n for n, _ in node.next_functions if n is not None]
    return len(seen)


def test_the_graph_that_is_kept_grows_with_the_root_of_the_steps():
    model = net()

    def nodes(K, remat):
        adapted, _ = maml_step(model, shots(0), inner_opt=tg.SGD(0.1), K=K, remat=remat)
        return graph_nodes(adapted.params.values())

    assert nodes(100, False) > 15 * nodes(5, False)
    assert nodes(100, True) <= 10 + nodes(0, True) + len(list(model.parameters()))
    assert nodes(100, True) < nodes(100, False) / 100


def test_a_forward_that_is_another_when_it_is_run_again_is_found_out():
    class Drifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(3, 2).to(DOUBLE), [0.0]

        def forward(self, x):
            self.calls[0] += 0.1
            return self.layer(x) * self.calls[0]

    adapted, _ = maml_step(Drifts(), shots(0), inner_opt=tg.SGD(0.1), K=4, remat=True)
    loss = T.cross_entropy(adapted(shots(1).x), shots(1).y)
    with pytest.raises(GraphError, match=r"remat=True ran the inner loop again.*were others"):
        loss.backward()


def test_parameters_that_were_written_into_before_the_backward_are_found_out():
    model = net()
    adapted, _ = maml_step(model, shots(0), inner_opt=tg.SGD(0.1), K=4, remat=True)
    loss = T.cross_entropy(adapted(shots(1).x), shots(1).y)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()

"""The loss of a fit that must not forget: by hand, against closed forms, and on two regimes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import arch, peft, random
from tessera.arch import Delta
from tessera.errors import AnchorError, InputError
from tessera.serve.fitting_values import Rehearsal
from tessera.serve.rehearsal import fisher_of, rehearsing


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=random.generator(seed, "tests.rehearsal"))


def whole(model: nn.Linear) -> Delta:
    """A delta over every weight of a Linear: what it computes with theta is theta's."""
    tensors = {
        "weight.full": model.weight.detach().clone().requires_grad_(),
        "bias.full": model.bias.detach().clone().requires_grad_(),
    }
    return Delta(kind="mask", tensors=tensors)


def test_the_fisher_is_the_closed_form_of_a_softmax_over_a_linear() -> None:
    model, x = nn.Linear(3, 4).double(), draw(7, 3).double()
    with torch.no_grad():
        model.weight.copy_(draw(4, 3, seed=1))
        p = model(x).softmax(1)
    bias, weight = fisher_of(model, whole(model), {"input": x})
    # d log p_c / d z_k = [c = k] - p_k, so E_c of its square is p_k (1 - p_k).
    at_z = p * (1 - p)
    torch.testing.assert_close(bias, at_z.mean(0))
    torch.testing.assert_close(weight, (at_z[:, :, None] * x[:, None, :].square()).mean(0))


def test_the_fisher_is_that_of_an_anchor() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).eval(), draw(9, 3)
    tensors = {
        f"{n}.full": p.detach().clone().requires_grad_() for n, p in model.named_parameters()
    }
    found = fisher_of(model, Delta(kind="mask", tensors=tensors), {"input": x})
    anchor = arch.anchor_from(model, "now", data=[x], estimator="exact")
    for name, fisher in zip(sorted(tensors), found, strict=True):
        torch.testing.assert_close(fisher, anchor.fisher[name.removesuffix(".full")])


def test_many_classes_draw_one_label_each_and_always_the_same() -> None:
    model = nn.Linear(3, 40)
    one, other = (fisher_of(model, whole(model), {"input": draw(4, 3)}) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert float(one[0].sum()) > 0


def old(x: Tensor, y: Tensor, *, rho: float = 0.25, lam: float = 3.0) -> Rehearsal:
    return Rehearsal(inputs={"input": x}, labels=y, rho=rho, lam=lam)


def test_the_loss_is_its_parts_by_hand() -> None:
    model, x = nn.Linear(3, 2).double(), draw(6, 3).double()
    y = torch.tensor([0, 1, 1, 0, 0, 1])
    delta = whole(model)
    fisher = fisher_of(model, delta, {"input": x[4:]})
    loss_fn = rehearsing(model, delta, old(x[4:], y[4:]), rows=4)
    at_start = 0.25 * F.cross_entropy(model(x[:4]), y[:4])
    at_start = at_start + 0.75 * F.cross_entropy(model(x[4:]), y[4:])
    torch.testing.assert_close(loss_fn(model(x), y), at_start)
    move = [draw(*leaf.shape, seed=i).double() for i, leaf in enumerate(delta.parameters())]
    with torch.no_grad():
        for leaf, by in zip(delta.parameters(), move, strict=True):
            leaf.add_(by)
    pull = sum(1.5 * (f * m.square()).sum() for f, m in zip(fisher, move, strict=True))
    torch.testing.assert_close(loss_fn(model(x), y), at_start + pull)
    found = torch.autograd.grad(loss_fn(model(x), y), delta.parameters())
    for g, f, m in zip(found, fisher, move, strict=True):
        torch.testing.assert_close(g, 3.0 * f * m)


def test_its_gradient_is_that_of_central_differences() -> None:
    model, x, y = nn.Linear(2, 2).double(), draw(5, 2).double(), torch.tensor([0, 1, 1, 0, 1])
    delta = peft.lora(model, 1)
    for i, leaf in enumerate(delta.parameters()):
        leaf.data.copy_(draw(*leaf.shape, seed=i))
    loss_fn = rehearsing(model, delta, old(x[3:], y[3:]), rows=3)
    with torch.no_grad():
        for leaf in delta.parameters():
            leaf.add_(0.1)

    def loss() -> Tensor:
        return loss_fn(peft.apply(model, delta)(x), y)

    found = torch.autograd.grad(loss(), delta.parameters())
    for leaf, g in zip(delta.parameters(), found, strict=True):
        for i in range(leaf.numel()):
            at, sides = leaf.detach().view(-1), []
            for step in (1e-6, -2e-6):
                at[i] += step
                sides.append(float(loss().detach()))
            at[i] += 1e-6
            assert abs((sides[0] - sides[1]) / 2e-6 - float(g.view(-1)[i])) < 1e-7


def test_without_a_penalty_there_is_none() -> None:
    model, x, y = nn.Linear(2, 2), draw(3, 2), torch.tensor([0, 1, 1])
    delta = whole(model)
    loss_fn = rehearsing(model, delta, old(x[2:], y[2:], rho=1.0, lam=0.0), rows=2)
    with torch.no_grad():
        delta.tensors["weight.full"].add_(1.0)
    torch.testing.assert_close(loss_fn(model(x), y), F.cross_entropy(model(x[:2]), y[:2]))


def accuracy(model: nn.Module, delta: Delta, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((peft.apply(model, delta)(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("kind", ["rehearsed", "held by the penalty"])
def test_a_fit_with_it_forgets_less(kind: str) -> None:
    """Two regimes that one delta can hold: each has inputs and a rule of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).eval()
    one, two = draw(128, 4, seed=1), draw(128, 4, seed=2)
    one[:, 3], two[:, 3] = -2.0, 2.0
    first, second = (one[:, 0] > 0).long(), (two[:, 1] > 0).long()
    start = peft.fit(peft.lora(model, 4, head="2"), (one, first), steps=150, lr=0.02, model=model)
    assert accuracy(model, start, one, first) > 0.95

    def after(rehearsal: Rehearsal | None) -> tuple[float, float]:
        delta = start.snapshot().trainable()
        shots, loss_fn = (two, second), None
        if rehearsal is not None:
            loss_fn = rehearsing(model, delta, rehearsal, rows=len(two))
            x = torch.cat([two, rehearsal.inputs["input"]])
            shots = x, torch.cat([second, rehearsal.labels])
        peft.fit(delta, shots, steps=120, lr=0.02, loss_fn=loss_fn, model=model)
        return accuracy(model, delta, one[64:], first[64:]), accuracy(model, delta, two, second)

    forgotten, learned = after(None)
    by = {"rehearsed": (0.5, 0.0), "held by the penalty": (1.0, 300.0)}[kind]
    kept, also = after(old(one[:64], first[:64], rho=by[0], lam=by[1]))
    assert learned > 0.9
    assert kept > forgotten + 0.05
    assert also > 0.7


@pytest.mark.parametrize("labels", [None, torch.zeros(0, dtype=torch.int64)])
def test_a_rehearsal_needs_labels(labels: Tensor | None) -> None:
    model = nn.Linear(2, 2)
    none = Rehearsal(inputs={"input": draw(1, 2)}, labels=labels, rho=0.5, lam=1.0)
    with pytest.raises(InputError, match="a label for each example of before"):
        rehearsing(model, whole(model), none, rows=1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input: Tensor) -> list[Tensor]:
        return [input * self.weight]


def test_it_needs_scores_of_classes() -> None:
    model = Words()
    tensors = {"weight.full": torch.ones(1, requires_grad=True)}
    with pytest.raises(InputError, match="the model gave a list without logits"):
        fisher_of(model, Delta(kind="mask", tensors=tensors), {"input": draw(1, 2)})
    line = nn.Linear(2, 1)
    with pytest.raises(AnchorError, match="C >= 2 classes"):
        rehearsing(line, whole(line), old(draw(1, 2), torch.zeros(1, dtype=torch.int64)), rows=1)

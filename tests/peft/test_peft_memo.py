"""What a fit remembers of a forward: `Memo` and `Watch` give what the model gives.

Each trap is made for a memo that looks at gradients only: some part of it depends on the live
tensor, on chance, or on what was written, in a way that autograd does not show.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.peft.memo import Memo


class Trap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below, self.mid, self.relu = nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU(inplace=True)
        self.same = nn.Identity()
        self.register_buffer("count", torch.zeros(()))
        self.live = nn.Parameter(torch.randn(3))
        self.held: Any = None


class Argmax(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.one_hot(h.argmax(-1), 3).float()


class Detached(Trap):
    """A choice by live values that carries no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = Argmax()

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(self.below(x) * self.live) @ torch.eye(3) + self.live


class NoGrad(Trap):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.mid(self.below(x) * self.live)
        return gate * self.live


class WrittenAfter(Trap):
    """relu_ writes into what `below` gave, and the name that is read is the old one."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.below(x)
        self.relu(h)
        return h * self.live


class WrittenThroughAnAlias(Trap):
    def forward(self, x: Tensor) -> Tensor:
        h = self.below(x)
        other = self.same(h)
        other.mul_(2)
        return h * self.live


class WrittenByTheLive(Trap):
    def forward(self, x: Tensor) -> Tensor:
        h = self.below(x)
        h += self.live.detach()
        return self.mid(h) * self.live


class Counts(Trap):
    """Its buffer differs in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.below(x) * self.count
        self.count += 1
        return self.mid(h) + self.live


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Chance(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.below(x)) * self.live


class Branch(Trap):
    """Python decides by a live value."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.below(x) if self.live.sum() > 0 else self.mid(x)
        return h * self.live


class Item(Trap):
    """A live value becomes a number of Python's, and then part of what looks constant."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mid(x * self.live.sum().item()) + self.live


class PassedOn(Trap):
    """A module hands on what it got, and no op happens in it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.same((self.below(x) * self.live).detach()) + self.live


class WrittenByAnOpThatReturnsNothing(Trap):
    def forward(self, x: Tensor) -> Tensor:
        h = self.below(x)
        torch._foreach_mul_([h], [self.live.detach().expand(2, 3)])
        return self.mid(h) + self.live


class Sender(nn.Module):
    def __init__(self, owner: list[Any]) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, x: Tensor) -> Tensor:
        self.owner[:] = [x.sin()]  # leaves by a side door
        return x.cos()


class SideDoor(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.box: list[Any] = []
        self.send = Sender(self.box)

    def forward(self, x: Tensor) -> Tensor:
        self.box.clear()
        out = self.send(self.below(x)) * self.live
        return out + self.box[0]


class Twice(Trap):
    """One module, called with a constant and with a live value."""

    def forward(self, x: Tensor) -> Tensor:
        return self.below(self.below(x) * self.live) + self.below(x)


class Views(Trap):
    def forward(self, x: Tensor) -> Tensor:
        h = self.below(x)
        row = h[0]
        row.copy_(self.live.detach())
        return self.mid(h) + self.live


TRAPS = [
    *(Detached, NoGrad, WrittenAfter, WrittenThroughAnAlias, WrittenByTheLive, Counts, Chance),
    *(Branch, SideDoor, Twice, Views, Item, PassedOn, WrittenByAnOpThatReturnsNothing),
]


@pytest.mark.parametrize("trap", TRAPS, ids=lambda t: t.__name__)
def test_a_memo_gives_what_the_model_gives(trap: type[Trap]) -> None:
    model = trap().eval()
    for name, p in model.named_parameters():
        p.requires_grad_(name == "live")
    x = torch.randn(2, 3)
    values = [torch.randn(3) * (-1) ** i for i in range(5)]

    def outputs(run: Callable[[Callable[[], Tensor]], Tensor]) -> list[Tensor]:
        found = []
        model.count.zero_()
        for value in values:
            with torch.no_grad():
                model.live.copy_(value)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(found))
                output = run(lambda: model(x))
            (gradient,) = torch.autograd.grad(output.sum(), model.live)
            found += [output.detach().clone(), gradient]
        return found

    wanted = outputs(lambda work: work())
    memo = Memo(model, [model.live])
    got = outputs(lambda work: memo.run(0, work))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_memo_keeps_a_constant_below_and_inside() -> None:
    model = nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.Linear(3, 2)
    )
    model.eval().requires_grad_(False)
    live = model[3].weight.requires_grad_()
    memo = Memo(model, [live])
    for _ in range(2):
        memo.run(0, lambda: model(torch.ones(2, 3)))
    # relu writes into what batch norm made: it is computed anew, on a copy.
    assert memo.kept(0) == ("0", "1")


def test_a_memo_tells_batches_apart() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).requires_grad_(False)
    live = model[1].weight.requires_grad_()
    xs = [torch.randn(n, 3) for n in (2, 4)]
    wanted = [model(x) for x in xs]
    memo = Memo(model, [live])
    for _ in range(3):
        for key, x in enumerate(xs):
            assert torch.equal(memo.run(key, partial(model, x)), wanted[key])
    assert memo.kept(0) == memo.kept(1) == ("0",)


def test_a_memo_survives_an_exception_in_the_middle() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).requires_grad_(False)
    live, x = model[1].weight.requires_grad_(), torch.randn(2, 3)
    wanted = model(x)
    memo = Memo(model, [live])

    def broken() -> Tensor:
        model(x)
        raise RuntimeError("on purpose")

    for _ in range(2):  # the first forward, and a later one
        with pytest.raises(RuntimeError, match="on purpose"):
            memo.run(0, broken)
        assert torch.equal(memo.run(0, partial(model, x)), wanted)
        assert torch.equal(model(x), wanted)


def test_a_closed_memo_gives_the_forwards_back() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).requires_grad_(False)

    def own(x: Tensor) -> Tensor:
        return x + 1

    model[0].forward = own
    memo = Memo(model, [model[1].weight.requires_grad_()])
    memo.run(0, lambda: model(torch.ones(1, 3)))
    memo.close()
    assert model[0].forward is own
    assert "forward" not in model[1].__dict__
    assert memo.kept(0) == ()


def test_a_path_that_changes_is_computed_plainly() -> None:
    class Flips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.top = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
            self.flip = False

        def forward(self, x: Tensor) -> Tensor:
            return self.top((self.b if self.flip else self.a)(x))

    model = Flips().requires_grad_(False)
    live, x = model.top.weight.requires_grad_(), torch.randn(2, 3)
    memo = Memo(model, [live])
    memo.run(0, lambda: model(x))
    model.flip = True
    got = memo.run(0, lambda: model(x))
    assert torch.equal(got, model.top(model.b(x)))

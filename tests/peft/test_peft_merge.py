"""A merged model computes alone what `apply` does, and shares nothing with the base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tessera import peft, trees
from tessera.arch import Delta
from tessera.errors import DeltaError, InputError, UnknownNameError
from tessera.peft.merge import merge

Every = dict[str, Callable[[nn.Module], Delta]]
Moved = Callable[..., Delta]
CLOSE = {"rtol": 0.0, "atol": 1e-12}
WEIGHTS = [
    "lora",
    "lora everywhere",
    "lora with a head",
    "ia3",
    "ia3 of a convolution",
    "mask of layers",
    "mask of weights",
]


def fit_for_merging(kind: str, net: nn.Module, every: Every, moved: Moved, seed: int = 0) -> Delta:
    return moved(every[kind](net), seed=seed)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("weight", [1.0, -0.7])
def test_merged_is_applied(
    kind: str, weight: float, net: nn.Module, every: Every, moved: Moved, tokens: Tensor
) -> None:
    net = net.double()
    delta = fit_for_merging(kind, net, every, moved)
    merged = merge(net, delta, weights=[weight])
    with torch.no_grad():
        wanted = peft.apply(net, [delta], weights=[weight])(tokens)
        torch.testing.assert_close(merged(tokens), wanted, **CLOSE)
        assert (wanted - net(tokens)).abs().max() > 1e-3
    assert type(merged) is type(net)
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in net.named_parameters()]


def test_several_deltas_of_several_kinds_merge_as_they_are_applied(
    net: nn.Module, every: Every, moved: Moved, tokens: Tensor
) -> None:
    net = net.double()
    kinds = ["lora everywhere", "ia3", "mask of layers", "ia3 of a convolution", "lora"]
    deltas = [fit_for_merging(k, net, every, moved, seed=i) for i, k in enumerate(kinds)]
    shares = [1.0, 0.5, -0.25, 1.0, 2.0]
    with torch.no_grad():
        wanted = peft.apply(net, deltas, weights=shares)(tokens)
        got = merge(net, deltas, weights=shares)(tokens)
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_by_hand_for_a_linear_layer() -> None:
    base = nn.Linear(2, 2).double()
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        base.bias.copy_(torch.tensor([1.0, -1.0]))
    model = nn.Sequential(base)
    one, two = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[2.0], [1.0]]).double()
    lora = Delta(kind="lora", tensors={"0.A": one, "0.B": two}, scales={"0": 0.5})
    gains = Delta(kind="ia3", tensors={"0.gain_out": torch.tensor([10.0, 0.0]).double()})
    assert merge(model, lora)[0].weight.tolist() == [[2.0, 2.0], [3.5, 4.0]]
    scaled = merge(model, gains)[0]
    assert scaled.weight.tolist() == [[10.0, 20.0], [0.0, 0.0]]
    assert scaled.bias.tolist() == [10.0, 0.0]
    both = merge(model, [lora, gains])[0]
    assert both.weight.tolist() == [[11.0, 20.0], [0.5, 0.0]]  # the base's output is scaled
    assert merge(model, gains, weights=[0.5])[0].bias.tolist() == [5.5, -0.5]


def test_the_base_is_left_alone_and_nothing_is_shared(
    net: nn.Module, every: Every, moved: Moved, tokens: Tensor
) -> None:
    net.fc.bias.requires_grad_(False)
    net(tokens).sum().backward()
    before, grads = trees.sha256(net.state_dict()), [p.grad for p in net.parameters()]
    delta = fit_for_merging("lora everywhere", net, every, moved)
    merged = merge(net.train(), delta)
    assert trees.sha256(net.state_dict()) == before
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))
    assert merged.training
    assert not merged.fc.bias.requires_grad
    assert merged.fc.weight.requires_grad
    assert all(p.is_leaf and p.grad is None for p in merged.parameters())
    own = {p.data_ptr() for p in net.parameters()} | {t.data_ptr() for t in delta.tensors.values()}
    assert not own & {p.data_ptr() for p in merged.parameters()}
    state = trees.clone(merged.state_dict())
    with torch.no_grad():
        for t in (*net.parameters(), *delta.tensors.values()):
            t.zero_()
    assert all(torch.equal(merged.state_dict()[n], t) for n, t in state.items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.again = nn.Linear(4, 6, bias=False)
        self.out.weight = self.again.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return self.out(h) + 2 * self.again(h)


def test_a_weight_that_two_modules_share_changes_only_where_the_delta_lies(moved: Moved) -> None:
    net, ids = Tied().double(), torch.tensor([[0, 3, 5]])
    for site in ("table", "out"):
        delta = moved(peft.lora(net, 2, sites=site))
        merged = merge(net, delta)
        with torch.no_grad():
            torch.testing.assert_close(merged(ids), peft.apply(net, delta)(ids), **CLOSE)
        others = {"table", "out", "again"} - {site}
        weights = {merged.get_submodule(name).weight for name in others}
        assert len(weights) == 1  # the rest is tied as before
        assert merged.get_submodule(site).weight not in weights


def test_a_module_used_twice_is_still_one(moved: Moved) -> None:
    shared = nn.Linear(3, 3).double()
    net = nn.Sequential(shared, nn.Tanh(), shared)
    delta = moved(peft.lora(net, 2, sites="0"))
    merged = merge(net, delta)
    assert merged[0] is merged[2]
    x = torch.randn(2, 3).double()
    with torch.no_grad():
        torch.testing.assert_close(merged(x), peft.apply(net, delta)(x), **CLOSE)


def test_a_parametrized_weight_becomes_a_plain_one(moved: Moved) -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2).double()), nn.Linear(2, 2))
    delta = moved(peft.lora(net, 2, sites="0"))
    merged, x = merge(net, delta), torch.randn(4, 3).double()
    assert parametrize.is_parametrized(net[0])
    assert net[0].weight.shape == (2, 3)  # its property is its class's, which a deep copy shares
    assert not parametrize.is_parametrized(merged[0])
    assert merged[0].weight.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(merged[0](x), peft.apply(net, delta).module[0](x), **CLOSE)


def test_half_precision_stays_and_is_rounded_once(moved: Moved) -> None:
    net = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    delta = moved(peft.lora(net, 4, sites="0"))
    assert delta.tensors["0.A"].dtype == torch.float32
    merged = merge(net, delta)[0].weight
    exact = net[0].weight.double() + delta.tensors["0.B"].double() @ delta.tensors["0.A"].double()
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.float().bfloat16())


def test_virtual_tokens_cannot_be_merged(net: nn.Module, every: Every, moved: Moved) -> None:
    for kind in ("prefix", "prompt"):
        delta = every[kind](net)
        with pytest.raises(DeltaError, match=rf"'{kind}'.* virtual tokens .*peft\.apply\(model, d"):
            merge(net, [moved(every["ia3"](net)), delta])


def test_what_does_not_fit_is_refused(net: nn.Module, every: Every) -> None:
    delta = every["lora"](net)
    with pytest.raises(DeltaError, match="of another base"):
        merge(copy.deepcopy(net).requires_grad_(False).apply(_shifted), delta)
    away = Delta(
        kind="lora", tensors={"x.A": torch.ones(1, 2), "x.B": torch.ones(2, 1)}, scales={"x": 1.0}
    )
    with pytest.raises(UnknownNameError, match="'x'"):
        merge(net, away)
    for weights, why in (([1.0, 2.0], "1 deltas and 2 weights"), ([float("nan")], "finite")):
        with pytest.raises(InputError, match=why):
            merge(net, delta, weights=weights)
    with pytest.raises(InputError, match=r"at least one arch\.Delta"):
        merge(net, [])
    wrong: Any = "model"
    with pytest.raises(InputError, match=r"needs a torch\.nn\.Module, got str"):
        merge(wrong, delta)


def _shifted(module: nn.Module) -> None:
    for p in module.parameters(recurse=False):
        p.data.add_(1)


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        raise TypeError("there is a socket in here")


def test_a_model_that_cannot_be_copied_says_why() -> None:
    net = nn.Sequential(Uncopyable(2, 2))
    with pytest.raises(DeltaError, match=r"copy of Sequential.*there is a socket in here"):
        merge(net, peft.lora(net, 1))

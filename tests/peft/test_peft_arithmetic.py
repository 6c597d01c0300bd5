"""A sum of deltas does what all do together; TIES against the paper's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera import peft
from tessera.arch import Delta
from tessera.errors import DeltaError, InputError
from tessera.peft.arithmetic import ties, weighted_sum

Every = dict[str, Callable[[nn.Module], Delta]]
Moved = Callable[..., Delta]
CLOSE = {"rtol": 0.0, "atol": 1e-12}
SUMMABLE = [
    "lora",
    "lora everywhere",
    "ia3",
    "ia3 of a convolution",
    "mask of layers",
    "mask of weights",
]


def three(kind: str, net: nn.Module, every: Every, moved: Moved) -> list[Delta]:
    return [moved(every[kind](net), seed=seed) for seed in range(3)]


# weighted_sum


@pytest.mark.parametrize("kind", SUMMABLE)
def test_the_sum_does_what_all_do_together(
    kind: str, net: nn.Module, every: Every, moved: Moved, tokens: Tensor
) -> None:
    net = net.double()
    deltas, shares = three(kind, net, every, moved), [0.5, -1.25, 2.0]
    one = weighted_sum(deltas, shares)
    with torch.no_grad():
        wanted = peft.apply(net, deltas, weights=shares)(tokens)
        torch.testing.assert_close(peft.apply(net, one)(tokens), wanted, **CLOSE)
        assert (wanted - net(tokens)).abs().max() > 1e-3
    assert one.kind == deltas[0].kind
    assert one.base_hash == deltas[0].base_hash
    assert len(one.parameters()) > 0


@pytest.mark.parametrize("kind", [*SUMMABLE, "lora with a head"])
def test_a_weight_of_one_alone_gives_that_delta_back_to_the_bit(
    kind: str, net: nn.Module, every: Every, moved: Moved
) -> None:
    deltas = three(kind, net, every, moved)
    for i, delta in enumerate(deltas):
        back = weighted_sum(deltas, [float(j == i) for j in range(3)])
        assert back.tensors.keys() == delta.tensors.keys()
        for name, tensor in delta.tensors.items():
            if "gain" in name:  # 1 + (l - 1)
                torch.testing.assert_close(back.tensors[name], tensor, rtol=0, atol=1e-7)
            else:
                assert torch.equal(back.tensors[name], tensor)
        assert back.scales == delta.scales


@pytest.mark.parametrize("kind", SUMMABLE)
@pytest.mark.parametrize("join", [weighted_sum, lambda ds, ws: ties(ds, ws, density=0.4)])
def test_the_order_does_not_matter_to_the_bit(
    kind: str, join: Any, net: nn.Module, every: Every, moved: Moved
) -> None:
    deltas, shares = three(kind, net, every, moved), [0.5, -1.25, 2.0]
    first = join(deltas, shares)
    for order in ((2, 0, 1), (1, 0, 2)):
        again = join([deltas[i] for i in order], [shares[i] for i in order])
        assert again.hash == first.hash


def test_the_sum_is_linear(net: nn.Module, every: Every, moved: Moved, tokens: Tensor) -> None:
    net = net.double()
    a, b, c = three("lora everywhere", net, every, moved)
    nested = weighted_sum([weighted_sum([a, b], [2.0, 3.0]), c], [0.5, -1.0])
    flat = weighted_sum([a, b, c], [1.0, 1.5, -1.0])
    with torch.no_grad():
        got, wanted = peft.apply(net, nested)(tokens), peft.apply(net, flat)(tokens)
    torch.testing.assert_close(got, wanted, **CLOSE)
    nothing = weighted_sum([a, a], [1.0, -1.0])
    with torch.no_grad():
        torch.testing.assert_close(peft.apply(net, nothing)(tokens), net(tokens), **CLOSE)


def low(seed: int, r: int, scale: float, out: int = 6, wide: int = 5) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(r, wide, generator=draw, dtype=torch.float64)
    B = torch.randn(out, r, generator=draw, dtype=torch.float64)
    return Delta(kind="lora", tensors={"f.A": A, "f.B": B}, scales={"f": scale})


def change(delta: Delta, site: str = "f") -> Tensor:
    A, B = delta.tensors[f"{site}.A"].detach(), delta.tensors[f"{site}.B"].detach()
    return delta.scales[site] * (B.flatten(1) @ A.flatten(1)).double()


def test_ranks_add_up_to_the_layers_own() -> None:
    a, b = low(0, 2, 0.5), low(1, 1, 3.0)
    both = weighted_sum([a, b], [2.0, -1.0])
    assert both.tensors["f.A"].shape == (3, 5)
    torch.testing.assert_close(change(both), 2 * change(a) - change(b), **CLOSE)
    five = [low(seed, 2, 1.0) for seed in range(5)]
    whole = weighted_sum(five, [1.0] * 5)
    assert whole.tensors["f.A"].shape == (5, 5)  # of ten, cut to what the layer can hold
    torch.testing.assert_close(change(whole), sum(map(change, five)), **CLOSE)


def test_rank_cuts_to_the_best_approximation() -> None:
    deltas = [low(seed, 2, 1.0) for seed in range(3)]
    total = sum(map(change, deltas))
    singular = torch.linalg.svdvals(total)
    for rank in (1, 2, 4):
        cut = weighted_sum(deltas, [1.0] * 3, rank=rank)
        assert cut.tensors["f.A"].shape == (rank, 5)
        # Eckart & Young: what is left is the singular values that were cut.
        left = torch.linalg.matrix_norm(total - change(cut))
        torch.testing.assert_close(left, singular[rank:].norm(), rtol=1e-12, atol=1e-12)
    assert weighted_sum(deltas, [1.0] * 3, rank=2).hash == cut_again(deltas)


def cut_again(deltas: list[Delta]) -> str:
    return weighted_sum(deltas, [1.0] * 3, rank=2).hash


def test_convolutions_and_embeddings_sum_as_their_weights_do(moved: Moved) -> None:
    net = nn.ModuleDict({"c": nn.Conv2d(4, 6, 3), "e": nn.Embedding(9, 4)}).double()
    deltas = [moved(peft.lora(net, 2, 3.0, sites=["c", "e"]), seed=s) for s in range(2)]
    for rank in (None, 1):
        both = weighted_sum(deltas, [0.5, 2.0], rank=rank)
        for site, exact in (
            ("c", 0.5 * change(deltas[0], "c") + 2 * change(deltas[1], "c")),
            ("e", 0.5 * change(deltas[0], "e") + 2 * change(deltas[1], "e")),
        ):
            if rank is None:
                torch.testing.assert_close(change(both, site), exact, **CLOSE)
            else:
                left = torch.linalg.matrix_norm(exact - change(both, site))
                wanted = torch.linalg.svdvals(exact)[1:].norm()
                torch.testing.assert_close(left, wanted, rtol=1e-12, atol=1e-12)
        shape = both.tensors["c.A"].shape[1:], both.tensors["c.B"].shape[2:]
        assert shape == ((4, 3, 3), (1, 1))


def test_deltas_over_different_sites_and_weights_join() -> None:
    a, b = low(0, 2, 0.5), low(1, 1, 3.0)
    other = Delta(
        kind="lora",
        tensors={"g.A": b.tensors["f.A"], "g.B": b.tensors["f.B"]},
        scales={"g": 3.0},
        info={"layer_types": {"g": "Embedding"}, "labels": ["x"]},
    )
    both = weighted_sum([a, other], [1.0, 2.0])
    torch.testing.assert_close(change(both, "f"), change(a), **CLOSE)
    torch.testing.assert_close(change(both, "g"), 2 * change(other, "g"), **CLOSE)
    # What only one says stays out, but of which type a layer is.
    assert both.info == {"layer_types": {"g": "Embedding"}}
    masks = [torch.tensor([True, True, False]), torch.tensor([False, True, True])]
    packed = [
        Delta(kind="mask", tensors={"w.values": torch.tensor([1.0, 2.0]), "w.mask": m})
        for m in masks
    ]
    joined = weighted_sum(packed[:1] * 2 + packed[1:], [1.0, 1.0, 10.0])
    assert joined.tensors["w.mask"].tolist() == [True, True, True]
    assert joined.tensors["w.values"].tolist() == [2.0, 14.0, 20.0]
    dense = Delta(kind="mask", tensors={"w.values": torch.tensor([0.0, 0.0, 1.0])})
    joined = weighted_sum([packed[0], dense], [1.0, 1.0])
    assert joined.tensors["w.values"].tolist() == [1.0, 2.0, 1.0]
    assert "w.mask" not in joined.tensors


def test_heads_average_where_the_base_drops_out(
    net: nn.Module, every: Every, moved: Moved, tokens: Tensor
) -> None:
    net = net.double()
    a, b, _ = three("lora with a head", net, every, moved)
    both = weighted_sum([a, b], [0.25, 0.75])
    with torch.no_grad():
        wanted = 0.25 * a.tensors["head.weight.full"] + 0.75 * b.tensors["head.weight.full"]
        torch.testing.assert_close(both.tensors["head.weight.full"].detach(), wanted, **CLOSE)
    with pytest.raises(InputError, match=r"weights must add up to 1 .* add up to 2"):
        weighted_sum([a, b], [1.0, 1.0])
    with pytest.raises(DeltaError, match="in some of the deltas only"):
        weighted_sum([a, moved(every["lora"](net))], [0.5, 0.5])


# ties


def gains(*values: float) -> Delta:
    return Delta(kind="ia3", tensors={"f.gain_out": 1 + torch.tensor(values, dtype=torch.float64)})


def result(delta: Delta) -> list[float]:
    return [round(g, 9) for g in (delta.tensors["f.gain_out"].detach() - 1).tolist()]


def test_ties_by_hand() -> None:
    # Trim to 3 of 5; the first stays positive by mass, the second negative; the third is told by
    # one delta alone; the fourth is a draw, where nobody agrees; the fifth was trimmed by all.
    a = gains(4.0, -3.0, 0.1, 2.0, 0.05)
    b = gains(2.0, 1.0, 0.0, -2.0, -0.5)
    c = gains(-5.0, 0.3, 6.0, 0.2, 0.31)
    assert result(ties([a, b, c], density=0.6)) == [3.0, -3.0, 6.0, 0.0, 0.31]
    # A weight scales what its delta says, after the election.
    assert result(ties([a, b, c], [1.0, 2.0, 1.0], density=0.6)) == [4.0, -3.0, 6.0, 0.0, 0.31]
    assert result(ties([a, b, c], [1.0, 0.0, 1.0], density=0.6)) == [-5.0, -3.0, 6.0, 2.0, 0.31]


@pytest.mark.parametrize("kind", SUMMABLE)
def test_ties_of_one_delta_whole_is_that_delta(
    kind: str, net: nn.Module, every: Every, moved: Moved, tokens: Tensor
) -> None:
    net = net.double()
    deltas = three(kind, net, every, moved)
    for several, shares in ((deltas[:1], None), (deltas, [1.0, 0.0, 0.0]), (deltas[:1] * 3, None)):
        one = ties(several, shares, density=1.0)
        assert one.tensors.keys() == deltas[0].tensors.keys()
        with torch.no_grad():
            got, wanted = peft.apply(net, one)(tokens), peft.apply(net, deltas[0])(tokens)
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_ties_depends_on_what_a_lora_does_not_on_how_it_is_factored() -> None:
    a, b = low(0, 2, 0.5), low(1, 2, 3.0)
    same = Delta(
        kind="lora",
        tensors={"f.A": 8 * a.tensors["f.A"], "f.B": a.tensors["f.B"] / 2},
        scales={"f": 0.125},
    )
    torch.testing.assert_close(change(same), change(a), **CLOSE)
    first, second = ties([a, b], density=0.5), ties([same, b], density=0.5)
    torch.testing.assert_close(change(first), change(second), **CLOSE)


def test_ties_of_lora_is_the_papers_steps_on_the_changes() -> None:
    deltas = [low(seed, 2, 1.0) for seed in range(3)]
    taus = torch.stack([change(d) for d in deltas])
    for tau in taus:
        tau[tau.abs() < tau.abs().flatten().sort(descending=True).values[5]] = 0  # 6 of 30
    sign = taus.sum(0).sign()
    agree = (taus.sign() == sign) & (taus != 0)
    wanted = (taus * agree).sum(0) / agree.sum(0).clamp(min=1)
    whole = ties(deltas, density=0.2, rank=5)
    torch.testing.assert_close(change(whole), wanted, **CLOSE)
    cut = ties(deltas, density=0.2)
    assert cut.tensors["f.A"].shape == (2, 5)
    left = torch.linalg.matrix_norm(wanted - change(cut))
    torch.testing.assert_close(
        left, torch.linalg.svdvals(wanted)[2:].norm(), rtol=1e-12, atol=1e-12
    )


def test_ties_trims_over_all_modules_of_a_delta_together() -> None:
    large = {"f.gain_out": torch.tensor([3.0, 4.0]), "g.gain_out": torch.tensor([1.1, 1.2])}
    merged = ties([Delta(kind="ia3", tensors=large)], density=0.5)
    assert merged.tensors["f.gain_out"].tolist() == [3.0, 4.0]
    assert merged.tensors["g.gain_out"].tolist() == [1.0, 1.0]


# What is refused


@pytest.mark.parametrize("join", [lambda ds: weighted_sum(ds, [1.0] * len(ds)), ties])
def test_deltas_that_cannot_be_summed_are_refused(
    join: Any, net: nn.Module, every: Every, moved: Moved
) -> None:
    for kind in ("prefix", "prompt"):
        with pytest.raises(DeltaError, match=r"virtual tokens, .*peft\.apply\(model, \[a, b\]\)"):
            join([every[kind](net)] * 2)
    with pytest.raises(DeltaError, match=r"of one kind, got Delta\('lora'.* and Delta\('ia3'"):
        join([every["lora"](net), every["ia3"](net)])
    one = moved(every["lora"](net))
    with torch.no_grad():
        net.fc.weight.add_(1)
    with pytest.raises(DeltaError, match=r"of one base, got .*delta\.of\(model\)"):
        join([one, every["lora"](net)])
    with pytest.raises(DeltaError, match=r"'f\.A' has shape \(4,\) .* and \(5,\) in another"):
        join([low(0, 1, 1.0), low(1, 1, 1.0, wide=4)])
    with pytest.raises(InputError, match=r"at least one arch\.Delta"):
        join([])


def test_arguments_out_of_range_are_refused() -> None:
    deltas = [low(0, 1, 1.0), low(1, 1, 1.0)]
    cases: list[tuple[Callable[[], Delta], str]] = [
        (lambda: weighted_sum(deltas, [1.0]), "2 deltas and 1 weights"),
        (lambda: weighted_sum(deltas, [0.0, 0.0]), "finite weights, not all 0"),
        (lambda: weighted_sum(deltas, [1.0, float("inf")]), "finite weights"),
        (lambda: weighted_sum(deltas, [1.0, 1.0], rank=0), "whole rank >= 1, got 0"),
        (lambda: weighted_sum([gains(1.0)], [1.0], rank=1), "only a lora delta has a rank="),
        (lambda: ties(deltas, density=0.0), r"density in \(0, 1\], got 0"),
        (lambda: ties(deltas, density=1.5), r"density in \(0, 1\], got 1.5"),
    ]
    for call, why in cases:
        with pytest.raises(InputError, match=why):
            call()
    head = Delta(
        kind="lora",
        tensors={**deltas[0].tensors, "h.weight.full": torch.ones(2)},
        scales={"f": 1.0},
    )
    with pytest.raises(DeltaError, match=r"'h\.weight\.full' replaces .* without their heads"):
        ties([head, head])

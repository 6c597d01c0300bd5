"""Laws every delta obeys when it is laid over a model, and the messages when it cannot be."""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import arch, peft
from tessera import graph as tg
from tessera.arch import Delta
from tessera.errors import DeltaError, InputError, UnknownNameError


def state(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: (id(t), t._version, t.detach().clone()) for n, t in tensors.items()}


def same(before, model):
    after = state(model)
    return before.keys() == after.keys() and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2])
        for a, b in zip(before.values(), after.values(), strict=True)
    )


# --- laws --------------------------------------------------------------------------------------


def test_fresh_delta_changes_no_bit(net, tokens, fresh):
    delta = fresh(net)
    with torch.no_grad():
        base, under = net(tokens), peft.apply(net, delta)(tokens)
    assert torch.equal(base, under) == (delta.kind not in ("prefix", "prompt"))


def test_moved_delta_changes_the_output_and_not_the_base(net, tokens, fresh, moved):
    before, base = state(net), net(tokens)
    delta = moved(fresh(net))
    under = peft.apply(net, delta)(tokens)
    assert (under - base).abs().max() > 1e-2
    under.sum().backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in delta.parameters())
    assert same(before, net)


def test_gradients_against_finite_differences(net, tokens, fresh, moved):
    net.double()
    delta = moved(fresh(net))
    delta = dataclasses.replace(
        delta,
        tensors={
            n: t.detach().double().requires_grad_() if t.is_floating_point() else t
            for n, t in delta.tensors.items()
        },
    )
    names = [n for n, t in delta.tensors.items() if t.requires_grad]

    def run(*values):
        tensors = {**delta.tensors, **dict(zip(names, values, strict=True))}
        here = dataclasses.replace(delta, tensors=tensors)
        return peft.apply(net, here)(tokens[:2])

    values = [delta.tensors[n] for n in names]
    assert torch.autograd.gradcheck(run, values, fast_mode=True)


def test_compiles_whole(net, tokens, fresh, moved):
    applied = peft.apply(net, moved(fresh(net)).snapshot())
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(applied, backend="eager", fullgraph=True)(tokens)
        assert torch.allclose(compiled, applied(tokens), atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: peft.lora(m, 2),
        lambda m: peft.lora(m, 1, sites="conv"),
        lambda m: peft.ia3(m, sites="0", feedforward="conv"),
        lambda m: peft.mask(m, ["0", "conv"]),
    ],
)
def test_vmap_over_rows_and_over_deltas(make, moved):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.add_module("conv", nn.Conv1d(3, 2, 1))
    delta, x = moved(make(model)), torch.randn(5, 3, 4)
    applied = peft.apply(model, delta)
    assert torch.allclose(torch.vmap(lambda x: applied(x[None])[0])(x), applied(x), atol=1e-6)

    def under(tensors):
        return peft.apply(model, dataclasses.replace(delta, tensors=tensors))(x)

    pair = {n: torch.stack([t.detach(), 2 * t.detach()]) for n, t in delta.tensors.items()}
    both = torch.vmap(under)(pair)
    assert torch.allclose(both[0], applied(x), atol=1e-6)
    assert torch.allclose(both[1], under({n: t[1] for n, t in pair.items()}), atol=1e-6)


def test_follows_the_tensors_while_they_are_trained(net, tokens, moved):
    delta = peft.lora(net, 2)
    applied = peft.apply(net, delta)
    before = applied(tokens)
    with torch.no_grad():
        delta.tensors["fc.B"].add_(1.0)
    assert not torch.equal(before, applied(tokens))


def test_changes_add_up_whatever_the_order(net, tokens, moved):
    net.double()
    x, weights = tokens, [0.5, -2.0, 1.5]
    deltas = [
        moved(peft.lora(net, 2, sites=["fc", "conv"])),
        moved(peft.ia3(net, sites=["fc", "head"]), 1),
        moved(peft.mask(net, ["fc", "norm"]), 2),
    ]
    one = peft.apply(net, deltas, weights=weights)(x)
    other = peft.apply(net, deltas[::-1], weights=weights[::-1])(x)
    assert torch.allclose(one, other, atol=1e-12)
    # By hand, at the one layer where all three meet.
    fc, (a, b, c) = net.fc, deltas
    h = torch.randn(3, 8, dtype=torch.float64)
    gain = 1 - 2.0 * (b.tensors["fc.gain_out"] - 1)
    W = fc.weight + 1.5 * c.tensors["fc.weight.values"]
    bias = fc.bias + 1.5 * c.tensors["fc.bias.values"]
    low = 0.5 * h @ a.tensors["fc.A"].T @ a.tensors["fc.B"].T
    module = peft.apply(net, deltas, weights=weights).module.fc
    assert torch.allclose(module(h), gain * F.linear(h, W, bias) + low, atol=1e-12)
    assert torch.allclose(F.linear(h, module.weight, module.bias), module(h), atol=1e-12)


def test_weight_nought_is_the_base(net, tokens, moved):
    delta = moved(peft.lora(net, 2))
    under = peft.apply(net, [delta], weights=[0.0])(tokens)
    assert torch.allclose(under, net(tokens), atol=1e-6)


def test_effective_weight_is_what_fused_paths_read(moved):
    """PyTorch's encoder layer reads linear1.weight and in_proj_weight instead of calling."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    sites = ["linear1", "linear2", "self_attn", "self_attn.out_proj"]
    delta, x = moved(peft.lora(layer, 2, sites=sites)), torch.randn(2, 5, 8)
    with torch.no_grad():
        fused = peft.apply(layer, delta)(x)
    slow = peft.apply(layer, delta)(x.requires_grad_())
    assert torch.allclose(fused, slow, atol=1e-5)
    assert (fused - layer(x)).abs().max() > 1e-2


def test_prefix_of_attention_is_keys_and_values_in_front(moved):
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    delta = moved(peft.prefix(attention, 3))
    x, own = torch.randn(2, 4, 8), delta.tensors["prefix"]
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    k, v = (
        torch.cat([own[:, :8].expand(2, -1, -1), k], 1),
        torch.cat([own[:, 8:].expand(2, -1, -1), v], 1),
    )
    q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in (q, k, v))
    wanted = attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    output, weights = peft.apply(attention, delta)(x, x, x)
    assert torch.allclose(output, wanted, atol=1e-6)
    assert weights.shape == (2, 4, 7)
    hidden = torch.zeros(2, 4, dtype=torch.bool)
    hidden[:, 2:] = True
    masked, _ = peft.apply(attention, delta)(x, x, x, key_padding_mask=hidden)
    short, _ = peft.apply(attention, delta)(x, x[:, :2], x[:, :2])
    assert torch.allclose(masked, short, atol=1e-6)


def test_mode_and_running_statistics_stay_the_bases(moved):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    delta, before = moved(peft.lora(model, 1)), state(model)
    applied = peft.apply(model, delta)
    applied(torch.randn(8, 4))
    assert same(before, model)
    assert peft.apply(model.eval(), delta) is not applied
    assert not peft.apply(model, delta).module[2].training


def test_kept_while_nothing_changes(net, moved):
    delta = moved(peft.lora(net, 2))
    applied = peft.apply(net, delta)
    assert peft.apply(net, delta) is applied
    assert peft.apply(net, [delta], weights=[0.5]) is not applied
    assert peft.apply(net, moved(peft.lora(net, 2))) is not applied
    net.fc = nn.Linear(8, 8)
    delta = dataclasses.replace(delta, base_hash="")
    assert peft.apply(net, delta).module.fc.plain is nn.Linear


def test_buffers_that_were_replaced_are_not_kept(moved):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    delta, x = moved(peft.lora(model, 1)), torch.randn(3, 4)
    before = peft.apply(model, delta)(x)
    model[1].running_mean = torch.full((4,), 5.0)  # as `model.to(device)` does it
    assert (peft.apply(model, delta)(x) - before).abs().min() > 1.0


def test_lets_go_of_the_model(net):
    delta = peft.lora(net, 1)
    peft.apply(net, delta)
    gone = weakref.ref(net)
    del net
    gc.collect()
    # pytest's fixture holds the one reference that is left
    assert sum(isinstance(o, type(gone())) for o in gc.get_referrers(gone())) == 0


def test_eight_threads_three_deltas_no_wrong_answer(net, tokens, moved):
    deltas = [moved(peft.lora(net, 2), 1), moved(peft.ia3(net), 2), moved(peft.lora(net, 1), 3)]
    before = state(net)
    with torch.no_grad():
        right = [peft.apply(net, d)(tokens) for d in deltas]
    wrong, failed = [], []

    def work(me: int) -> None:
        try:
            with torch.no_grad():
                for call in range(3 * 400):
                    which = (call + me) % 3
                    if not torch.equal(peft.apply(net, deltas[which])(tokens), right[which]):
                        wrong.append((me, call))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert not wrong
    assert same(before, net)


def test_base_is_whole_after_an_exception(net, moved):
    delta, before = moved(peft.lora(net, 2)), state(net)
    with pytest.raises(IndexError):
        peft.apply(net, delta)(torch.tensor([[99]]))
    assert same(before, net)


def test_captured_as_one_node_a_site(moved):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    delta, x = moved(peft.lora(model, 2)), torch.randn(5, 4)
    graph = tg.capture(lambda x: peft.apply(model, delta)(x), x)
    assert graph.text().count("tessera.delta_apply") == 2
    assert torch.allclose(graph.run(x), peft.apply(model, delta)(x), atol=1e-6)


# --- whose delta it is -------------------------------------------------------------------------


def test_part_of_a_whole(net, tokens, moved):
    part = peft.lora(net.att, 2, sites="linear1")
    assert part.sites == ("linear1",)
    with torch.no_grad():
        part.tensors["linear1.B"].fill_(0.3)
        under = peft.apply(net, part)(tokens)
    assert (under - net(tokens)).abs().max() > 1e-3
    arch.root(net)
    rooted = peft.lora(net.att, 2, sites="linear1")
    assert rooted.sites == ("att.linear1",)
    assert rooted.model() is net
    with torch.no_grad():
        rooted.tensors["att.linear1.B"].fill_(0.3)
        assert torch.equal(peft.apply(net, rooted)(tokens), under)


def test_base_hash_is_of_every_weight(net):
    twin = copy.deepcopy(net)
    assert arch.base_hash(twin) == arch.base_hash(net)
    with torch.no_grad():
        twin.norm.bias[3] += 1e-3
    assert arch.base_hash(twin) != arch.base_hash(net)


def test_another_base_is_refused_until_it_is_asked_for(net, tokens, moved):
    delta = moved(peft.lora(net, 2))
    with torch.no_grad():
        net.fc.weight.add_(0.01)
    with pytest.raises(DeltaError, match=r"of another base.*delta\.of\(model\)"):
        peft.apply(net, delta)
    peft.apply(net, delta.of(net))(tokens)


def test_compiled_module_runs_the_delta(moved):
    model = nn.Sequential(nn.Linear(4, 2))
    delta, x = moved(peft.lora(model, 1)), torch.randn(3, 4)
    wanted = peft.apply(model, delta)(x)
    model[0].compile(backend="eager")
    assert torch.equal(peft.apply(model, delta)(x), wanted)


def test_attached_forward_is_refused(net):
    delta = peft.lora(net, 1)
    net.att.forward = net.att.forward
    with pytest.raises(DeltaError, match="a forward was attached to the TransformerEncoderLayer"):
        peft.apply(net, delta)


# --- bad input ---------------------------------------------------------------------------------


def of(**tensors):
    return Delta(
        kind="lora",
        tensors={n.replace("_", "."): t for n, t in tensors.items()},
        scales={"fc": 1.0},
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: peft.lora(m, 99), InputError, r"rank 99 is larger than the layer 'att.self_"),
        (lambda m: peft.lora(m, 0), InputError, "whole rank r >= 1, got 0"),
        (lambda m: peft.lora(m, 2, alpha=-1), InputError, "finite alpha > 0"),
        (lambda m: peft.lora(m, 2, sites="nope"), UnknownNameError, "no module 'nope'.*it has emb"),
        (lambda m: peft.lora(m, 2, sites="norm"), InputError, "'norm' is a LayerNorm"),
        (lambda m: peft.lora(m, 2, head="nope"), UnknownNameError, "head 'nope' names no module"),
        (lambda m: peft.ia3(m, sites="emb"), InputError, "'emb' is a Embedding"),
        (lambda m: peft.mask(m, "nope"), UnknownNameError, "'nope' names no parameter"),
        (lambda m: peft.mask(m, {"fc.bias": torch.ones(8)}), InputError, "must be bool"),
        (lambda m: peft.prefix(m, 0), InputError, "virtual tokens >= 1, got 0"),
        (lambda m: peft.prompt(m, torch.zeros(2, 3)), InputError, r"vectors \[tokens, 16\]"),
        (lambda m: peft.prefix(nn.Linear(1, 1), 2), InputError, "needs a transformers model"),
    ],
)
def test_what_cannot_be_made(net, make, error, message):
    with pytest.raises(error, match=message):
        make(net)


@pytest.mark.parametrize(
    ("delta", "error", "message"),
    [
        (of(fc_A=torch.zeros(2, 7), fc_B=torch.zeros(8, 2)), DeltaError, r"'fc.A' \(2, 7\)"),
        (of(fc_A=torch.zeros(9, 8), fc_B=torch.zeros(8, 9)), DeltaError, "has rank 9, above the 8"),
        (
            Delta(kind="ia3", tensors={"fc.gain_out": torch.ones(3)}),
            DeltaError,
            r"'fc.gain_out' \(3,\) does not fit Linear \[8, 8\]",
        ),
        (
            Delta(kind="ia3", tensors={"a.fc.gain_out": torch.ones(3)}),
            UnknownNameError,
            r"module 'a\.fc', which this model lacks; it has fc",
        ),
        (
            Delta(kind="mask", tensors={"fc.weight.values": torch.ones(3)}),
            DeltaError,
            r"'fc.weight.values' \(3,\) does not fit the parameter \(8, 8\)",
        ),
        (
            Delta(kind="mask", tensors={"fc.scale.values": torch.ones(3)}),
            DeltaError,
            "a parameter 'scale', which Linear lacks",
        ),
        (Delta(kind="prompt", tensors={"prompt": torch.ones(2, 16)}), DeltaError, "does not say"),
    ],
)
def test_what_does_not_fit(net, delta, error, message):
    before = state(net)
    with pytest.raises(error, match=message):
        peft.apply(net, delta)
    assert same(before, net)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "lora", "tensors": {}}, "at least one tensor"),
        ({"kind": "lora", "tensors": {"fc.A": torch.ones(1, 2)}}, "'fc.A' without its 'B'"),
        ({"kind": "ia3", "tensors": {"fc.A": torch.ones(1, 2)}}, "has no tensor 'fc.A'"),
        (
            {"kind": "lora", "tensors": {"A": torch.ones(1, 2), "B": torch.ones(2, 2)}},
            "the rank of 'A'",
        ),
        (
            {"kind": "lora", "tensors": {"A": torch.ones(1, 2), "B": torch.ones(2, 1)}},
            "no scale for ''",
        ),
        (
            {"kind": "ia3", "tensors": {"gain_out": torch.ones(1)}, "scales": {"x": 1.0}},
            "a scale for 'x'",
        ),
        ({"kind": "ia3", "tensors": {"gain_out": torch.ones(1).long()}}, "must be floating"),
        ({"kind": "prompt", "tensors": {"prompt": torch.ones(1)}}, r"\[tokens, width\]"),
    ],
)
def test_tensors_that_do_not_belong_together(fields, message):
    with pytest.raises(DeltaError, match=message):
        Delta(**fields)


def test_unknown_kind():
    with pytest.raises(UnknownNameError, match="kind of delta 'lor'"):
        Delta(kind="lor", tensors={"A": torch.ones(1)})


def test_weights_of_what_has_none(net):
    with pytest.raises(InputError, match="a prompt has no weight"):
        peft.apply(net, [peft.prompt(net, 1)], weights=[0.5])
    with pytest.raises(InputError, match="1 deltas and 2 weights"):
        peft.apply(net, [peft.prompt(net, 1)], weights=[1.0, 1.0])
    with pytest.raises(InputError, match="must be a finite number, got nan"):
        peft.apply(net, [peft.lora(net, 1)], weights=[float("nan")])

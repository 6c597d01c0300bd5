"""A batch in which every row names its delta gives what each delta gives alone."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch import nn

from tessera import graph as tg
from tessera import peft
from tessera.arch import Stack, StackedModel
from tessera.errors import DeltaError, InputError


@pytest.fixture
def deltas(net, every, moved):
    names = [n for n in every if n not in ("prefix", "prompt")]
    return [moved(every[n](net), seed) for seed, n in enumerate(names)]


def alone(model, deltas, x, rows):
    return torch.stack(
        [
            (model(x[i : i + 1]) if r < 0 else peft.apply(model, deltas[r])(x[i : i + 1]))[0]
            for i, r in enumerate(rows)
        ]
    )


@pytest.mark.parametrize(
    "rows", [[0, 1, 2, 3, 4, -1], [6, 5, 6, -1, 0, 0], [-1] * 6, [2] * 6, [0, 1, 2, 3, 4, 5]]
)
def test_every_kind_in_one_batch(net, tokens, deltas, rows):
    applied = peft.apply(net, peft.stack(deltas))
    with torch.no_grad():
        together = applied(tokens, rows=torch.tensor(rows))
        assert torch.allclose(together, alone(net, deltas, tokens, rows), atol=1e-5)


def test_virtual_tokens_by_row(net, tokens, moved):
    deltas = [moved(peft.prefix(net, 3)), moved(peft.prefix(net, 1), 1), moved(peft.lora(net, 1))]
    applied = peft.apply(net, peft.stack(deltas))
    with torch.no_grad():
        for rows in ([0, 1, 2, -1, 0, 1], [1] * 6, [2, 2, -1, -1, 2, 2]):
            together = applied(tokens, rows=torch.tensor(rows))
            assert torch.allclose(together, alone(net, deltas, tokens, rows), atol=1e-5)


def test_prompts_of_one_length_by_row(net, tokens, moved):
    deltas = [moved(peft.prompt(net, 2)), moved(peft.prompt(net, 2), 1)]
    applied = peft.apply(net, peft.stack(deltas))
    rows = [0, 1, 1, 0, 0, 1]
    with torch.no_grad():
        together = applied(tokens, rows=torch.tensor(rows))
        assert torch.allclose(together, alone(net, deltas, tokens, rows), atol=1e-5)
        with pytest.raises(InputError, match="prompts of different lengths"):
            applied(tokens, rows=torch.tensor([0, 1, 1, 0, 0, -1]))


class Attention(nn.Module):
    """Query, key and value called with one input; a cross-attention called with two."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 4)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        return self.out(torch.softmax(q @ k.mT, -1) @ v)


def test_shrunk_together_only_where_the_input_is_the_same(moved):
    model = Attention().eval()
    deltas = [moved(peft.lora(model, r), r) for r in (1, 2, 3)]
    deltas.append(moved(peft.lora(model, 2, sites=["query", "value"]), 9))
    stack = peft.stack(deltas)
    assert len(stack.siblings("query.A")) == 3
    x, memory, rows = torch.randn(4, 5, 6), torch.randn(4, 3, 6), torch.tensor([0, 1, 2, 3])
    applied = peft.apply(model, stack)
    for inputs in ((x,), (x, memory)):
        wanted = [
            peft.apply(model, d)(*(t[i : i + 1] for t in inputs))[0] for i, d in enumerate(deltas)
        ]
        assert torch.allclose(applied(*inputs, rows=rows), torch.stack(wanted), atol=1e-5)


def test_vectors_and_maps_of_vectors(moved):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    deltas = [moved(peft.lora(model, 2), s) for s in range(3)]
    applied, rows = peft.apply(model, peft.stack(deltas)), [0, 1, 2, -1]
    for x in (torch.randn(4, 6), torch.randn(4, 3, 2, 6)):
        together = applied(x, rows=torch.tensor(rows))
        assert torch.allclose(together, alone(model, deltas, x, rows), atol=1e-5)


def test_own_ranks_scales_and_heads(net, tokens, moved):
    deltas = [
        moved(peft.lora(net, 1, 5.0), 1),
        moved(peft.lora(net, 4, 2.0, head="head"), 2),
        moved(peft.lora(net, 2, sites="fc"), 3),
    ]
    rows = [0, 1, 2, -1, 1, 0]
    together = peft.apply(net, peft.stack(deltas))(tokens, rows=torch.tensor(rows))
    assert torch.allclose(together, alone(net, deltas, tokens, rows), atol=1e-5)


def test_rows_do_not_depend_on_the_batch(net, tokens, deltas):
    """Bit for bit, for two rows or more, as the server's replay needs it."""
    applied = peft.apply(net, peft.stack(deltas))
    rows = torch.tensor([0, 1, 2, 3, 6, -1])
    with torch.no_grad():
        whole = applied(tokens, rows=rows)
        pair = applied(tokens[2:4], rows=rows[2:4])
        turned = applied(tokens.flip(0), rows=rows.flip(0)).flip(0)
    assert torch.equal(whole[2:4], pair)
    assert torch.equal(whole, turned)


def test_put_and_clear(net, tokens, moved):
    first, second = moved(peft.lora(net, 3), 1), moved(peft.lora(net, 2), 2)
    stack = peft.stack([first], slots=4)
    applied = peft.apply(net, stack)
    with pytest.raises(InputError, match="slot 1, where the stack holds no delta"):
        applied(tokens, rows=torch.tensor([0, 1, 0, 0, 0, 0]))
    stack.put(1, second)
    rows = [0, 1, 1, -1, 0, 1]
    together = applied(tokens, rows=torch.tensor(rows))
    assert torch.allclose(together, alone(net, [first, second], tokens, rows), atol=1e-5)
    stack.put(0, second)
    swapped = applied(tokens, rows=torch.zeros(6, dtype=torch.int64))
    assert torch.allclose(swapped, peft.apply(net, second)(tokens), atol=1e-5)
    stack.clear(1)
    assert len(stack) == 1


def test_put_where_rows_are_computed_in_turn(net, tokens, moved):
    first, second = (moved(peft.lora(net, 2, sites=["conv", "emb"]), s) for s in (1, 2))
    stack = peft.stack([first], slots=2)
    applied = peft.apply(net, stack)
    applied(tokens, rows=torch.zeros(6, dtype=torch.int64))
    stack.put(0, second.snapshot())
    rows = torch.zeros(6, dtype=torch.int64)
    assert torch.allclose(applied(tokens, rows=rows), peft.apply(net, second)(tokens), atol=1e-5)


def test_what_there_is_room_for_is_computed_though_no_delta_has_it_yet(net, tokens, moved):
    """Else a delta that is put there later would silently be the base."""
    wide = [moved(peft.lora(net, 2)), moved(peft.prefix(net, 2), 1), moved(peft.mask(net, "norm"))]
    stack = Stack([wide[0]], slots=3, room=peft.stack(wide).layout)
    stack.clear(0)
    applied = peft.apply(net, stack)
    for slot, delta in enumerate(wide):
        stack.put(slot, delta.snapshot())
        rows = torch.full((6,), slot)
        assert torch.allclose(applied(tokens, rows=rows), peft.apply(net, delta)(tokens), atol=1e-5)


def test_a_slot_keeps_the_delta_as_it_was_put(net, tokens, moved):
    """At every site alike: conv and the mask are computed from the delta, fc from the bank."""
    for delta in (moved(peft.lora(net, 2, sites=["conv", "fc"])), moved(peft.mask(net, "fc"))):
        stack = peft.stack([delta], slots=2)
        applied, rows = peft.apply(net, stack), torch.full((6,), 1)
        stack.put(1, delta)
        before = applied(tokens, rows=rows)
        with torch.no_grad():
            for tensor in delta.parameters():
                tensor.add_(0.5)
        assert torch.equal(applied(tokens, rows=rows), before)
        stack.put(1, delta)
        wanted = peft.apply(net, delta)(tokens)
        assert torch.allclose(applied(tokens, rows=rows), wanted, atol=1e-5)


def test_stack_holds_snapshots(net, tokens, moved):
    delta = moved(peft.lora(net, 2))
    applied = peft.apply(net, peft.stack([delta]))
    rows = torch.zeros(6, dtype=torch.int64)
    before = applied(tokens, rows=rows)
    with torch.no_grad():
        delta.tensors["fc.B"].add_(1.0)
    assert torch.equal(before, applied(tokens, rows=rows))


def test_threads_with_rows_of_their_own(net, tokens, deltas):
    applied = peft.apply(net, peft.stack(deltas))
    plans = [torch.tensor([(i + j) % 7 for j in range(6)]) for i in range(4)]
    with torch.no_grad():
        right = [applied(tokens, rows=p) for p in plans]
    wrong = []

    def work(me: int) -> None:
        with torch.no_grad():
            for call in range(100):
                which = (me + call) % 4
                if not torch.equal(applied(tokens, rows=plans[which]), right[which]):
                    wrong.append((me, call))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_gradients_reach_a_trainable_stack(moved):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    deltas = [moved(peft.lora(model, 2, 4.0, head="2", sites="0"), s) for s in range(3)]
    stack = Stack([d.snapshot() for d in deltas], trainable=True)
    x, rows = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 2, 2])
    StackedModel(model, stack)(x, rows=rows).square().sum().backward()
    for slot, delta in enumerate(deltas):
        peft.apply(model, delta)(x[rows == slot]).square().sum().backward()
        found = dict(zip(stack.unpack(slot), range(9), strict=False))
        row = stack.values.grad[slot]
        for name in found:
            got, wanted = stack._view(row, name), delta.tensors[name].grad
            got = got.mT if name.endswith(".B") else got
            assert torch.allclose(got, wanted, atol=1e-12)


def test_compiles_and_is_captured(moved):
    model = Attention().eval()
    deltas = [moved(peft.lora(model, 2), s) for s in range(3)]
    applied = peft.apply(model, peft.stack(deltas))
    x, rows = torch.randn(4, 5, 6), torch.tensor([0, 1, 2, -1])
    wanted = applied(x, rows=rows)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(applied, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x, rows=rows), wanted, atol=1e-5)
        assert torch.allclose(
            compiled(x, rows=rows.flip(0)), applied(x, rows=rows.flip(0)), atol=1e-5
        )
    graph = tg.capture(lambda x, rows: applied(x, rows=rows), x, rows)
    assert graph.text().count("tessera.delta_apply") == 4
    assert torch.allclose(graph.run(x, rows), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(6), "must be int64"),
        (torch.zeros(2, 3, dtype=torch.int64), r"must be int64 \[batch\]"),
        (torch.full((6,), 9), "slot 9, where the stack holds no delta"),
        (torch.full((6,), -2), "slot -2"),
        (torch.zeros(5, dtype=torch.int64), "rows= has 5 rows"),
        ([0, 1], "must be int64"),
    ],
)
def test_bad_rows(net, tokens, moved, rows, message):
    applied = peft.apply(net, peft.stack([moved(peft.lora(net, 1))]))
    with pytest.raises(InputError, match=message):
        applied(tokens, rows=rows)
    applied(tokens, rows=torch.zeros(6, dtype=torch.int64))  # and nothing is left behind


def test_what_cannot_be_stacked(net, moved):
    one = moved(peft.lora(net, 2, sites="fc"))
    with pytest.raises(InputError, match="at least one"):
        peft.stack([])
    with pytest.raises(DeltaError, match="another base"):
        peft.stack([one, dataclasses.replace(one, base_hash="0" * 64)])
    stack = peft.stack([one], slots=3)
    values = stack.values.clone()
    with pytest.raises(DeltaError, match=r"no room for 'fc\.A'"):
        stack.put(1, moved(peft.lora(net, 3, sites="fc")))
    with pytest.raises(DeltaError, match=r"no room for 'conv\.A'.*no delta in it has that"):
        stack.put(1, moved(peft.lora(net, 1, sites="conv")))
    with pytest.raises(InputError, match=r"slots 0 \.\. 2, got 3"):
        stack.put(3, one)
    assert torch.equal(stack.values, values)
    with torch.no_grad():
        net.fc.weight.add_(1)
    with pytest.raises(DeltaError, match="another base"):
        peft.apply(net, stack)

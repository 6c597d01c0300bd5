"""`peft.fit_many`: many deltas in one batch, each as if it were alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import arch, peft
from tessera.arch import Delta
from tessera.data import Batch
from tessera.errors import DeltaError, InputError, NonFiniteError
from tessera.peft.fit import fit, fit_one
from tessera.peft.fit_many import fit_many
from tessera.profiler import Budget, Meter


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    ).double()


def shots(rows: int) -> Batch:
    return Batch(torch.randn(rows, 5).double(), torch.randint(0, 3, (rows,)))


def moved(delta: Delta) -> Delta:
    """Away from the start, where half of a LoRA has no gradient."""
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return delta


LAID: dict[str, Callable[[nn.Module, int], Delta]] = {
    "lora": lambda m, i: peft.lora(m, 2, seed=i),
    "lora, top and head": lambda m, i: peft.lora(m, 2, sites=["3"], head="5", seed=i),
    "ia3": lambda m, i: peft.ia3(m),
    "ia3 of inputs": lambda m, i: peft.ia3(m, feedforward=["3"]),
    "mask": lambda m, i: peft.mask(m, {"3.weight": torch.eye(8, dtype=torch.bool)}),
}


def same(some: list[Delta], others: list[Delta]) -> None:
    for one, other in zip(some, others, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the deltas that were not fitted in a batch."""
    names: list[str] = []

    def noted(*args: Any, name: str, waiting: int) -> None:
        names.append(name)
        fit_one(*args, name=name, waiting=waiting)

    monkeypatch.setattr(sys.modules["tessera.peft.fit_many"], "fit_one", noted)
    return names


@pytest.mark.parametrize("laid", LAID)
def test_together_is_one_by_one(laid: str, one_by_one: list[str]) -> None:
    model = mlp().train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    deltas = [moved(LAID[laid](model, i)) for i in range(4)]
    alone, batches = [d.trainable() for d in deltas], [shots(n) for n in (3, 4, 3, 6)]
    starts = [d.hash for d in deltas]
    assert fit_many(deltas, batches, steps=8, model=model) == deltas
    assert len(one_by_one) == (4 if laid == "mask" else 0)
    for delta, batch in zip(alone, batches, strict=True):
        fit(delta, batch, steps=8, model=model)
    same(deltas, alone)
    assert all(d.hash != start for d, start in zip(deltas, starts, strict=True))
    assert len({d.hash for d in deltas}) == 4
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_they_share_one_forward_and_what_lies_below_runs_once() -> None:
    calls: list[tuple[str, int]] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append((self.name, len(x)))
            return super().forward(x)

    model = nn.Sequential(Counted(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model[0].name = "0"
    deltas = [peft.lora(model, 2, sites=["2"], seed=i) for i in range(3)]
    fit_many(deltas, [shots(n) for n in (2, 3, 4)], steps=5, model=model)
    assert calls == [("0", 9)]


def test_unlike_deltas_and_shots_are_grouped() -> None:
    model = mlp()
    laid = ["lora", "ia3", "lora", "lora, top and head", "ia3", "mask", "lora"]
    deltas = [moved(LAID[name](model, i)) for i, name in enumerate(laid)]
    deltas.append(moved(peft.lora(model, 3)))
    batches: list[Any] = [shots(3) for _ in deltas]
    batches[6] = [shots(2), shots(3)]  # in two batches, by turns
    alone = [d.trainable() for d in deltas]
    fit_many(deltas, batches, steps=6, model=model)
    for delta, batch in zip(alone, batches, strict=True):
        fit(delta, batch, steps=6, model=model)
    same(deltas, alone)


def test_several_batches_each_by_the_same_turns_as_alone() -> None:
    model = mlp()
    deltas = [moved(peft.lora(model, 2, seed=i)) for i in range(3)]
    batches = [[shots(2), shots(3), shots(1)] for _ in deltas]
    alone = [d.trainable() for d in deltas]
    fit_many(deltas, batches, steps=7, seed=3, model=model)
    for delta, batch in zip(alone, batches, strict=True):
        fit(delta, batch, steps=7, seed=3, model=model)
    same(deltas, alone)


def test_each_stops_by_itself() -> None:
    model = mlp()
    deltas = [moved(peft.lora(model, 2, seed=i)) for i in range(3)]
    batches = [shots(n) for n in (3, 4, 3)]
    alone, seen = [d.trainable() for d in deltas], [0]

    def loss(output: Tensor, y: Tensor) -> Tensor:
        found = F.cross_entropy(output, y)
        if len(y) == 4:  # the second of them is content at its fourth step
            seen[0] += 1
            return found * 1e-5 if seen[0] == 4 else found
        return found

    fit_many(deltas, batches, steps=10, loss_fn=loss, model=model)
    for delta, batch, steps in zip(alone, batches, (10, 3, 10), strict=True):
        fit(delta, batch, steps=steps, model=model)
    same(deltas, alone)


def test_a_loss_of_ones_own_gets_one_deltas_rows() -> None:
    model = mlp()
    deltas = [moved(peft.lora(model, 2, seed=i)) for i in range(2)]
    batches = [(torch.randn(n, 5).double(), torch.randn(n, 3).double()) for n in (2, 4)]
    seen: set[tuple[int, ...]] = set()

    def loss(output: Tensor, y: Tensor) -> Tensor:
        seen.add(tuple(output.shape))
        return (output - y).square().mean()

    alone = [d.trainable() for d in deltas]
    fit_many(deltas, batches, steps=5, loss_fn=loss, model=model)
    assert seen == {(2, 3), (4, 3)}
    for delta, batch in zip(alone, batches, strict=True):
        fit(delta, batch, steps=5, loss_fn=loss, model=model)
    same(deltas, alone)


def test_what_has_no_batched_form_is_fitted_all_the_same() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3))
    model = model.double()
    deltas = [moved(peft.lora(model, 1, sites=["0"], seed=i)) for i in range(3)]
    batches = [(torch.randn(3, 2, 5).double(), torch.arange(3)) for _ in deltas]
    alone = [d.trainable() for d in deltas]
    fit_many(deltas, batches, steps=4, model=model)
    for delta, batch in zip(alone, batches, strict=True):
        fit(delta, batch, steps=4, model=model)
    same(deltas, alone)


def test_a_model_that_folds_its_batch_is_fitted_all_the_same(one_by_one: list[str]) -> None:
    class Folds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows, steps, width = x.shape
            h = torch.tanh(self.fc(x.reshape(rows * steps, width)))
            return self.head(h.reshape(rows, steps, -1).mean(1))

    model = Folds().double()
    deltas = [moved(peft.lora(model, 2, seed=i)) for i in range(2)]
    batches = [(torch.randn(n, 4, 5).double(), torch.arange(n) % 3) for n in (2, 3)]
    alone = [d.trainable() for d in deltas]
    fit_many(deltas, batches, steps=4, model=model)
    assert len(one_by_one) == 2
    for delta, batch in zip(alone, batches, strict=True):
        fit(delta, batch, steps=4, model=model)
    same(deltas, alone)


def test_deltas_of_a_part_and_of_the_whole_meet() -> None:
    model = arch.root(mlp())
    deltas = [moved(peft.lora(model[3], 2, seed=0)), moved(peft.lora(model, 2, sites=["3"]))]
    alone, batches = [d.trainable() for d in deltas], [shots(3), shots(3)]
    fit_many(deltas, batches, steps=4)
    for delta, batch in zip(alone, batches, strict=True):
        fit(delta, batch, steps=4)
    same(deltas, alone)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens(kind: str, one_by_one: list[str]) -> None:
    model = Reader().double()
    deltas = [moved(getattr(peft, kind)(model, 2, head="head")) for _ in range(3)]
    batches = [(torch.randint(0, 11, (n, 4)), torch.arange(n) % 3) for n in (2, 3, 3)]
    alone = [d.trainable() for d in deltas]
    fit_many(deltas, batches, steps=5, model=model)
    assert not one_by_one
    for delta, batch in zip(alone, batches, strict=True):
        fit(delta, batch, steps=5, model=model)
    same(deltas, alone)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix", "prompt"])
@pytest.mark.parametrize("own_loss", [False, True])
def test_a_classifier_of_transformers(kind: str, own_loss: bool, one_by_one: list[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="over a model of transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=30, intermediate_size=32, max_position_embeddings=16, num_labels=3, **shape
    )
    model = transformers.BertForSequenceClassification(config).double()
    lay: dict[str, Callable[[], Delta]] = {
        "lora": lambda: peft.lora(model, 2, head="classifier"),
        "ia3": lambda: peft.ia3(model, head="classifier"),
        "prefix": lambda: peft.prefix(model, 2, head="classifier"),
        "prompt": lambda: peft.prompt(model, 2, head="classifier"),
    }
    deltas = [moved(lay[kind]()) for _ in range(3)]
    batches: list[Any] = []
    for rows in (2, 3, 3):
        x = {
            "input_ids": torch.randint(1, 30, (rows, 6)),
            "attention_mask": torch.ones(rows, 6).long(),
        }
        y = torch.arange(rows) % 3
        batches.append({**x, "labels": y} if own_loss else (x, y))
        if not own_loss and rows == 2:
            x["attention_mask"][0, 4:] = 0
    alone = [d.trainable() for d in deltas]
    fit_many(deltas, batches, steps=4, model=model)
    # Its own loss is a mean over all rows.
    assert len(one_by_one) == (3 if own_loss else 0)
    for delta, batch in zip(alone, batches, strict=True):
        fit(delta, batch, steps=4, model=model)
    same(deltas, alone)


def test_a_language_model_by_a_loss_of_ones_own(one_by_one: list[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="over a model of transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=30, intermediate_size=32, **shape)
    model = transformers.LlamaForCausalLM(config).double()
    top = ["model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.v_proj"]
    deltas = [moved(peft.lora(model, 2, sites=top, seed=i)) for i in range(2)]
    tokens = [torch.randint(1, 30, (n, 7)) for n in (2, 3)]
    batches = [({"input_ids": ids}, ids) for ids in tokens]

    def loss(output: Any, ids: Tensor) -> Tensor:
        assert len(output.logits) == len(ids)
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    alone = [d.trainable() for d in deltas]
    fit_many(deltas, batches, steps=4, loss_fn=loss, model=model)
    assert not one_by_one
    for delta, batch in zip(alone, batches, strict=True):
        fit(delta, batch, steps=4, loss_fn=loss, model=model)
    same(deltas, alone)


# --- budgets -------------------------------------------------------------------------------------


def test_a_budget_of_steps_is_each_ones() -> None:
    model = mlp()
    deltas = [moved(peft.lora(model, r)) for r in (1, 1, 2)]
    alone, batches = [d.trainable() for d in deltas], [shots(3) for _ in deltas]
    budget = Budget(steps=3)
    fit_many(deltas, batches, budget=budget, model=model)
    assert budget.stopped_by == "steps"
    for delta, batch in zip(alone, batches, strict=True):
        fit(delta, batch, steps=3, model=model)
    same(deltas, alone)


def test_a_budget_of_time_is_shared_by_groups() -> None:
    model, now, calls = mlp(), [0.0], [0, 0]

    def loss(output: Tensor, y: Tensor) -> Tensor:
        now[0] += 0.010
        calls[int(len(y) == 2)] += 1
        return F.cross_entropy(output, y)

    meter = Meter(clock=lambda: now[0], cpu_clock=lambda: now[0], powercap="no such folder")
    budget = Budget(ms=100, meter=meter)
    deltas = [peft.lora(model, 1), peft.lora(model, 2)]
    fit_many(deltas, [shots(3), shots(2)], budget=budget, loss_fn=loss, model=model)
    # A first forward prepares, and is charged: (100 - 10) / 2 = 45 ms are four steps more. 50 ms
    # are left, 10 of them for the second's preparation: 40 ms are again four steps more.
    assert calls == [5, 5]
    assert budget.stopped_by == "ms"
    assert budget.spent.ms == pytest.approx(100.0)


# --- what is refused -----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_delta_and_puts_all_back() -> None:
    model = mlp()
    deltas = [peft.ia3(model), *(peft.lora(model, 2, seed=i) for i in range(3))]
    batches = [shots(2), shots(3), shots(4), shots(3)]
    before = [d.hash for d in deltas]

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y) * (math.nan if len(y) == 4 else 1.0)

    with pytest.raises(NonFiniteError, match=r"fit_many: deltas\[2\]: the loss at step 0 is nan"):
        fit_many(deltas, batches, loss_fn=loss, model=model)
    assert [d.hash for d in deltas] == before


def test_a_finished_group_is_put_back_when_a_later_one_fails() -> None:
    model = mlp()
    deltas = [peft.ia3(model), peft.lora(model, 2)]
    before = [d.hash for d in deltas]

    def loss(output: Tensor, y: Tensor) -> Tensor:
        if len(y) == 4:
            raise RuntimeError("on purpose")
        return F.cross_entropy(output, y)

    with pytest.raises(RuntimeError, match="on purpose"):
        fit_many(deltas, [shots(3), shots(4)], loss_fn=loss, model=model)
    assert [d.hash for d in deltas] == before


def test_bad_input_is_refused_by_place() -> None:
    model = mlp()
    deltas = [peft.lora(model, 2, seed=i) for i in range(3)]
    good = [shots(3) for _ in deltas]
    before = [d.hash for d in deltas]
    x, y = good[1]

    def refused(error: type[Exception], message: str, some: Any, those: Any) -> None:
        with pytest.raises(error, match=message):
            fit_many(some, those, model=model)
        assert [d.hash for d in deltas] == before

    refused(InputError, "got 3 deltas and shots for 2", deltas, good[:2])
    refused(
        InputError, r"deltas\[2\] shares a tensor with deltas\[0\]", [*deltas[:2], deltas[0]], good
    )
    refused(
        InputError,
        r"shots_list\[1\]: shots hold no example",
        deltas,
        [good[0], (x[:0], y[:0]), good[2]],
    )
    refused(
        InputError,
        r"shots_list\[1\]: shots: x holds NaN",
        deltas,
        [good[0], (x * math.nan, y), good[2]],
    )
    refused(
        InputError,
        r"deltas\[1\]: cross_entropy got a label outside 0 \.\. 2",
        deltas,
        [good[0], (x, y + 3), good[2]],
    )
    refused(
        DeltaError,
        r"deltas\[1\]: .*is a snapshot",
        [deltas[0], deltas[1].snapshot(), deltas[2]],
        good,
    )
    other = peft.lora(mlp(), 2)
    refused(DeltaError, "of another base", [deltas[0], other, deltas[2]], good)
    with pytest.raises(InputError, match="whole number of steps"):
        fit_many(deltas, good, steps=0, model=model)


def test_no_deltas_are_no_work() -> None:
    assert fit_many([], []) == []

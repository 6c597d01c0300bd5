"""`peft.fit`: one delta by a few examples. The memo it rests on: test_peft_memo.py."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import arch, peft
from tessera.arch import Delta
from tessera.data import Batch
from tessera.errors import DeltaError, InputError, NonFiniteError
from tessera.peft.descent import Adam, Purse, Stop
from tessera.peft.fit import fit
from tessera.peft.memo import Memo
from tessera.profiler import Budget, Meter


class Residual(nn.Module):
    """Convolutions, batch norm, and writes in place, as vision models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.first(x)))
        out = self.second(h)
        out += h
        return self.head(self.act(out).mean((2, 3)))


class Reader(nn.Module):
    """Attention over tokens; dropout in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    )


def points(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, dtype=torch.float64), torch.arange(n) % 3


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 2, 5, 5, dtype=torch.float64), torch.arange(6) % 3


def words() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 11, (6, 4)), torch.arange(6) % 3


Case = tuple[Callable[[], nn.Module], Callable[[nn.Module], Delta], Callable[[], Any]]
CASES: dict[str, Case] = {
    "lora, top of an MLP": (mlp, lambda m: peft.lora(m, 2, sites=["3"], head="5"), points),
    "lora, everywhere": (mlp, lambda m: peft.lora(m, 2), points),
    "ia3": (mlp, lambda m: peft.ia3(m), points),
    "mask": (
        mlp,
        lambda m: peft.mask(m, {"3.weight": torch.eye(8, dtype=torch.bool)}),
        points,
    ),
    "lora, second convolution": (Residual, lambda m: peft.lora(m, 2, sites=["second"]), images),
    "head of a network that writes in place": (
        Residual,
        lambda m: peft.lora(m, 1, sites=["head"]),
        images,
    ),
    "lora in attention": (
        Reader,
        lambda m: peft.lora(m, 2, sites=["encoder.layers.1.linear1", "encoder.layers.1.self_attn"]),
        words,
    ),
    "prefix": (Reader, lambda m: peft.prefix(m, 2), words),
    "prompt": (Reader, lambda m: peft.prompt(m, 2), words),
}


def made(name: str) -> tuple[nn.Module, Delta, Any]:
    build, lay, shots = CASES[name]
    model = build().double().train()
    delta = lay(model)
    with torch.no_grad():  # away from the start, where half of a LoRA has no gradient
        for i, p in enumerate(delta.parameters()):
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype).roll(i))
    return model, delta, shots()


def in_a_plain_loop(model: nn.Module, delta: Delta, shots: Any, steps: int) -> Delta:
    """The oracle: torch's Adam over the overlay, everything computed every time."""
    model = model.eval()
    mine = delta.trainable()
    optimizer = torch.optim.Adam(mine.parameters(), lr=5e-3)
    under = arch.overlay(model, [(mine, 1.0)])
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(under(shots[0]), shots[1]).backward()
        optimizer.step()
    return mine


@pytest.mark.parametrize("name", CASES)
def test_fit_is_adam_on_the_delta_alone(name: str) -> None:
    model, delta, shots = made(name)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    started = [p.detach().clone() for p in delta.parameters()]
    generator = torch.get_rng_state()
    assert fit(delta, shots, steps=7, model=model) is delta
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    moved = [p.detach() - q for p, q in zip(delta.parameters(), started, strict=True)]
    assert all(m.abs().max() > 1e-3 for m in moved)

    again = delta.trainable()
    with torch.no_grad():
        for p, q in zip(again.parameters(), started, strict=True):
            p.copy_(q)
    wanted = in_a_plain_loop(model, again, shots, 7)
    for p, q in zip(delta.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_what_is_remembered_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, delta, shots = made(name)
    other = delta.trainable()
    fit(delta, shots, steps=6, model=model)
    monkeypatch.setattr(sys.modules["tessera.peft.fit"], "Memo", partial(Memo, on=False))
    fit(other, shots, steps=6, model=model)
    assert delta.hash == other.hash


def test_layers_below_the_delta_run_once() -> None:
    calls: dict[str, int] = {}

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls[self.name] = calls.get(self.name, 0) + 1
            return super().forward(x)

    model = nn.Sequential(nn.Sequential(Counted(5, 5), Counted(5, 5)), Counted(5, 5), Counted(5, 3))
    for name, module in model.named_modules():
        module.name = name
    delta = peft.lora(model, 1, sites=["2"])
    x, y = points(4)
    fit(delta, (x.float(), y), steps=5, model=model)
    assert calls == {"0.0": 1, "0.1": 1, "1": 1, "2": 5}


def test_one_step_by_hand() -> None:
    # Adam's first step is lr against the sign of the gradient, whatever its size.
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    delta = peft.ia3(model, sites=[""])

    def loss(output: Tensor, _: Any) -> Tensor:
        return 1e3 * output[0].sum()  # 1000 (3 gain_0 - 1 gain_1)

    fit(delta, (torch.ones(1, 2), None), steps=1, lr=0.25, loss_fn=loss)
    assert delta.parameters()[0].tolist() == pytest.approx([0.75, 1.25])


def test_adam_is_torchs_also_for_a_tensor_without_gradient_and_half_precision() -> None:
    shapes = [(3, 4), (5,), (2, 2)]
    mine = [torch.randn(s, dtype=torch.float64) for s in shapes]
    theirs = [p.clone().requires_grad_() for p in mine]
    ours, reference = Adam(mine, 1, 0.01), torch.optim.Adam(theirs, lr=0.01)
    for _ in range(5):
        gradients = [torch.randn(s, dtype=torch.float64) for s in shapes]
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.clone()
        ours.step(gradients)
        reference.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    still = torch.ones(2, dtype=torch.bfloat16)
    small = Adam([still], 1, 1e-4)
    for _ in range(100):  # each step is below bfloat16's resolution at 1
        small.step([torch.ones(2, dtype=torch.bfloat16)])
    assert still.float().tolist() == pytest.approx([0.99, 0.99], abs=4e-3)


# --- when it stops -------------------------------------------------------------------------------


def counted(
    values: Iterator[float] | None = None,
) -> tuple[Callable[[Any, Any], Tensor], list[int]]:
    """A loss that counts its calls; its value is cross entropy, or the next of `values`."""
    calls: list[int] = []

    def loss(output: Tensor, y: Any) -> Tensor:
        calls.append(1)
        found = F.cross_entropy(output, y)
        return found if values is None else found * 0 + next(values)

    return loss, calls


def test_it_stops_when_the_loss_is_a_thousandth() -> None:
    model, delta, shots = made("lora, everywhere")
    loss, calls = counted(iter([2.0, 1.0, 0.5, 0.0021, 0.0019, 7.0]))
    fit(delta, shots, steps=20, loss_fn=loss, model=model)
    assert len(calls) == 5


def test_it_stops_when_the_loss_falls_no_more() -> None:
    model, delta, shots = made("lora, everywhere")
    loss, calls = counted(iter([2.0, 1.0] + [0.9995] * 50))
    fit(delta, shots, steps=40, loss_fn=loss, model=model)
    assert len(calls) == 12


def test_a_loss_below_zero_stops_only_when_it_falls_no_more() -> None:
    stop = Stop(parts=1)
    assert [stop(-1.0 - i) for i in range(30)] == [False] * 30
    assert [stop(-30.0) for _ in range(10)] == [False] * 9 + [True]


def test_a_fit_of_several_batches_judges_whole_passes() -> None:
    stop = Stop(parts=2)
    # Passes: 2.0, then 0.001; a single low batch inside a pass decides nothing.
    assert [stop(v) for v in (2.0, 2.0, 0.0, 0.002)] == [False, False, False, True]


class Clock:
    """A fake clock that a loss moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def meter(self) -> Meter:
        return Meter(clock=self, cpu_clock=self, powercap="no such folder", watts_per_core=2.0)


@pytest.mark.parametrize("cap", ["ms", "joules"])
def test_a_budget_ends_it_before_a_step_that_would_cross_it(cap: str) -> None:
    model, delta, shots = made("lora, everywhere")
    clock = Clock()

    def loss(output: Tensor, y: Tensor) -> Tensor:
        clock.now += 0.010  # 10 ms, 0.02 J
        return F.cross_entropy(output, y)

    budget = Budget(**{cap: {"ms": 45.0, "joules": 0.09}[cap]}, meter=clock.meter())
    fit(delta, shots, steps=20, loss_fn=loss, budget=budget, model=model)
    assert budget.stopped_by == cap
    assert budget.spent.ms == pytest.approx(40.0)
    assert budget.spent.joules == pytest.approx(0.08)
    assert all(p.isfinite().all() for p in delta.parameters())


def test_a_budget_that_the_preparation_uses_up_leaves_the_delta_as_it_was() -> None:
    model, delta, shots = made("lora, everywhere")
    clock, before = Clock(), delta.hash

    def loss(output: Tensor, y: Tensor) -> Tensor:
        clock.now += 1.0
        return F.cross_entropy(output, y)

    budget = Budget(ms=500, meter=clock.meter())
    fit(delta, shots, loss_fn=loss, budget=budget, model=model)
    assert (budget.stopped_by, delta.hash) == ("ms", before)


@pytest.mark.parametrize(
    ("cap", "steps", "done", "why"), [(3, 20, 3, "steps"), (9, 4, 4, None), (4, 4, 4, "steps")]
)
def test_a_budget_of_steps(cap: int, steps: int, done: int, why: str | None) -> None:
    model, delta, shots = made("lora, everywhere")
    other = delta.trainable()
    budget = Budget(steps=cap)
    fit(delta, shots, steps=steps, budget=budget, model=model)
    assert budget.stopped_by == why
    fit(other, shots, steps=done, model=model)
    assert delta.hash == other.hash


def test_a_stop_by_itself_is_not_the_budgets() -> None:
    model, delta, shots = made("lora, everywhere")
    loss, calls = counted(iter([2.0, 1.0, 0.001]))
    budget = Budget(steps=10, ms=1e6)
    fit(delta, shots, loss_fn=loss, budget=budget, model=model)
    assert (len(calls), budget.stopped_by) == (3, None)
    assert 0 < budget.spent.ms < 1e6


def test_what_several_loops_share_is_divided() -> None:
    clock = Clock()
    budget = Budget(ms=100, meter=clock.meter())
    purse, counts = Purse(budget), []
    for waiting in (1, 0):
        count = 0
        for _ in purse.units(1000, waiting):
            clock.now += 0.010
            count += 1
        counts.append(count)
    assert counts == [5, 5]


# --- shots ---------------------------------------------------------------------------------------


def test_a_list_takes_one_batch_a_step_in_an_order_by_seed() -> None:
    model, delta, _ = made("lora, everywhere")
    batches = [Batch(torch.randn(2, 5).double(), torch.tensor([i, i])) for i in range(3)]
    seen: list[int] = []

    def loss(output: Tensor, y: Tensor) -> Tensor:
        seen.append(int(y[0]))
        return F.cross_entropy(output, y)

    others = [delta.trainable() for _ in range(3)]
    fit(delta, batches, steps=9, loss_fn=loss, model=model, seed=1)
    passes = [seen[i : i + 3] for i in (0, 3, 6)]
    assert all(sorted(p) == [0, 1, 2] for p in passes)
    assert len({tuple(p) for p in passes}) > 1
    for other, seed in zip(others, (1, 2, 3), strict=True):
        fit(other, batches, steps=9, model=model, seed=seed)
    assert others[0].hash == delta.hash
    assert len({other.hash for other in others}) > 1


def test_the_caller_may_be_in_no_grad_or_inference_mode() -> None:
    model, delta, (x, y) = made("lora, everywhere")
    others = [delta.trainable() for _ in range(2)]
    fit(delta, (x, y), steps=3, model=model)
    with torch.no_grad():
        fit(others[0], (x, y), steps=3, model=model)
    with torch.inference_mode():
        fit(others[1], (x + 0, y + 0), steps=3, model=model)
    assert others[0].hash == others[1].hash == delta.hash


def test_fits_in_threads_over_one_base() -> None:
    model = mlp().double()
    deltas = [peft.lora(model, 2, sites=["3"], head="5", seed=i) for i in range(6)]
    alone, batches = [d.trainable() for d in deltas], [points() for _ in deltas]
    for delta, batch in zip(alone, batches, strict=True):
        fit(delta, batch, steps=10, model=model)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda d, b: fit(d, b, steps=10, model=model), deltas, batches))
    assert [d.hash for d in deltas] == [d.hash for d in alone]


def test_nothing_of_a_fit_is_left_in_memory() -> None:
    refs: list[weakref.ref[Tensor]] = []
    model = mlp().double()

    def loss(output: Tensor, y: Tensor) -> Tensor:
        refs.append(weakref.ref(output))
        return F.cross_entropy(output, y)

    class Below(nn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            found = super().forward(x)
            refs.append(weakref.ref(found))
            return found

    model[1] = Below()  # what is kept is its output
    delta = peft.lora(model, 2, sites=["3"])
    gc.collect()
    gc.disable()
    try:
        fit(delta, points(), steps=3, loss_fn=loss, model=model)
        assert len(refs) == 4
        assert [ref() for ref in refs] == [None] * 4
    finally:
        gc.enable()


def test_a_delta_of_a_part_is_fitted_through_the_whole() -> None:
    model = arch.root(mlp().double())
    delta = peft.lora(model[3], 2)
    other = peft.lora(model, 2, sites=["3"])
    assert len(delta.parameters()) == len(other.parameters())
    with torch.no_grad():
        for p, q in zip(delta.parameters(), other.parameters(), strict=True):
            q.copy_(p)
    shots = points()
    fit(delta, shots, steps=4)
    fit(other, shots, steps=4)
    for p, q in zip(delta.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_it_learns_classes_from_a_few_shots() -> None:
    model = mlp().eval()
    centres = 2 * torch.randn(3, 5)
    shots = Batch(centres.repeat(2, 1) + 0.3 * torch.randn(6, 5), torch.arange(6) % 3)
    asked = centres.repeat(30, 1) + 0.3 * torch.randn(90, 5)
    delta = peft.lora(model, 2, head="5")
    fit(delta, shots, steps=60, lr=2e-2)
    right = (peft.apply(model, delta)(asked).argmax(1) == torch.arange(90) % 3).double().mean()
    assert right > 0.9


# --- what is refused -----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_puts_everything_back() -> None:
    model, delta, shots = made("lora, everywhere")
    before = delta.hash
    loss, calls = counted(iter([2.0, 1.5, math.nan]))
    with pytest.raises(NonFiniteError, match=r"peft\.fit: the loss at step 2 is nan.*as it was"):
        fit(delta, shots, loss_fn=loss, model=model)
    assert len(calls) == 3
    assert delta.hash == before
    loss, _ = counted(iter([2.0, math.inf]))
    with pytest.raises(NonFiniteError, match="at step 1 is inf"):
        fit(delta, shots, loss_fn=loss, model=model)
    assert delta.hash == before


def test_values_that_are_not_finite_put_everything_back() -> None:
    model, delta, shots = made("lora, everywhere")
    before = delta.hash
    with pytest.raises(NonFiniteError, match="NaN or infinite; the delta is as it was"):
        # The loss is 0, the slope of its root is not.
        fit(delta, shots, steps=1, loss_fn=lambda o, _: (o * 0).sum().sqrt(), model=model)
    assert delta.hash == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_any_exception_puts_everything_back(error: type[BaseException]) -> None:
    model, delta, shots = made("lora, everywhere")
    before, calls = delta.hash, [0]

    def loss(output: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise error
        return F.cross_entropy(output, y)

    budget = Budget(steps=5)
    with pytest.raises(error):
        fit(delta, shots, loss_fn=loss, model=model, budget=budget)
    assert delta.hash == before
    assert budget.spent.ms > 0
    assert fit(delta, shots, model=model).hash != before


X, Y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no shots": ([], {}, "needs shots, got an empty list"),
    "no rows": ((X[:0], Y[:0]), {}, "hold no example: x has 0 rows"),
    "one of a list": ([(X, Y), (X[:0], Y[:0])], {}, r"shots\[1\] hold no example"),
    "no pair": (X, {}, r"must be a data\.Batch.*got shape \(4, 5\)"),
    "three": ((X, Y, Y), {}, "got tuple of 3"),
    "x of text": ((["a"], Y), {}, "x must be a tensor or a mapping of tensors, got list"),
    "lengths": ((X, Y[:3]), {}, r"equally many rows.*'x': 4, 'y': 3"),
    "lengths by name": (({"input": X, "more": X[:2]}, Y), {}, "equally many rows"),
    "nan": ((X.index_fill(0, torch.tensor([2]), math.nan), Y), {}, "x holds NaN, first in row 2"),
    "nan by name": (({"input": X * math.nan}, Y), {}, r"x\['input'\] holds NaN, first in row 0"),
    "float labels": ((X, Y.float()), {}, r"int64 class indices, got torch\.float32"),
    "float64 x": ((X.double(), Y), {}, r"x is torch\.float64.*give x\.to\(torch\.float32\)"),
    "unseen class": ((X, Y + 1), {}, r"label outside 0 \.\. 2: labels span 1 \.\. 3"),
    "negative class": ((X, Y - 1), {}, r"label outside 0 \.\. 2: labels span -1 \.\. 1"),
    "no labels": ((X, None), {}, r"needs labels: shots = \(x, y\)"),
    "steps": ((X, Y), {"steps": 0}, "whole number of steps >= 1, got 0"),
    "steps as float": ((X, Y), {"steps": 2.5}, "whole number of steps >= 1, got 2.5"),
    "lr": ((X, Y), {"lr": 0.0}, "lr > 0 and finite, got 0.0"),
    "lr nan": ((X, Y), {"lr": math.nan}, "lr > 0 and finite, got nan"),
    "loss by row": (
        (X, Y),
        {"loss_fn": partial(F.cross_entropy, reduction="none")},
        r"loss_fn must return a 0-d tensor, got shape \(4,\)",
    ),
    "loss of nothing": (
        (X, Y),
        {"loss_fn": lambda output, y: output.detach().sum()},
        "does not depend on the delta",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_by_name_and_changes_nothing(name: str) -> None:
    shots, settings, message = REFUSED[name]
    model = mlp()
    delta = peft.lora(model, 2)
    before = delta.hash
    with pytest.raises(InputError, match=message):
        fit(delta, shots, model=model, **settings)
    assert delta.hash == before


def test_a_delta_that_cannot_be_fitted() -> None:
    model = mlp()
    delta = peft.lora(model, 2)
    with pytest.raises(DeltaError, match=r"is a snapshot.*fit delta\.trainable\(\)"):
        fit(delta.snapshot(), (X, Y), model=model)
    with pytest.raises(DeltaError, match="of another base"):
        fit(delta, (X, Y), model=mlp())
    with pytest.raises(DeltaError, match=r"needs a delta, as peft\.lora"):
        fit(model, (X, Y))
    del model
    gc.collect()
    with pytest.raises(DeltaError, match=r"does not know the base.*Say model="):
        fit(delta, (X, Y))


def test_an_output_without_loss_or_logits_needs_a_loss() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    model = Pair(5, 3)
    delta = peft.lora(model, 2, sites=[""])
    with pytest.raises(InputError, match="needs loss_fn=: the output, tuple, has no loss"):
        fit(delta, (X, Y), model=model)
    before = delta.hash
    fit(delta, (X, Y), model=model, loss_fn=lambda output, y: F.cross_entropy(output[0], y))
    assert delta.hash != before


# --- transformers --------------------------------------------------------------------------------


def tiny(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="over a model of transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=30, intermediate_size=32, max_position_embeddings=16, num_labels=3, **shape
    )
    return getattr(transformers, kind)(config).double()


def test_a_classifier_of_transformers_by_its_logits_and_by_its_own_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("BertForSequenceClassification")
    top = ["bert.encoder.layer.2.attention.self.query"]
    deltas = [peft.lora(model, 2, sites=top, head="classifier") for _ in range(3)]
    ids, y = torch.randint(1, 30, (4, 6)), torch.tensor([0, 1, 2, 0])
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fit(deltas[0], (x, y), steps=4)
    fit(deltas[1], {**x, "labels": y}, steps=4)
    for p, q in zip(deltas[0].parameters(), deltas[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    monkeypatch.setattr(sys.modules["tessera.peft.fit"], "Memo", partial(Memo, on=False))
    fit(deltas[2], (x, y), steps=4)
    assert deltas[2].hash == deltas[0].hash
    assert deltas[0].hash != peft.lora(model, 2, sites=top, head="classifier").hash


def test_a_translator_of_transformers_runs_its_encoder_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transformers = pytest.importorskip("transformers", reason="over a model of transformers")
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, pad_token_id=0
    )
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config).double()
    delta = peft.lora(model, 2, sites=["decoder.block.1.layer.0.SelfAttention.q"])
    ids, other, kept = torch.randint(1, 30, (3, 7)), delta.trainable(), []
    shots = {"input_ids": ids, "labels": ids}
    close = Memo.close
    monkeypatch.setattr(Memo, "close", lambda memo: (kept.extend(memo.kept(0)), close(memo)))
    fit(delta, shots, steps=4, model=model)
    assert {"encoder", "decoder.block.0"} <= set(kept)
    monkeypatch.setattr(sys.modules["tessera.peft.fit"], "Memo", partial(Memo, on=False))
    fit(other, shots, steps=4, model=model)
    assert delta.hash == other.hash


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_in_transformers_are_remembered_right(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("BertForSequenceClassification")
    delta = getattr(peft, kind)(model, 2)
    other = delta.trainable()
    x = {"input_ids": torch.randint(1, 30, (4, 6)), "attention_mask": torch.ones(4, 6).long()}
    fit(delta, (x, torch.tensor([0, 1, 2, 0])), steps=4, model=model)
    monkeypatch.setattr(sys.modules["tessera.peft.fit"], "Memo", partial(Memo, on=False))
    fit(other, (x, torch.tensor([0, 1, 2, 0])), steps=4, model=model)
    assert delta.hash == other.hash

"""What the engine answers is what each delta answers alone; and it can be computed again."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait

import pytest
import torch
from torch import nn

from tessera import peft, random
from tessera.errors import BusyError, DeltaError, InputError, UnknownNameError
from tessera.serve.again import execute
from tessera.serve.batch import Plan
from tessera.serve.engine import Engine


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, input):
        if bool((input == 666).any()):
            raise RuntimeError("the model's own failure")
        return self.two(torch.tanh(self.one(input)))


@pytest.fixture
def model():
    return Net().eval()


@pytest.fixture
def deltas(model):
    found = {}
    for seed in range(5):
        delta = peft.lora(model, 1 + seed % 2, sites=["one", "two"][: 1 + seed % 2])
        draw = random.generator(seed, "tests.engine")
        for tensor in delta.parameters():
            tensor.data.copy_(torch.randn(tensor.shape, generator=draw))
        found[delta.hash] = delta.snapshot()
    return found


@pytest.fixture
def start(model, deltas):
    engines = []

    def make(**settings):
        settings.setdefault("deadline_ms", 30.0)
        engines.append(Engine(model, load, **settings))
        return engines[-1]

    def load(name):
        if name not in deltas:
            raise UnknownNameError(f"no delta {name}")
        return deltas[name]

    make.load = load
    yield make
    for engine in engines:
        engine.close(drain=False)


def right(model, deltas, x, name):
    with torch.no_grad():
        return (peft.apply(model, deltas[name]) if name else model)(x)


def test_rows_of_many_in_one_batch(start, model, deltas):
    ran = []
    engine = start(on_batch=ran.append)
    names, x = [*deltas, ""], torch.randn(6, 2, 6)
    futures = [engine.submit({"input": x[i]}, n, tenant=f"t{i}") for i, n in enumerate(names)]
    for i, (name, future) in enumerate(zip(names, futures, strict=True)):
        answer = future.result(10)
        assert answer.delta == name
        assert torch.allclose(answer.outputs["output"], right(model, deltas, x[i], name), atol=1e-5)
    assert sum(len(r.plan.parts) for r in ran) == 6
    assert len(ran) <= 2
    assert {t for r in ran for t in r.tenants} == {f"t{i}" for i in range(6)}


def test_more_deltas_than_slots(start, model, deltas):
    engine, names = start(slots=2, deadline_ms=1.0), list(deltas)
    for call in range(40):
        name, x = names[(call * call) % 5], torch.randn(3, 6)
        answer = engine.submit({"input": x}, name, tenant="t").result(10)
        assert torch.allclose(answer.outputs["output"], right(model, deltas, x, name), atol=1e-5)
    together = [engine.submit({"input": torch.ones(1, 6)}, n, tenant=n) for n in names]
    for name, future in zip(names, together, strict=True):
        wanted = right(model, deltas, torch.ones(1, 6), name)
        assert torch.allclose(future.result(10).outputs["output"], wanted, atol=1e-5)


def test_the_same_bits_again(start, model, deltas):
    """Without the other requests' values, from the log's words alone."""
    plans = {}
    engine = start(on_batch=lambda r: plans.update({r.batch: r.plan.json()}))
    names, draw = [*deltas, "", ""], random.generator(0, "tests.again")
    asked = []
    for call in range(60):
        x = torch.randn(1 + call % 4, 6, generator=draw)
        name = names[call % 7]
        asked.append((x, engine.submit({"input": x}, name, tenant=f"t{call % 3}")))
    assert wait([f for _, f in asked], 20).not_done == set()
    assert max(len(p["parts"]) for p in plans.values()) > 3
    for x, future in asked:
        answer = future.result()
        plan = Plan.parse(plans[answer.batch])
        again = execute(model, plan, answer.part, {"input": x}, start.load)
        assert torch.equal(again["output"], answer.outputs["output"])


def test_tenants_take_turns(start):
    order = []
    engine = start(max_rows=2, deadline_ms=0.0, on_batch=lambda r: order.extend(r.tenants))
    block = threading.Event()
    engine._on_batch, told = (lambda r: (order.extend(r.tenants), block.wait(5))), None
    first = engine.submit({"input": torch.ones(1, 6)}, "", tenant="z")
    time.sleep(0.05)
    many = [engine.submit({"input": torch.ones(1, 6)}, "", tenant="busy") for _ in range(8)]
    few = [engine.submit({"input": torch.ones(1, 6)}, "", tenant="quiet") for _ in range(2)]
    block.set()
    wait([first, *many, *few], 10)
    assert told is None
    assert order[1:5].count("quiet") == 2


def test_cancelled_and_late_requests_are_not_run(start):
    ran = []
    engine = start(deadline_ms=200.0, on_batch=ran.append)
    cancelled = engine.submit({"input": torch.ones(1, 6)}, "", tenant="a")
    late = engine.submit({"input": torch.ones(1, 6)}, "", tenant="b", timeout_s=0.01)
    kept = engine.submit({"input": torch.ones(1, 6)}, "", tenant="c")
    assert cancelled.cancel()
    assert kept.result(10).outputs["output"].shape == (1, 3)
    with pytest.raises(BusyError, match="waited too long"):
        late.result(10)
    assert [list(r.tenants) for r in ran] == [["c"]]


def test_one_bad_request_does_not_spoil_the_others(start, model, deltas):
    engine = start()
    good = engine.submit({"input": torch.ones(2, 6)}, "", tenant="a")
    bad = engine.submit({"input": torch.full((1, 6), 666.0)}, "", tenant="b")
    with pytest.raises(InputError, match=r"could not run this request.*own failure"):
        bad.result(10)
    wanted = right(model, deltas, torch.ones(2, 6), "")
    assert torch.allclose(good.result(10).outputs["output"], wanted, atol=1e-6)


def test_a_delta_of_another_base_spoils_its_own_request_only(start, model, deltas):
    name = next(iter(deltas))
    other = peft.lora(Net(), 1).snapshot()
    deltas[other.hash] = other
    engine = start()
    good = engine.submit({"input": torch.ones(2, 6)}, name, tenant="a")
    bad = engine.submit({"input": torch.ones(2, 6)}, other.hash, tenant="b")
    with pytest.raises(DeltaError, match="another base"):
        bad.result(10)
    wanted = right(model, deltas, torch.ones(2, 6), name)
    assert torch.allclose(good.result(10).outputs["output"], wanted, atol=1e-5)


def test_full_and_closed(start):
    engine = start(max_rows=2, queue_rows=4, deadline_ms=500.0)
    block = threading.Event()
    engine._on_batch = lambda r: block.wait(5)
    running = engine.submit({"input": torch.ones(2, 6)}, "", tenant="a")
    time.sleep(0.1)
    queued = [engine.submit({"input": torch.ones(2, 6)}, "", tenant="a") for _ in range(2)]
    with pytest.raises(BusyError, match="4 rows are waiting, and the queue holds 4"):
        engine.submit({"input": torch.ones(1, 6)}, "", tenant="b")
    block.set()
    engine.close()
    assert all(f.result(1).outputs["output"].shape == (2, 3) for f in [running, *queued])
    with pytest.raises(BusyError, match="shutting down"):
        engine.submit({"input": torch.ones(1, 6)}, "", tenant="a")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "at least one input tensor"),
        ({"input": torch.tensor(1.0)}, "has no batch"),
        ({"input": torch.ones(0, 6)}, "has 1 .. 64 rows, got 0"),
        ({"input": torch.ones(65, 6)}, "has 1 .. 64 rows, got 65"),
        ({"a": torch.ones(2, 6), "b": torch.ones(3, 6)}, "different numbers of rows"),
        ({"input": torch.ones(2, 5)}, "could not run this request"),
        ({"other": torch.ones(2, 6)}, "could not run this request"),
    ],
)
def test_bad_inputs(start, inputs, message):
    engine = start(deadline_ms=0.0)
    with pytest.raises(InputError, match=message):
        engine.submit(inputs, "", tenant="a").result(10)
    assert engine.submit({"input": torch.ones(1, 6)}, "", tenant="a").result(10)


def test_unknown_delta_is_no_base(start):
    with pytest.raises(UnknownNameError):
        start().submit({"input": torch.ones(1, 6)}, "0" * 64, tenant="a")


@pytest.mark.parametrize("settings", [{"slots": 0}, {"buckets": [4, 2]}, {"queue_rows": 1}])
def test_bad_settings(model, settings):
    with pytest.raises(InputError, match="an engine needs"):
        Engine(model, lambda name: None, **settings)


def test_sequences_in_buckets():
    """A row's bits do not depend on its company, padding in a neighbour's mask included."""
    transformers = pytest.importorskip("transformers", reason="over a model of transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=40, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config).eval()
    deltas = {}
    for seed, fresh in enumerate(
        (peft.lora(model, 2), peft.prompt(model, 2), peft.prefix(model, 3))
    ):
        for tensor in fresh.parameters():
            tensor.data.add_(torch.randn(tensor.shape, generator=random.generator(seed, "seq")))
        deltas[fresh.hash] = fresh.snapshot()
    plans = {}
    engine = Engine(
        model,
        deltas.__getitem__,
        deadline_ms=30.0,
        buckets=(8, 16),
        on_batch=lambda r: plans.update({r.batch: r.plan.json()}),
    )
    draw, asked = random.generator(0, "tests.sequences"), []
    names = [*deltas, ""]
    for call in range(24):
        ids = torch.randint(1, 50, (1 + call % 2, 3 + call % 6), generator=draw)
        inputs = {"input_ids": ids}
        if call % 3:
            inputs["attention_mask"] = torch.ones_like(ids)
        name = names[call % 4]
        asked.append((inputs, name, engine.submit(inputs, name, tenant=f"t{call}")))
    for inputs, name, future in asked:
        answer = future.result(20)
        applied = peft.apply(model, deltas[name]) if name else model
        with torch.no_grad():
            wanted = applied(**inputs).last_hidden_state
        got = answer.outputs["last_hidden_state"]
        assert got.shape == wanted.shape
        assert torch.allclose(got, wanted, atol=1e-5)
        plan = Plan.parse(plans[answer.batch])
        again = execute(model, plan, answer.part, inputs, deltas.__getitem__)
        assert torch.equal(again["last_hidden_state"], got)
    assert any(len(p["parts"]) > 2 for p in plans.values())
    with pytest.raises(InputError, match="longer than the longest bucket 16"):
        engine.submit({"input_ids": torch.ones(1, 17, dtype=torch.int64)}, "", tenant="a")
    engine.close()

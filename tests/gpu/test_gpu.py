"""What is computed on a GPU is what the CPU computes; skipped where there is none.

python -m pytest tests/gpu            # on a machine with CUDA
TESSERA_TEST_DEVICE=cpu python -m pytest tests/gpu     # the tests themselves, anywhere
"""

from __future__ import annotations

import importlib
import os
import threading

import pytest
import torch
from torch import nn

from tessera import arch, checkpoint, data, loss, meta, opt, peft, profiler, random
from tessera import graph as tg
from tessera import ops as T
from tessera.errors import InputError
from tessera.serve.engine import Engine

DEVICE = os.environ.get("TESSERA_TEST_DEVICE", "cuda")

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU here"
)


def net(device: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Convolution, norm and two linear layers: the same weights wherever it is."""
    draw = random.generator(0, "tests.gpu")
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 16),
        nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3),
    )  # fmt: skip
    for tensor in model.parameters():
        tensor.data.copy_(0.2 * torch.randn(tensor.shape, generator=draw))
    return model.to(device, dtype)


def rows(count: int, device: str, *, seed: int = 0, dtype=torch.float64) -> data.Batch:
    draw = random.generator(seed, "tests.gpu.rows")
    x = torch.randn(count, 1, 8, 8, generator=draw).to(device, dtype)
    return data.Batch(x, torch.randint(0, 3, (count,), generator=draw).to(device))


def close(one, other, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(one.cpu(), other.cpu(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_the_fisher_is_the_cpus(estimator):
    found = {}
    for device in ("cpu", DEVICE):
        model = net(device)
        batches = [rows(32, device, seed=s) for s in range(2)]
        anchor = arch.anchor_from(model, "task1", data=batches, estimator=estimator)
        found[device] = anchor.fisher
        assert all(f.device.type == torch.device(device).type for f in anchor.fisher.values())
    for name, value in found["cpu"].items():
        close(found[DEVICE][name], value)


@pytest.mark.parametrize("way", ["ewc", "consolidate", "ogd", "si", "l2sp"])
def test_steps_under_each_penalty_end_where_the_cpus_do(way):
    found = {}
    for device in ("cpu", DEVICE):
        model = net(device)
        plugins = [opt.path_integral()] if way == "si" else [opt.ogd()] if way == "ogd" else []
        first = tg.SGD(model.parameters(), lr=0.05, plugin=plugins)

        @tg.training_step(optimizer=first)
        def before(batch, model=model):
            return T.cross_entropy(model(batch.x), batch.y)

        for seed in range(3):
            before(rows(16, device, seed=seed))
        fisher = None if way in ("si", "l2sp") else "diagonal"
        own = None if fisher is None else [rows(16, device)]
        anchor = arch.anchor_from(model, "one", fisher=fisher, data=own)
        plugins = [opt.consolidate(anchor, lam=5.0)] if way == "consolidate" else plugins
        optimizer = first if way in ("ogd", "si") else tg.Adam(
            model.parameters(), lr=1e-3, plugin=plugins
        )  # fmt: skip

        @tg.training_step(optimizer=optimizer)
        def step(batch, model=model, anchor=anchor):
            task = T.cross_entropy(model(batch.x), batch.y)
            if way == "ewc":
                return task + loss.ewc(model, anchor, lam=5.0)
            if way == "si":
                return task + loss.si(model, anchor, c=0.1)
            return task + loss.l2sp(model, anchor, lam=0.1) if way == "l2sp" else task

        for seed in range(10, 14):
            step(rows(16, device, seed=seed))
        found[device] = dict(model.named_parameters())
    for name, value in found["cpu"].items():
        close(found[DEVICE][name].detach(), value.detach(), rtol=1e-6, atol=1e-8)


KINDS = {
    "lora": lambda m: peft.lora(m, 2),
    "ia3": lambda m: peft.ia3(m, sites=["4", "7"]),
    "mask": lambda m: peft.mask(m, ["7.bias", "0.weight"]),
    "head": lambda m: peft.lora(m, 1, sites=["4"], head="7"),
}


def drawn(model: nn.Module, kind: str, seed: int) -> arch.Delta:
    delta, draw = KINDS[kind](model), random.generator(seed, "tests.gpu.delta")
    for tensor in delta.parameters():
        tensor.data.add_(torch.randn(tensor.shape, generator=draw).to(tensor))
    return delta


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_applied_and_fitted_is_the_cpus(kind):
    found = {}
    for device in ("cpu", DEVICE):
        model, batch = net(device).eval(), rows(8, device)
        delta = drawn(model, kind, 1)
        before = peft.apply(model, delta)(batch.x)
        peft.fit(delta, batch, steps=5, lr=1e-2)
        found[device] = before, delta.tensors
    close(found[DEVICE][0], found["cpu"][0])
    for name, value in found["cpu"][1].items():
        close(found[DEVICE][1][name].detach(), value.detach(), rtol=1e-6, atol=1e-8)


def test_rows_of_a_stack_are_what_each_delta_gives_alone():
    model = net(DEVICE, torch.float32).eval()
    deltas = [drawn(model, kind, seed) for seed, kind in enumerate(KINDS)]
    x = rows(9, DEVICE, dtype=torch.float32).x
    at = torch.arange(9, device=DEVICE) % len(deltas)
    with torch.no_grad():
        mixed = peft.apply(model, peft.stack(deltas))(x, rows=at)
        for row in range(9):
            alone = peft.apply(model, deltas[row % len(deltas)])(x[row : row + 1])
            close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_engine_isolates_tenants_and_computes_an_answer_again():
    pytest.importorskip("alembic", reason="the extra serve is not installed")
    execute = importlib.import_module("tessera.serve.again").execute
    model = net(DEVICE, torch.float32).eval()
    model = Named(model)
    deltas = {}
    for seed in range(6):
        delta = peft.lora(model, 2, seed=seed)
        draw = random.generator(seed, "tests.gpu.delta")
        for tensor in delta.parameters():
            tensor.data.add_(torch.randn(tensor.shape, generator=draw).to(tensor))
        deltas[delta.hash] = delta.snapshot()
    seen = []
    engine = Engine(model, deltas.__getitem__, slots=3, deadline_ms=1.0, on_batch=seen.append)
    xs = {name: rows(2, "cpu", seed=s, dtype=torch.float32).x for s, name in enumerate(deltas)}
    with torch.no_grad():
        wanted = {n: peft.apply(model, deltas[n])(x.to(DEVICE)).cpu() for n, x in xs.items()}
    answers, faults = [], []

    def ask(offset):
        names = list(deltas)
        for turn in range(40):
            name = names[(turn + offset) % len(names)]
            got = engine.submit({"input": xs[name]}, name, tenant=name).result()
            answers.append((name, got))
            if not torch.allclose(got.outputs["output"].cpu(), wanted[name], rtol=1e-3, atol=1e-4):
                faults.append((name, got))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert len(answers) == 160
    assert not faults
    plans = {ran.batch: ran.plan for ran in seen}
    for name, got in answers[:: len(answers) // 20]:
        again = execute(model, plans[got.batch], got.part, {"input": xs[name]}, deltas.__getitem__)
        assert torch.equal(again["output"].cpu(), got.outputs["output"].cpu())


class Named(nn.Module):
    """With a name for its input, as the engine wants it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input):
        return self.inner(input)


def test_a_checkpoint_and_a_delta_move_between_devices(tmp_path):
    model = net(DEVICE, torch.float32).eval()
    state = checkpoint.State(weights=model.state_dict(), step=3)
    checkpoint.save(tmp_path / "c", state)
    other = net("cpu", torch.float32).eval()
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.zero_()
    other.load_state_dict(checkpoint.load(tmp_path / "c").weights)
    x = rows(4, "cpu", dtype=torch.float32).x
    with torch.no_grad():
        close(model(x.to(DEVICE)), other(x), rtol=1e-4, atol=1e-5)
        delta = drawn(model, "lora", 0)
        delta.save(tmp_path / "d")
        loaded = arch.Delta.load(tmp_path / "d")
        assert loaded.hash == delta.hash
        under = peft.apply(other, loaded)(x)
        close(peft.apply(model, delta)(x.to(DEVICE)), under, rtol=1e-4, atol=1e-5)


def test_replay_gives_rows_to_the_device():
    buffer = data.ReplayBuffer(50, seed=1)
    batch = rows(20, DEVICE)
    buffer.add(batch.x, batch.y)
    x, y = buffer.sample_like(batch.x, ratio=0.5)
    assert x.device == batch.x.device
    assert y.device == batch.x.device
    assert len(x) == 10


def test_a_captured_graph_computes_what_the_function_does():
    model = net(DEVICE)
    batch = rows(4, DEVICE)
    graph = tg.capture(lambda x, y: T.cross_entropy(model(x), y), batch.x, batch.y)
    close(graph.run(batch.x, batch.y).detach(), T.cross_entropy(model(batch.x), batch.y).detach())


def test_energy_is_measured_and_its_source_named():
    x = torch.randn(256, 256, device=DEVICE)
    with profiler.measure() as m:
        for _ in range(20):
            x = torch.tanh(x @ x)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    assert m.ms > 0
    assert m.joules >= 0
    assert m.joules_source in {"nvml", "rapl", "estimate"}


def tasks(device: str, count: int = 4, shots: int = 6) -> tuple[data.Batch, data.Batch]:
    made = [rows(2 * shots, device, seed=100 + i) for i in range(count)]
    sides = [[data.Batch(b.x[part], b.y[part]) for b in made] for part in _halves(shots)]
    support, query = (
        data.Batch(torch.stack([b.x for b in side]), torch.stack([b.y for b in side]))
        for side in sides
    )
    return support, query


def _halves(shots: int) -> tuple[slice, slice]:
    return slice(0, shots), slice(shots, 2 * shots)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("create_graph", [True, False])
def test_a_meta_gradient_is_the_cpus(rule, create_graph):
    found = {}
    rules = {
        "sgd": tg.SGD(0.1),
        "momentum": tg.SGD(0.1, momentum=0.9),
        "adam": tg.Adam(0.01),
    }
    for device in ("cpu", DEVICE):
        model = net(device)
        support, query = tasks(device)
        adapted, state = meta.maml_tasks(
            model, support, inner_opt=rules[rule], K=3, create_graph=create_graph
        )
        T.cross_entropy(adapted(query.x).flatten(0, 1), query.y.flatten()).backward()
        found[device] = [p.grad for p in model.parameters()], state.losses
    for one, other in zip(found["cpu"][0], found[DEVICE][0], strict=True):
        close(other, one, rtol=1e-6, atol=1e-9)
    close(torch.as_tensor(found[DEVICE][1]), torch.as_tensor(found["cpu"][1]))


def test_tasks_together_are_tasks_one_by_one():
    model = net(DEVICE)
    support, query = tasks(DEVICE)
    adapted, _ = meta.maml_tasks(model, support, inner_opt=tg.SGD(0.1), K=3)
    together = adapted(query.x)
    for at in range(len(support.x)):
        own = data.Batch(support.x[at], support.y[at])
        alone, _ = meta.maml_step(model, own, inner_opt=tg.SGD(0.1), K=3)
        close(together[at].detach(), alone(query.x[at]).detach())


@pytest.mark.parametrize("solver", ["CG", "Neumann"])
def test_an_implicit_gradient_is_the_cpus(solver):
    found = {}
    for device in ("cpu", DEVICE):
        model = net(device)
        outer = meta.implicit_bilevel(
            model,
            inner=lambda m: tg.SGD(m, lr=0.1, steps=20),
            train_batch=rows(12, device, seed=1),
            val_batch=rows(12, device, seed=2),
            prox=2.0,
            inner_solve=solver,
            tol=1e-8,
        )
        outer.backward()
        found[device] = [p.grad for p in model.parameters()]
    for one, other in zip(found["cpu"], found[DEVICE], strict=True):
        close(other, one, rtol=1e-5, atol=1e-8)


@pytest.mark.skipif(DEVICE != "cuda", reason="cuDNN is on a GPU alone")
def test_a_recurrent_layer_of_cudnn_is_refused_and_says_what_to_do():
    model = nn.Sequential(Last(nn.LSTM(3, 4, batch_first=True)), nn.Linear(4, 2)).to(DEVICE)
    batch = data.Batch(torch.randn(6, 5, 3, device=DEVICE), torch.zeros(6, dtype=torch.long).cuda())
    with pytest.raises(InputError, match="cudnn"):
        meta.maml_step(model, batch, inner_opt=tg.SGD(0.1), K=2)
    with torch.backends.cudnn.flags(enabled=False):
        adapted, _ = meta.maml_step(model, batch, inner_opt=tg.SGD(0.1), K=2)
        T.cross_entropy(adapted(batch.x), batch.y).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


class Last(nn.Module):
    """What a recurrent layer says at the end."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0][:, -1]

"""Fast weights: the model itself under deltas, for whoever is in the scope and nobody else."""

import asyncio
import copy
import gc
import pickle
import threading
import weakref
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tessera import arch, peft
from tessera import graph as tg
from tessera.arch import Delta, overlay
from tessera.data import Batch
from tessera.errors import DeltaError, InputError, UnknownNameError
from tessera.meta import fast as module
from tessera.meta.fast import fastweights
from tessera.meta.maml import maml_step


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x))

    def tied(self, x):
        return F.linear(self.encoder(x), self.head.weight, self.head.bias)


class Checkpointed(Net):
    def forward(self, x):
        return self.head(checkpoint(self.encoder, x, use_reentrant=False))


def drawn(delta, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in delta.parameters():
            t.copy_(torch.randn(t.shape, generator=g, dtype=t.dtype))
    return delta


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(7))


def enter(model, delta):
    with fastweights(model, delta):
        pass


def call(model, delta, x):
    with fastweights(model, delta):
        return model(x)


def as_it_is(model):
    """Everything a scope might leave behind."""
    tensors = [*model.parameters(), *model.buffers()]
    return (
        [(type(m), sorted(m.__dict__), m.training) for m in model.modules()],
        [(id(t), t._version, t.detach().clone(), t.requires_grad, t.grad) for t in tensors],
    )


def assert_same(before, after):
    assert before[0] == after[0]
    for old, new in zip(before[1], after[1], strict=True):
        assert old[:2] == new[:2]
        assert torch.equal(old[2], new[2])
        assert old[3:] == new[3:]


# --- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "ia3", "mask", "head"])
def test_inside_the_model_is_what_apply_gives_and_outside_the_base(kind, model, x):
    made = {
        "lora": lambda: peft.lora(model, 2),
        "ia3": lambda: peft.ia3(model),
        "mask": lambda: peft.mask(model, "head"),
        "head": lambda: peft.lora(model, 2, sites="encoder.0", head="head"),
    }
    delta, base = drawn(made[kind]()), model(x)
    want = peft.apply(model, delta)(x)
    assert not torch.equal(want, base)
    with fastweights(model, delta):
        assert torch.equal(model(x), want)
        assert torch.equal(model.forward(x), want)
        assert torch.equal(model.head(model.encoder(x)), want)
        assert torch.allclose(model.tied(x), want, atol=1e-5)  # who reads a weight finds it changed
    assert torch.equal(model(x), base)


def test_a_prefix_goes_before_the_sequence():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attend(x, x, x)[0]

    torch.manual_seed(0)
    model, x = Attend().eval(), torch.randn(2, 3, 8)
    delta = drawn(peft.prefix(model, 2))
    with fastweights(model, delta):
        inside = model(x)
    assert torch.equal(inside, peft.apply(model, delta)(x))
    assert not torch.equal(inside, model(x))


def test_a_module_that_is_called_under_two_names_is_changed_in_both(x):
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    delta = drawn(peft.lora(model, 1))
    with fastweights(model, delta):
        assert torch.equal(model(x), peft.apply(model, delta)(x))


def test_a_bare_layer_is_a_model_too(x):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    delta = drawn(peft.lora(layer, 2))
    with fastweights(layer, delta):
        assert torch.equal(layer(x), peft.apply(layer, delta)(x))


# --- it nests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [("head", "head"), ("encoder.0", "head")])
def test_nested_changes_add_up_in_either_order(sites, model, x):
    a, b = (drawn(peft.lora(model, 2, sites=s), i) for i, s in enumerate(sites))
    both = overlay(model, [(a, 1.0), (b, 1.0)])(x)
    with fastweights(model, a), fastweights(model, b):
        assert torch.equal(model(x), both)
    with fastweights(model, b):
        with fastweights(model, a):
            assert torch.allclose(model(x), both, atol=1e-5)
        assert torch.equal(model(x), overlay(model, [(b, 1.0)])(x))
    with fastweights(model, [a, b]):
        assert torch.equal(model(x), both)


@pytest.mark.parametrize("at_home", [True, False])
def test_a_part_and_its_whole_add_up_too(at_home, model, x):
    whole, part = drawn(peft.lora(model, 2), 1), drawn(peft.lora(model.encoder, 2), 2)
    if not at_home:  # as one that was loaded
        part = Delta(kind="lora", tensors=part.tensors, scales=part.scales)
    named = {f"encoder.{n}": t for n, t in part.tensors.items()}
    scales = {f"encoder.{n}": s for n, s in part.scales.items()}
    as_whole = Delta(kind="lora", tensors=named, scales=scales)
    both = overlay(model, [(whole, 1.0), (as_whole, 1.0)])(x)
    alone = overlay(model, [(as_whole, 1.0)])(x)
    with fastweights(model, whole), fastweights(model.encoder, part):
        assert torch.equal(model(x), both)
    with fastweights(model.encoder, part):
        # The whole itself is in no scope, but it calls a part that is.
        assert torch.equal(model(x), alone)
        with fastweights(model, whole):
            assert torch.allclose(model(x), both, atol=1e-5)
        assert torch.equal(model(x), alone)


def test_two_models_do_not_meet(model, x):
    torch.manual_seed(1)
    other = Net().eval()
    a, b = drawn(peft.lora(model, 2), 1), drawn(peft.lora(other, 2), 2)
    with fastweights(model, a), fastweights(other, b):
        assert torch.equal(model(x), peft.apply(model, a)(x))
        assert torch.equal(other(x), peft.apply(other, b)(x))


def test_scopes_over_models_that_share_a_part_are_refused(model, x):
    other = nn.Sequential(model.encoder, nn.Linear(8, 2)).eval()
    with fastweights(model, drawn(peft.lora(model, 2))):
        inside, scope = model(x), fastweights(other, drawn(peft.lora(other, 2)))
        with pytest.raises(InputError, match="neither is a part of the other"):
            scope.__enter__()
        assert torch.equal(model(x), inside)


def test_scopes_may_be_left_in_any_order(model, x):
    a, b = drawn(peft.lora(model, 2), 1), drawn(peft.lora(model, 2), 2)
    before, first, second = as_it_is(model), ExitStack(), ExitStack()
    first.enter_context(fastweights(model, a))
    second.enter_context(fastweights(model, b))
    first.close()
    assert torch.equal(model(x), peft.apply(model, b)(x))
    second.close()
    assert_same(before, as_it_is(model))


# --- who is in the scope ------------------------------------------------------------------------


def test_three_threads_with_two_deltas_and_the_base_never_meet(model, x):
    deltas = [drawn(peft.lora(model, 2), i) for i in range(2)]
    want = [overlay(model, [(d, 1.0)])(x) for d in deltas] + [model(x)]
    assert not torch.equal(want[0], want[1])
    before, barrier = as_it_is(model), threading.Barrier(3)
    wrong, calls = [0, 0, 0], [0, 0, 0]

    def work(i):
        barrier.wait()
        for _ in range(300):
            with ExitStack() as stack:
                if i < 2:
                    stack.enter_context(fastweights(model, deltas[i]))
                wrong[i] += not torch.equal(model(x), want[i])
                wrong[i] += not torch.allclose(model.tied(x), want[i], atol=1e-5)
                calls[i] += 1

    with torch.no_grad():
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == [0, 0, 0]
    assert calls == [300, 300, 300]
    assert_same(before, as_it_is(model))
    assert not module._HELD


def test_asyncio_tasks_have_scopes_of_their_own(model, x):
    deltas = [drawn(peft.lora(model, 2), i) for i in range(3)]
    want = [peft.apply(model, d)(x) for d in deltas]

    async def one(i):
        with fastweights(model, deltas[i]):
            await asyncio.sleep(0)
            here = model(x)
            # A thread that asyncio starts goes on in the scope of who asked for it.
            there = await asyncio.to_thread(model, x)
        return torch.equal(here, want[i]) and torch.equal(there, want[i])

    async def everyone():
        return await asyncio.gather(*map(one, range(3)))

    assert asyncio.run(everyone()) == [True] * 3


def test_a_task_that_outlives_the_scope_it_was_started_in_sees_the_base(model, x):
    a, b = drawn(peft.lora(model, 2), 1), drawn(peft.lora(model, 2), 2)
    base, under_b = model(x), peft.apply(model, b)(x)

    async def late(go):
        await go.wait()
        return model(x)

    async def everyone():
        go = asyncio.Event()
        with fastweights(model, a):
            task = asyncio.create_task(late(go))
            await asyncio.sleep(0)
        with fastweights(model, b):  # so that the model asks who calls
            go.set()
            return await task, model(x)

    outside, inside = asyncio.run(everyone())
    assert torch.equal(outside, base)
    assert torch.equal(inside, under_b)


def test_a_generator_that_waits_in_a_scope_leaves_it_open_and_closes_it(model, x):
    delta, base = drawn(peft.lora(model, 2)), model(x)

    def answers():
        with fastweights(model, delta):
            yield model(x)

    running = answers()
    inside = next(running)
    assert torch.equal(model(x), inside)  # Python gives a generator no context of its own
    running.close()
    assert torch.equal(model(x), base)


def test_what_reads_the_model_instead_of_calling_it_is_not_in_the_scope(model, x):
    a, b = drawn(peft.lora(model, 2), 1), drawn(peft.lora(model, 2), 2)
    alone = overlay(model, [(b, 1.0)])(x)
    shots = Batch(x, torch.tensor([0, 1, 2, 0, 1]))
    step = maml_step(model, shots, inner_opt=tg.SGD(0.1), K=1)[0](x)
    hashed, parameters = arch.base_hash(model), list(map(id, model.parameters()))
    with fastweights(model, a):
        assert torch.equal(peft.apply(model, b)(x), alone)
        assert torch.equal(maml_step(model, shots, inner_opt=tg.SGD(0.1), K=1)[0](x), step)
        assert arch.base_hash(model) == hashed
        assert list(map(id, model.parameters())) == parameters
    assert torch.equal(peft.apply(model, b)(x), alone)


# --- nothing stays ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_on_the_model_after_an_exception_either(training, model, x):
    model.train(training)
    before, delta = as_it_is(model), drawn(peft.lora(model, 2))
    with fastweights(model, delta):
        model(x)
    assert_same(before, as_it_is(model))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call(model, delta, x[:, :2])
    assert_same(before, as_it_is(model))
    assert not module._HELD
    assert module._STATE.get() is module._OUTSIDE


def test_a_scope_keeps_nothing_alive(model, x):
    delta = drawn(peft.lora(model, 2))
    gone = weakref.ref(delta.tensors["head.A"])
    for _ in range(50):
        with fastweights(model, delta), torch.no_grad():
            model(x)
    del delta
    gc.collect()
    assert gone() is None


def test_a_copy_made_in_the_scope_is_of_the_base(model, x):
    with fastweights(model, drawn(peft.lora(model, 2))):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)]
        assert isinstance(model, Net)
    for other in copies:
        assert type(other) is Net
        assert type(other.head) is nn.Linear
        assert torch.equal(other(x), model(x))


# --- gradients ----------------------------------------------------------------------------------


def test_gradients_reach_what_the_delta_was_made_from_and_a_frozen_base_gets_none(model, x):
    model.requires_grad_(False)
    made = peft.lora(model, 2)
    source = {n: torch.randn_like(t, requires_grad=True) for n, t in made.tensors.items()}
    live = Delta(
        kind="lora",
        tensors={n: torch.tanh(t) for n, t in source.items()},
        scales=made.scales,
        base_hash=made.base_hash,
    )
    with fastweights(model, live):
        loss = model(x).square().sum()
    loss.backward()
    ours = {n: t.grad for n, t in source.items()}
    again = {n: torch.tanh(t) for n, t in source.items()}
    plain = overlay(model, [(Delta(kind="lora", tensors=again, scales=made.scales), 1.0)])
    wanted = torch.autograd.grad(plain(x).square().sum(), list(source.values()))
    assert all(torch.equal(g, w) for g, w in zip(ours.values(), wanted, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_it_works_under_vmap_and_func_grad(model, x):
    made = peft.lora(model, 2)
    many = {n: torch.randn(3, *t.shape) for n, t in made.tensors.items()}

    def loss(tensors):
        with fastweights(model, Delta(kind="lora", tensors=tensors, scales=made.scales)):
            return model(x).square().mean()

    batched = torch.func.vmap(torch.func.grad(loss))(many)
    for i in range(3):
        single = torch.func.grad(loss)({n: t[i] for n, t in many.items()})
        for name, g in single.items():
            assert torch.allclose(batched[name][i], g, rtol=1e-4, atol=1e-5)


def gradients(delta, loss):
    return torch.autograd.grad(loss, delta.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_would_compute_the_base_again_is_refused(reentrant, model, x):
    delta, x = drawn(peft.lora(model, 2)), x.requires_grad_()
    with fastweights(model, delta):
        with pytest.raises(InputError, match="within the checkpointed function"):
            checkpoint(model, x, use_reentrant=reentrant)
        with pytest.raises(InputError, match="within the checkpointed function"):
            checkpoint(lambda x: model.head(model.encoder(x)), x, use_reentrant=reentrant)


def test_a_scope_within_the_checkpointed_function_is_right(model, x):
    delta, x = drawn(peft.lora(model, 2)), x.requires_grad_()

    def run(x):
        with fastweights(model, delta):
            return model(x)

    want = gradients(delta, run(x).square().sum())
    got = gradients(delta, checkpoint(run, x, use_reentrant=False).square().sum())
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_a_checkpoint_in_the_models_own_forward_is_right_outside_the_scope(model, x):
    own = Checkpointed().eval()
    own.load_state_dict(model.state_dict())
    delta = drawn(peft.lora(model, 2))
    with fastweights(model, delta):
        want = gradients(delta, model(x).square().sum())
    with fastweights(own, delta):
        loss = own(x).square().sum()
    got = gradients(delta, loss)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_a_checkpoint_of_the_base_whose_backward_runs_in_a_scope_is_right(model, x):
    x = x.requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    loss = checkpoint(model, x, use_reentrant=False).square().sum()
    with fastweights(model, drawn(peft.lora(model, 2))):
        assert torch.equal(torch.autograd.grad(loss, x)[0], want)


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["module", "function", "in place"])
def test_a_compiled_model_follows_the_scope_and_the_thread(how, model, x):
    torch._dynamo.reset()
    model.requires_grad_(False)  # else the compiler asks non-leaves for .grad, and that warns
    deltas = [drawn(peft.lora(model, 2), i).snapshot() for i in range(2)]
    want, base = [peft.apply(model, d)(x) for d in deltas], model(x)
    run = {
        "module": lambda: torch.compile(model, backend="eager"),
        "function": lambda: torch.compile(lambda x: model(x), backend="eager"),
        "in place": lambda: model.compile(backend="eager") or model,
    }[how]()
    seen = []
    for inside in (None, 0, 1, None, 0):
        with ExitStack() as stack:
            if inside is not None:
                stack.enter_context(fastweights(model, deltas[inside]))
            right = base if inside is None else want[inside]
            assert torch.allclose(run(x), right, atol=1e-5)
            other = threading.Thread(target=lambda: seen.append(run(x)))
            other.start()
            other.join()
    assert len(seen) == 5
    assert all(torch.allclose(y, base, atol=1e-5) for y in seen)


def test_a_scope_may_name_the_compiled_shell(model, x):
    torch._dynamo.reset()
    compiled, delta = torch.compile(model, backend="eager"), drawn(peft.lora(model, 2))
    with fastweights(compiled, delta):
        assert torch.allclose(compiled(x), peft.apply(model, delta)(x), atol=1e-5)


def test_one_graph_for_a_call_in_a_scope_is_refused_by_the_compiler(model, x):
    torch._dynamo.reset()
    run = torch.compile(lambda x: model(x), backend="eager", fullgraph=True)
    run(x)
    inside = fastweights(model, drawn(peft.lora(model, 2)))
    with inside, pytest.raises(torch._dynamo.exc.Unsupported, match="who asks must be seen"):
        run(x)
    assert torch.equal(run(x), model(x))


# --- bad input ----------------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_changed(model, x):
    before, delta = as_it_is(model), drawn(peft.lora(model, 2))
    with pytest.raises(InputError, match=r"at least one arch\.Delta"):
        enter(model, [])
    with pytest.raises(InputError, match=r"at least one arch\.Delta"):
        enter(model, [{"head.A": x}])
    with pytest.raises(InputError, match=r"needs a torch\.nn\.Module, got function"):
        enter(enter, delta)
    tensors = {"tail.A": torch.zeros(1, 8), "tail.B": torch.zeros(3, 1)}
    with pytest.raises(UnknownNameError, match="'tail', which this model lacks"):
        enter(model, Delta(kind="lora", tensors=tensors, scales={"tail": 1.0}))
    with pytest.raises(DeltaError, match="is of another base"):
        enter(Net(), delta)
    assert_same(before, as_it_is(model))


def test_a_mode_that_is_changed_in_the_scope_is_an_error(model, x):
    with fastweights(model, drawn(peft.lora(model, 2))):
        model.train()
        with pytest.raises(InputError, match=r"train\(\) or eval\(\) before the scope"):
            model(x)


def test_replicas_in_other_threads_are_refused(model):
    inside = fastweights(model, drawn(peft.lora(model, 2)))
    with inside, pytest.raises(InputError, match="DataParallel"):
        model._replicate_for_data_parallel()
    model._replicate_for_data_parallel()


def test_a_class_that_was_given_meanwhile_stays(model, x):
    delta = drawn(peft.lora(model, 2))
    with fastweights(model, delta):
        nn.utils.parametrizations.weight_norm(model.head)
    assert "weight" in dict(model.head.parametrizations.named_children())
    assert model(x).shape == (5, 3)
    assert not module._HELD

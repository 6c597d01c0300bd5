"""A hypernetwork: zero at the start, its gradient, and deltas that live on without it."""

import copy
import gc
import textwrap
import weakref

import pytest
import torch
from torch import nn

from tessera import arch, peft
from tessera import graph as tg
from tessera import ops as T
from tessera.arch import Delta, overlay
from tessera.data import Batch
from tessera.errors import DeltaError, InputError, UnknownNameError
from tessera.meta.fast import fastweights
from tessera.meta.hyper import HyperNet, Hypernetwork

GUIDE = """
task_embed = meta.task_encoder(context)     # few examples → embedding
fast = meta.hypernet(task_embed)            # produces low-rank deltas
with meta.fastweights(model, fast):         # scoped overlay
    yhat = model(x_support)
"""


class Zoo(nn.Module):
    """One of each family a low rank lies over, and two of one shape."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        h = self.mix(self.words(x).mT).mT
        h = h + self.attend(h, h, h)[0]
        return self.head(torch.tanh(self.left(h)) * self.right(h)).mean(1)


SITES = ["words", "mix", "attend", "left", "right", "head"]


def awake(net, seed=0):
    """`net` as some training might leave it."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g).to(p))
    return net


def mlp(dtype=torch.float32):
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).to(dtype)


def context(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g))


# --- what it emits ------------------------------------------------------------------------------


def test_before_training_every_delta_is_the_base_to_the_last_bit():
    model, x = Zoo().eval(), torch.arange(10).reshape(2, 5)
    net = HyperNet(model, rank=3, embed_dim=7, sites=SITES)
    delta = net(torch.randn(7))
    assert delta.sites == tuple(sorted(SITES))
    with fastweights(model, delta):
        inside = model(x)
    assert torch.equal(inside, model(x))
    with fastweights(model, awake(net)(torch.randn(7))):
        assert not torch.allclose(model(x), inside, atol=1e-3)


def test_one_embedding_one_delta():
    net = awake(HyperNet(mlp(), rank=2, embed_dim=7))  # the base is gone with this line
    with pytest.raises(InputError, match="is gone"):
        net(torch.randn(7))
    model = mlp()
    net = awake(HyperNet(model, rank=2, embed_dim=7))
    a, b = torch.randn(2, 7)
    assert net(a).hash == net(a).hash != net(b).hash
    assert net(a).base_hash == arch.base_hash(model)
    # Sites of one shape share their writer, and still differ.
    tensors = net(a).tensors
    assert not torch.allclose(tensors["2.B"][:, 0], tensors["0.B"][:, 0])


def test_a_small_layer_has_the_rank_it_can_have():
    model = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 2))
    delta = HyperNet(model, rank=4, embed_dim=3)(torch.zeros(3))
    assert {n: tuple(t.shape) for n, t in delta.tensors.items()} == {
        "0.A": (1, 1), "0.B": (5, 1), "2.A": (2, 5), "2.B": (2, 2),
    }  # fmt: skip
    assert dict(delta.scales) == {"0": 1.0, "2": 0.5}


def test_many_tasks_in_one_pass_are_the_same_deltas():
    model = Zoo().eval()
    net = awake(HyperNet(model, rank=2, embed_dim=7, sites=SITES))
    e = torch.randn(3, 7)
    for delta, one in zip(net.many(e), e, strict=True):
        wanted = net(one)
        assert list(delta.tensors) == list(wanted.tensors)
        for name, t in delta.tensors.items():
            assert torch.allclose(t, wanted.tensors[name], atol=1e-5)


def test_rows_of_a_batch_may_each_have_their_own():
    model, x = mlp(), torch.randn(4, 4)
    deltas = awake(HyperNet(model, rank=2, embed_dim=7)).many(torch.randn(3, 7))
    rows = torch.tensor([2, 0, -1, 1])
    with torch.no_grad():
        out = peft.apply(model, peft.stack(deltas))(x, rows=rows)
        for i, slot in enumerate(rows.tolist()):
            alone = model if slot < 0 else overlay(model, [(deltas[slot], 1.0)])
            assert torch.allclose(out[i], alone(x[i : i + 1])[0], atol=1e-5)


def test_a_part_of_a_declared_whole_is_named_as_the_whole_has_it():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return self.body(x)

    model = arch.root(Whole())
    delta = awake(HyperNet(model.body, rank=2, embed_dim=3))(torch.randn(3))
    assert delta.sites == ("body.0", "body.2", "body.4")
    x = torch.randn(2, 4)
    with fastweights(model, delta):
        assert torch.equal(model(x), peft.apply(model, delta)(x))


def test_deltas_have_the_dtype_of_the_base():
    for dtype in (torch.bfloat16, torch.float64):
        model = mlp(dtype)
        delta = HyperNet(model, rank=2, embed_dim=3)(torch.zeros(3))
        assert {t.dtype for t in delta.tensors.values()} == {dtype}
        with fastweights(model, delta):
            assert model(torch.zeros(1, 4, dtype=dtype)).dtype == dtype


# --- what lives on ------------------------------------------------------------------------------


def test_a_delta_is_saved_loaded_and_served_like_any_other(tmp_path):
    model, x = Zoo().eval(), torch.arange(10).reshape(2, 5)
    delta = awake(HyperNet(model, rank=2, embed_dim=7, sites=SITES))(torch.randn(7))
    delta.save(tmp_path / "task")
    loaded, kept = Delta.load(tmp_path / "task"), delta.snapshot()
    assert loaded.hash == delta.hash == kept.hash
    assert not kept.parameters()
    wanted = overlay(model, [(delta, 1.0)])(x)
    assert torch.equal(overlay(model, [(loaded, 1.0)])(x), wanted)
    # A product without gradient takes another way through PyTorch's matmul.
    assert torch.allclose(overlay(model, [(kept, 1.0)])(x), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(DeltaError, match="is of another base"):
        overlay(Zoo(), [(loaded, 1.0)])


def test_what_was_emitted_can_be_fitted_on():
    model = mlp()
    delta = awake(HyperNet(model, rank=2, embed_dim=7))(torch.randn(7)).trainable()
    shots = context()
    before = T.cross_entropy(peft.apply(model, delta)(shots.x), shots.y).item()
    peft.fit(delta, shots, steps=20)
    assert T.cross_entropy(peft.apply(model, delta)(shots.x), shots.y).item() < before


def test_the_base_is_no_part_of_the_module():
    model = mlp()
    net = Hypernetwork(model, in_dim=4, num_classes=3)
    mine = {id(p) for p in model.parameters()}
    assert mine.isdisjoint(map(id, net.parameters()))
    again = Hypernetwork(model, in_dim=4, num_classes=3, seed=5)
    again.load_state_dict(awake(net).state_dict())
    shots = context()
    emitted = [n.hypernet(n.task_encoder(shots)).hash for n in (net, again, copy.deepcopy(net))]
    assert len(set(emitted)) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- it learns ----------------------------------------------------------------------------------


def test_the_guides_block_runs_as_written():
    model = mlp()
    names = {
        "meta": awake(Hypernetwork(model, in_dim=4, num_classes=3)),
        "model": model,
        "context": context(),
        "x_support": torch.randn(2, 4),
    }
    exec(textwrap.dedent(GUIDE), names)
    assert torch.equal(names["yhat"], peft.apply(model, names["fast"])(names["x_support"]))
    assert not torch.equal(names["yhat"], model(names["x_support"]))


@pytest.mark.parametrize("zero", [True, False])
def test_its_gradient_is_that_of_central_differences(zero):
    model, shots, query = mlp(torch.float64), context(), context(5, 1)
    net = Hypernetwork(model, in_dim=4, num_classes=3, embed_dim=5, rank=2).double()
    net = net if zero else awake(net)

    def loss():
        fast = net.hypernet(net.task_encoder(Batch(shots.x.double(), shots.y)))
        with fastweights(model, fast):
            return T.cross_entropy(model(query.x.double()), query.y)

    tensors, eps = [*net.parameters(), *model.parameters()], 1e-5
    grads = torch.autograd.grad(loss(), tensors)
    g = torch.Generator().manual_seed(3)
    for _ in range(3):
        way = [torch.randn(t.shape, dtype=t.dtype, generator=g) for t in tensors]
        ends = []
        for step in (eps, -2 * eps, eps):
            with torch.no_grad():
                for t, w in zip(tensors, way, strict=True):
                    t.add_(w, alpha=step)
            ends.append(loss().item())
        ours = sum((a * w).sum().item() for a, w in zip(grads, way, strict=True))
        assert ours == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-6, abs=1e-9)


def test_a_batch_of_tasks_under_vmap_is_the_loop():
    model = mlp().requires_grad_(False)
    net = awake(Hypernetwork(model, in_dim=4, num_classes=3, rank=2))
    sets = [context(6, i) for i in range(3)]
    x, y = torch.stack([s.x for s in sets]), torch.stack([s.y for s in sets])

    def one(x, y):
        with net.fastweights(model, net.hypernet(net.task_encoder(Batch(x, y)))):
            return T.cross_entropy(model(x), y)

    losses = torch.func.vmap(one)(x, y)
    for i, shots in enumerate(sets):
        assert losses[i].item() == pytest.approx(one(*shots).item(), abs=1e-5)
    together = torch.autograd.grad(losses.mean(), list(net.parameters()))
    apart = torch.autograd.grad(sum(one(*s) for s in sets) / 3, list(net.parameters()))
    for a, b in zip(together, apart, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 8])
def test_it_learns_tasks_the_base_cannot_tell_apart_at_any_rank(rank):
    """The label of x is the sign of w x, and w is another one in each task."""
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).requires_grad_(False)
    net = Hypernetwork(model, in_dim=4, num_classes=2, rank=rank)
    optimizer = tg.Adam(net.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)

    def tasks(n):
        x = torch.randn(n, 24, 4, generator=g)
        return x, (x @ torch.randn(n, 4, 1, generator=g)).squeeze(-1).gt(0).long()

    def answers(x, y):
        with net.fastweights(model, net.hypernet(net.task_encoder(Batch(x[:16], y[:16])))):
            return model(x[16:])

    @tg.training_step(optimizer=optimizer)
    def step(x, y):
        return T.cross_entropy(torch.func.vmap(answers)(x, y).flatten(0, 1), y[:, 16:].flatten())

    for _ in range(150):
        step(*tasks(32))
    with torch.no_grad():
        x, y = tasks(200)
        right = torch.func.vmap(answers)(x, y).argmax(-1) == y[:, 16:]
    assert right.float().mean() > 0.75  # the base cannot be above a half


# --- bad input ----------------------------------------------------------------------------------


def test_bad_input_is_refused():
    model = mlp()
    net = HyperNet(model, rank=2, embed_dim=7)
    for wrong in (torch.zeros(6), torch.zeros(1, 7), [0.0] * 7):
        with pytest.raises(InputError, match=r"takes an embedding \[7\]"):
            net(wrong)
    for wrong in (torch.zeros(7), torch.zeros(0, 7), torch.zeros(2, 6)):
        with pytest.raises(InputError, match=r"many\(\) of them \[tasks, 7\]"):
            net.many(wrong)
    with pytest.raises(UnknownNameError, match="no module 'tail' in the model; it has 0, 2, 4"):
        HyperNet(model, rank=2, embed_dim=7, sites="tail")
    with pytest.raises(InputError, match="is a Tanh, which cannot be a site"):
        HyperNet(model, rank=2, embed_dim=7, sites="1")
    with pytest.raises(InputError, match="a whole rank >= 1, got 0"):
        HyperNet(model, rank=0, embed_dim=7)
    with pytest.raises(InputError, match=r"needs a torch\.nn\.Module, got list"):
        HyperNet([], rank=1, embed_dim=7)
    attend = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    with pytest.raises(InputError, match="different widths"):
        HyperNet(attend, rank=1, embed_dim=7, sites=attend)


def test_a_delta_of_before_the_base_was_trained_on_is_refused():
    model = mlp()
    net = HyperNet(model, rank=2, embed_dim=7)
    old = net(torch.zeros(7))
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(DeltaError, match="is of another base"), fastweights(model, old):
        pass
    with fastweights(model, net(torch.zeros(7))):
        assert model(torch.zeros(1, 4)).shape == (1, 3)

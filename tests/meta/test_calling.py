"""A module as a function of its parameters: the same numbers, and the module untouched."""

import copy
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera.errors import InputError, UnknownNameError
from tessera.meta.calling import Functional
from tessera.meta.guard import Guard

DOUBLE = torch.float64


def net(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)]
    return nn.Sequential(*layers).to(DOUBLE)


def images(n=4, seed=1):
    return torch.randn(n, 1, 4, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def other(f, seed=2):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, dtype=p.dtype, generator=g) for n, p in f.params().items()}


def fingerprint(model):
    """Everything a call could have touched, as bits and as objects."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(n, id(t), t._version, t.detach().clone()) for n, t in tensors],
        [(n, p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in tensors],
        [(n, m.training, sorted(m.__dict__), type(m)) for n, m in model.named_modules()],
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.table(tokens).mean(1))


def layers():
    torch.manual_seed(0)
    weighted = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    return {
        "tied": (Tied(), torch.tensor([[0, 1], [2, 4]])),
        "parametrized": (weighted, torch.randn(2, 4)),
        "lstm": (nn.LSTM(4, 3, num_layers=2, bidirectional=True), torch.randn(5, 2, 4)),
        "gru": (nn.GRU(4, 3), torch.randn(5, 2, 4)),
        "attention": (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), torch.randn(3, 2, 4)),
        "frozen norm": (net().float().eval(), images().float()),
    }


@pytest.mark.parametrize("name", layers())
def test_it_computes_what_functional_call_does(name):
    model, x = layers()[name]
    f = Functional(model, buffers="frozen")
    params = other(f)
    theirs = torch.func.functional_call(copy.deepcopy(model), params, (x,))
    ours, own, theirs = (first(o) for o in (f(params, x), f(f.params(), x), theirs))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(own, first(copy.deepcopy(model)(x)))
    assert not torch.allclose(ours, own)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def test_a_tied_weight_is_one_parameter_with_the_gradient_of_both_uses():
    model, tokens = Tied().to(DOUBLE), torch.tensor([[0, 1], [2, 4]])
    f = Functional(model)
    assert list(f.params()) == ["table.weight"]
    w = other(f)["table.weight"].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda w: f({"table.weight": w}, tokens), w)


def test_norms_follow_the_policy_in_either_mode():
    x = images()
    for mode in (True, False):
        model = net().train(mode)
        model[1].running_mean += 0.3
        trained, still = copy.deepcopy(model).train(), copy.deepcopy(model).eval()
        expected = {"batch": trained(x), "frozen": still(x), "per_task": still(x)}
        for buffers, y in expected.items():
            f = Functional(model, buffers=buffers)
            torch.testing.assert_close(f(f.params(), x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("build", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_statistics_of_a_task_move_as_those_of_the_layer_do(build, momentum):
    torch.manual_seed(0)
    if build is nn.InstanceNorm2d and momentum is None:
        momentum = 0.5  # PyTorch's InstanceNorm counts no batches
    layer = build(1, momentum=momentum, affine=True, track_running_stats=True).to(DOUBLE)
    theirs = copy.deepcopy(layer)
    f = Functional(layer, buffers="per_task")
    running = f.running()
    for seed in range(3):
        y, running = f.call(f.params(), (images(seed=seed),), running=running, learn=True)
        torch.testing.assert_close(y, theirs(images(seed=seed)), rtol=1e-12, atol=1e-12)
    for name, value in theirs.named_buffers():
        if name != "num_batches_tracked" or build is nn.BatchNorm2d:
            torch.testing.assert_close(running[name], value, rtol=1e-12, atol=0)
    theirs.eval()
    y, after = f.call(f.params(), (images(),), running=running)
    torch.testing.assert_close(y, theirs(images()), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(after[n], running[n]) for n in running)
    assert layer.running_mean.item() == 0.0


@pytest.mark.parametrize("buffers", ["batch", "frozen", "per_task"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_untouched_also_after_an_exception(buffers, training):
    model = net().train(training)
    model[4].bias.requires_grad_(False)
    model(images()).sum().backward()
    before = fingerprint(model)
    f = Functional(model, buffers=buffers)
    f.call(other(f), (images(),), learn=True)[0].sum()
    with pytest.raises(RuntimeError):
        f(other(f), torch.ones(2, 3, 3, 3, dtype=DOUBLE))
    assert same(fingerprint(model), before)


class Counts(nn.Module):
    """Writes into two buffers, one in place, one by assignment."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.register_buffer("inplace", torch.zeros(1))
        self.register_buffer("assigned", torch.zeros(1))

    def forward(self, x):
        self.inplace += 1
        self.assigned = self.assigned + 1
        return self.w * x + self.inplace + 10 * self.assigned


@pytest.mark.parametrize("training", [True, False])
def test_what_a_forward_writes_into_other_buffers_is_dropped(training):
    model = Counts().train(training)
    f = Functional(model)
    zero = torch.zeros(1)
    assert [f(f.params(), zero).item() for _ in range(3)] == [11.0] * 3
    assert (model.inplace.item(), model.assigned.item()) == (0.0, 0.0)
    model.inplace += 5  # what the model holds is read at each call
    assert f(f.params(), zero).item() == 16.0


def test_three_threads_with_their_own_parameters_get_their_own_outputs():
    model, x = net(), images()
    f = Functional(model)
    mine = [other(f, seed) for seed in range(3)]
    expected = [f(p, x) for p in mine]
    before, wrong, gate = fingerprint(model), [], threading.Barrier(3)

    def work(i):
        gate.wait()
        for _ in range(60):
            if not torch.equal(f(mine[i], x), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    assert same(fingerprint(model), before)


def test_attention_is_twice_differentiable_and_no_other_thread_notices():
    q = torch.randn(2, 2, 3, 4, dtype=DOUBLE, requires_grad=True)

    def causal(q):
        with Guard():
            return F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3)

    torch.testing.assert_close(
        causal(q), F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3)
    )
    assert torch.autograd.gradgradcheck(causal, q)
    fused = torch.backends.cuda.flash_sdp_enabled
    with Guard():
        assert fused()
        mask = torch.tensor([[False, True, True], [False, False, True], [False] * 3])
        layer = nn.MultiheadAttention(4, 2, batch_first=True).to(DOUBLE)
        out, weights = layer(q[0], q[0], q[0], attn_mask=mask, need_weights=False)
    assert weights is None
    theirs = layer(q[0], q[0], q[0], attn_mask=mask, need_weights=False, is_causal=True)[0]
    torch.testing.assert_close(out, theirs)


class Calls(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn, self.w = fn, nn.Parameter(torch.ones(1, 2, 3, 4))

    def forward(self, x):
        return self.fn(self.w * x)


DROPOUTS = {
    "layer": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
    "channels": lambda: nn.Dropout2d(0.5),
    "alpha": lambda: nn.AlphaDropout(0.5),
    "function": lambda: Calls(lambda x: F.dropout(x, 0.5)),
    "by name": lambda: Calls(lambda x: F.dropout(x, training=True, p=0.5)),
    "attention": lambda: Calls(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)),
    "multi-head": lambda: Calls(lambda x: nn.MultiheadAttention(4, 2, 0.5)(x[0], x[0], x[0])),
    "lstm": lambda: nn.LSTM(4, 3, num_layers=2, dropout=0.5),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_that_is_on_is_refused(name):
    model = DROPOUTS[name]()
    with pytest.raises(InputError, match=r"dropout \(p=0\.5\) is on.*model\.eval\(\)"):
        Functional(model)({}, torch.ones(1, 2, 3, 4))


def test_dropout_that_is_off_is_none():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    f, x = Functional(model), torch.ones(2, 4)
    assert same(f(f.params(), x), model(x))
    on = nn.Dropout(0.0)
    assert same(Functional(on)({}, x), x)


def test_what_cannot_be_called_is_named():
    attached = nn.Sequential(nn.Linear(2, 2))
    attached[0].forward = attached[0].forward
    with pytest.raises(InputError, match=r"attached to the instance '0' \(Linear\)"):
        Functional(attached)
    with pytest.raises(InputError, match=r"'1' \(LazyLinear\) does not know its shapes"):
        Functional(nn.Sequential(nn.Tanh(), nn.LazyLinear(2)))
    with pytest.raises(InputError, match=r"give the module inside: DataParallel"):
        Functional(nn.DataParallel(nn.Linear(2, 2)))
    with pytest.raises(InputError, match=r"adapts an nn\.Module, got function"):
        Functional(lambda x: x)
    with pytest.raises(UnknownNameError, match=r"no policy for buffers 'freeze'"):
        Functional(nn.Linear(2, 2), buffers="freeze")
    with pytest.raises(UnknownNameError, match=r"there is no parameter 'weigth'"):
        Functional(nn.Linear(2, 2))({"weigth": torch.ones(2, 2)}, torch.ones(1, 2))
    f = Functional(nn.BatchNorm1d(2))
    with pytest.raises(InputError, match=r"BatchNorm1d.*more than one value a channel.*frozen"):
        f(f.params(), torch.ones(1, 2))


def test_a_call_lets_go_of_what_it_was_given():
    f, x = Functional(nn.LSTM(4, 3)), torch.randn(2, 1, 4)
    params = {n: p.detach().clone().requires_grad_() for n, p in f.params().items()}
    output = f(params, x)[0]
    held = [weakref.ref(p) for p in params.values()]
    del params, output
    assert [r() for r in held] == [None] * len(held)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recurrent_layers_of_cudnn_are_refused_where_they_are_differentiated_twice():
    model = nn.LSTM(4, 3).cuda()
    with pytest.raises(InputError, match=r"cuDNN cannot differentiate LSTM twice"):
        Functional(model)
    Functional(model, double=False)
    with torch.backends.cudnn.flags(enabled=False):
        f, x = Functional(model), torch.randn(2, 1, 4, device="cuda")
        grads = torch.autograd.grad(
            f(f.params(), x)[0].sum(), list(f.params().values()), create_graph=True
        )
        torch.autograd.grad(sum(g.square().sum() for g in grads), list(f.params().values()))


class Norms(nn.Module):
    """Calls the functions itself, as many a model's own layer does."""

    def __init__(self):
        super().__init__()
        self.layer, self.weight = nn.Linear(3, 4), nn.Parameter(torch.rand(4))
        self.register_buffer("mean", torch.full((4,), 0.3))

    def forward(self, x):
        x = torch.tanh(F.layer_norm(self.layer(x), (4,), self.weight, self.weight))
        return F.batch_norm(x, self.mean, self.mean, self.weight, None, True)


def test_norms_called_as_functions_are_right_under_grad_of_vmap():
    """Where PyTorch's own are not: a second-order step inside vmap, differentiated outside."""
    model = Norms().to(DOUBLE)
    before = fingerprint(model)
    f, x = Functional(model), torch.randn(2, 5, 3, dtype=DOUBLE)
    torch.testing.assert_close(f(f.params(), x[0]), copy.deepcopy(model)(x[0]))
    assert same(fingerprint(model), before)

    def adapted(params, x):
        grads = torch.func.grad(lambda p: f(p, x).pow(3).sum())(params)
        moved = {n: p - 0.1 * grads[n] for n, p in params.items()}
        return f(moved, x).pow(4).sum()

    params = {n: p.detach() for n, p in f.params().items()}
    inside = torch.func.vmap(adapted, in_dims=(None, 0))
    ours = torch.func.grad(lambda p: inside(p, x).sum())(params)
    loops = [torch.func.grad(adapted)(params, row) for row in x]
    for name, g in ours.items():
        torch.testing.assert_close(g, loops[0][name] + loops[1][name], rtol=1e-11, atol=1e-12)
    half = model.half()
    assert Functional(half)(dict(half.named_parameters()), x[0].half()).dtype == torch.float16

"""Many inner loops at once: the numbers of a loop over them, for every layer that is claimed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import graph as tg
from tessera.arch.delta import Delta
from tessera.data import Batch
from tessera.errors import InputError, NonFiniteError
from tessera.meta.adapted import MetaState
from tessera.meta.maml import maml_step
from tessera.meta.prototypes import prototypes
from tessera.meta.rates import learned_rates
from tessera.meta.tasks import maml_tasks

DOUBLE = torch.float64
TASKS = 3


class Attends(nn.Module):
    """Self-attention that calls the fused function itself, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.table(tokens).mean(1)))


def convolved(*layers, channels=4, dim=2):
    first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](2, channels, 3, padding=1)
    return nn.Sequential(first, *layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


def sequence(*layers):
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


# name -> (the model, the shape of one input)
LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)),
        (4,),
    ),
    "conv1d": (lambda: convolved(dim=1), (2, 5)),
    "conv2d": (lambda: convolved(nn.Conv2d(4, 4, 2, stride=2, groups=2)), (2, 4, 4)),
    "conv3d": (lambda: convolved(dim=3), (2, 2, 2, 2)),
    "transposed": (lambda: convolved(nn.ConvTranspose2d(4, 3, 2, stride=2)), (2, 3, 3)),
    "pooled": (lambda: convolved(nn.AvgPool2d(2), nn.MaxPool2d(2)), (2, 4, 4)),
    "batchnorm1d": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
        (4,),
    ),
    "batchnorm2d": (lambda: convolved(nn.BatchNorm2d(4)), (2, 3, 3)),
    "batchnorm3d": (lambda: convolved(nn.BatchNorm3d(4), dim=3), (2, 2, 2, 2)),
    "instancenorm1d": (lambda: convolved(nn.InstanceNorm1d(4, affine=True), dim=1), (2, 5)),
    "instancenorm2d": (lambda: convolved(nn.InstanceNorm2d(4)), (2, 3, 3)),
    "groupnorm": (lambda: convolved(nn.GroupNorm(2, 4)), (2, 3, 3)),
    "layernorm": (lambda: sequence(nn.LayerNorm(4)), (2, 4)),
    "rmsnorm": (lambda: sequence(nn.RMSNorm(4)), (2, 4)),
    "gelu": (lambda: sequence(nn.GELU(), nn.SiLU()), (2, 4)),
    "attention": (lambda: sequence(Attends()), (3, 4)),
    "multihead": (lambda: sequence(Heads()), (3, 4)),
    "transformer": (lambda: sequence(encoder()), (3, 4)),
    "tied": (Tied, None),
}


def problem(name, n=5, m=4):
    """(model, support, query): x [tasks, n, ...], float64; tokens where it takes them."""
    build, shape = LAYERS[name]
    torch.manual_seed(1)
    model = build()
    g = torch.Generator().manual_seed(2)

    def batch(n):
        if shape is None:
            x = torch.randint(0, 7, (TASKS, n, 3), generator=g)
        else:
            x = torch.randn(TASKS, n, *shape, generator=g, dtype=DOUBLE)
        return Batch(x, torch.randint(0, 3, (TASKS, n), generator=g))

    support, query = batch(n), batch(m)
    model.to(DOUBLE)(support.x[0])  # lazy layers get their shapes
    return model, support, query


def all_tasks(model, support, query, **how):
    adapted, state = maml_tasks(model, support, **how)
    return F.cross_entropy(adapted(query.x).flatten(0, 1), query.y.flatten()), state


def one_by_one(model, support, query, **how):
    total, states = 0, []
    for xs, ys, xq, yq in zip(*support, *query, strict=True):
        adapted, state = maml_step(model, Batch(xs, ys), **how)
        total = total + F.cross_entropy(adapted(xq), yq) / TASKS
        states.append(state)
    return total, states


def gradient(loss, model):
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(
            model.parameters(),
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True),
            strict=True,
        )
    ]


def assert_same(ours, theirs, rtol=1e-11):
    """Relative to the whole gradient: a bias before a BatchNorm has none, but for rounding."""
    a, b = (torch.cat([t.flatten() for t in ts]) for ts in (ours, theirs))
    assert (a - b).norm() <= rtol * b.norm()
    assert b.norm() > 1e-3


HOW = {"inner_opt": tg.SGD(0.2), "K": 3}


@pytest.mark.parametrize("name", LAYERS)
def test_over_tasks_is_one_by_one_is_central_differences(name):
    model, support, query = problem(name)
    loss, _ = all_tasks(model, support, query, **HOW)
    ours = gradient(loss, model)
    expected, _ = one_by_one(model, support, query, **HOW)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same(ours, gradient(expected, model))
    way = [torch.randn_like(p) for p in model.parameters()]
    ends, eps = [], 2e-6
    for sign in (1, -2, 1):
        with torch.no_grad():
            for p, w in zip(model.parameters(), way, strict=True):
                p.add_(w, alpha=sign * eps)
            if sign != 1 or not ends:
                ends.append(all_tasks(model, support, query, **HOW)[0])
    central = (ends[0] - ends[1]) / (2 * eps)
    along = sum((g * w).sum() for g, w in zip(ours, way, strict=True))
    torch.testing.assert_close(along, central, rtol=1e-6, atol=1e-9)


VARIANTS = {
    "momentum": {"inner_opt": tg.SGD(0.1, momentum=0.9)},
    "adam": {"inner_opt": tg.Adam(0.02)},
    "first order": {"create_graph": False},
    "truncated": {"truncate": 2},
    "recomputed": {"remat": True},
    "frozen": {"buffers": "frozen"},
    "per task": {"buffers": "per_task"},
    "head": {"only": "4"},
    "no step": {"K": 0},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chunk", [None, 1, 2, 9])
def test_every_variant_is_one_by_one_whole_or_in_chunks(name, chunk):
    model, support, query = problem("batchnorm2d")
    how = {"inner_opt": tg.SGD(0.2), "K": 4, **VARIANTS[name]}
    loss, state = all_tasks(model, support, query, chunk=chunk, **how)
    expected, states = one_by_one(model, support, query, **how)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same(gradient(loss, model), gradient(expected, model))
    assert state.losses.shape == (how["K"], TASKS)
    assert not state.losses.requires_grad
    for i, s in enumerate(states):
        torch.testing.assert_close(state.losses[:, i], s.losses, rtol=1e-11, atol=0)
        for n, t in s.running.items():
            torch.testing.assert_close(state.running[n][i], t, rtol=1e-11, atol=1e-14)


def test_tasks_may_come_in_any_order():
    model, support, query = problem("conv2d")
    order = torch.tensor([2, 0, 1])
    loss, _ = all_tasks(model, support, query, **HOW)
    again, _ = all_tasks(
        model,
        Batch(support.x[order], support.y[order]),
        Batch(query.x[order], query.y[order]),
        **HOW,
    )
    assert_same(gradient(loss, model), gradient(again, model), rtol=1e-13)


def test_learned_rates_are_shared_by_the_tasks():
    model, support, query = problem("linear")
    for steps, per in ((None, "element"), (3, "parameter")):
        rates = learned_rates(model, 0.1, steps=steps, per=per)
        how = {"inner_opt": tg.SGD(model, lr=rates()), "K": 3}
        a, _ = all_tasks(model, support, query, **how)
        b, _ = one_by_one(model, support, query, **how)
        ours, theirs = (torch.autograd.grad(x, list(rates.parameters())) for x in (a, b))
        assert_same(ours, theirs)


def test_going_on_is_the_same_as_not_stopping():
    model, support, query = problem("batchnorm2d")
    how = {"inner_opt": tg.Adam(0.05), "buffers": "per_task"}
    whole, _ = all_tasks(model, support, query, K=5, **how)
    _, state = maml_tasks(model, support, K=2, chunk=2, **how)
    parts, after = all_tasks(model, support, query, K=3, state=state, **how)
    assert (after.steps, after.losses.shape) == (5, (5, TASKS))
    assert_same(gradient(whole, model), gradient(parts, model))


def test_proto_maml_begins_at_the_prototypes_of_each_task():
    net, support, query = problem("linear", n=6)
    support = Batch(support.x, torch.arange(6).remainder(3).expand(TASKS, 6))

    def begin(x, y):
        weight, bias = prototypes(net[:2](x), y)
        return MetaState.at({"2.weight": weight, "2.bias": bias})

    loss, _ = all_tasks(net, support, query, state=begin(*support), **HOW)
    total = 0
    for xs, ys, xq, yq in zip(*support, *query, strict=True):
        adapted, _ = maml_step(net, Batch(xs, ys), state=begin(xs, ys), **HOW)
        total = total + F.cross_entropy(adapted(xq), yq) / TASKS
    grads = gradient(loss, net)
    assert_same(grads, gradient(total, net))
    assert not grads[2].any()  # the head it has was replaced


def test_a_delta_is_adapted_to_every_task():
    model, support, query = problem("linear")
    g = torch.Generator().manual_seed(4)
    A, B = (torch.randn(s, dtype=DOUBLE, generator=g) for s in ((2, 4), (5, 2)))
    tensors = {"0.A": A.requires_grad_(), "0.B": B.requires_grad_()}
    delta = Delta(kind="lora", tensors=tensors, scales={"0": 0.5})
    a, state = all_tasks(model, support, query, only=delta, **HOW)
    b, _ = one_by_one(model, support, query, only=delta, **HOW)
    ours, theirs = (torch.autograd.grad(x, delta.parameters()) for x in (a, b))
    assert_same(ours, theirs)
    assert state.params["0.A"].shape == (TASKS, 2, 4)
    adapted, _ = maml_tasks(model, support, only=delta, **HOW)
    single, _ = maml_step(model, Batch(support.x[1], support.y[1]), only=delta, **HOW)
    torch.testing.assert_close(adapted.delta(1).tensors["0.B"], single.delta().tensors["0.B"])
    with pytest.raises(InputError, match=r"which of the 3 tasks\?"):
        adapted.delta()


def test_the_adapted_model_has_parameters_by_task_and_state_dicts():
    model, support, query = problem("batchnorm2d")
    adapted, _ = maml_tasks(model, support, buffers="per_task", only="0", **HOW)
    assert {p.shape[0] for p in adapted.params.values()} == {TASKS}
    model.load_state_dict(adapted.state_dict(2))
    torch.testing.assert_close(model.eval()(query.x[2]), adapted(query.x)[2])
    for task in (-1, 3):
        with pytest.raises(InputError, match=rf"no task {task} of 3"):
            adapted.state_dict(task)
    with pytest.raises(
        InputError, match=r"adapted to 3 tasks and takes \[3, n, \.\.\.\], got \(2, 4"
    ):
        adapted(query.x[:2])


def test_no_grad_keeps_no_graph_and_attention_takes_no_fast_path():
    model, support, query = problem("transformer")
    with torch.no_grad():
        adapted, state = maml_tasks(model.eval(), support, **HOW)
        y = adapted(query.x)
    expected, _ = maml_tasks(model, support, **HOW)
    assert not any(t.requires_grad for t in (y, state.losses, *state.params.values()))
    torch.testing.assert_close(y, expected(query.x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("batch", "how", "message"),
    [
        (Batch(torch.zeros(2, 3, 4), torch.zeros(3, 3)), {}, r"x \(2, 3, 4\) and y \(3, 3\)"),
        (Batch(torch.zeros(2, 0, 4), torch.zeros(2, 0)), {}, r"at least one of each"),
        (Batch(torch.zeros(2, 3, 4), torch.zeros(6)), {}, r"maml_step takes a single one"),
        (torch.zeros(2, 3, 4), {}, r"data\.Batch\(x, y\), got Tensor"),
        (Batch(torch.zeros(2, 3, 4), torch.zeros(2, 3)), {"chunk": 0}, r"chunk= is a number"),
    ],
)
def test_bad_tasks_are_named(batch, how, message):
    with pytest.raises(InputError, match=message):
        maml_tasks(nn.Linear(4, 3), batch, **HOW, **how)


def test_a_label_out_of_range_and_a_recurrent_layer_are_named():
    labels = torch.full((2, 3), 7)
    with pytest.raises(InputError, match=r"index out of range.*labels span 7 \.\. 7"):
        maml_tasks(nn.Linear(4, 3), Batch(torch.zeros(2, 3, 4), labels), **HOW)
    lstm = nn.Sequential(nn.LSTM(4, 3))
    with pytest.raises(InputError, match=r"no LSTM over tasks \('0'\); loop over the tasks"):
        maml_tasks(lstm, Batch(torch.zeros(2, 3, 4), labels), **HOW)


def test_a_task_that_blows_up_is_named_with_its_step():
    model = nn.Linear(1, 1, bias=False)
    x = torch.ones(3, 1, 1)
    x[1] = 1e3
    how = {"inner_opt": tg.SGD(0.1), "K": 6, "loss_fn": F.mse_loss}
    with pytest.raises(NonFiniteError, match=r"inner loss of task 1 is inf at step 4 \(counted"):
        maml_tasks(model, Batch(x, torch.zeros(3, 1, 1)), **how)

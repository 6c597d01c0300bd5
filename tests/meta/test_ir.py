"""An inner loop in the graph IR: one node, whose region is the gradient it descends along."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import graph as tg
from tessera import peft
from tessera.data import Batch
from tessera.errors import GraphError
from tessera.graph.ir import execute
from tessera.meta.adapted import MetaState
from tessera.meta.maml import maml_step
from tessera.meta.tasks import maml_tasks

DOUBLE = torch.float64


def mlp(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), *between, nn.Tanh(), nn.Linear(6, 3)).to(DOUBLE)


def task(*lead, seed=1):
    draw = torch.Generator().manual_seed(seed)
    x, q = (torch.randn(*lead, 5, 2, generator=draw, dtype=DOUBLE) for _ in range(2))
    return x, torch.randint(3, (*lead, 5), generator=draw), q


def outer_of(model, **how):
    def outer(x, y, q):
        adapted, _ = maml_step(model, Batch(x, y), **{"inner_opt": tg.SGD(0.5), "K": 3, **how})
        return F.cross_entropy(adapted(q), y)

    return outer


def nodes(graph):
    return [n for n in graph.ops() if n.op == "tessera.maml_step.default"]


CASES = {
    "second order": (mlp, {}),
    "first order": (mlp, {"create_graph": False}),
    "no step": (mlp, {"K": 0}),
    "part": (mlp, {"only": "2"}),
    "batch norm": (lambda: mlp(nn.BatchNorm1d(6)), {}),
    "frozen": (lambda: mlp(nn.BatchNorm1d(6)), {"buffers": "frozen"}),
    "layer norm": (lambda: mlp(nn.LayerNorm(6)), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_is_one_node_and_equals_the_uncaptured_one(case, tmp_path):
    build, how = CASES[case]
    model, (x, y, q) = build(), task()
    outer = outer_of(model, **how)
    graph = tg.capture(outer, x, y, q)
    assert len(nodes(graph)) == 1
    other = task(seed=2)
    expected, got = outer(*other), graph.run(*other)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    params = list(model.parameters())
    here, there = (torch.autograd.grad(v, params, allow_unused=True) for v in (got, expected))
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    graph.save(tmp_path / "g")
    again = tg.Graph.load(tmp_path / "g")
    assert again.hash == graph.hash == tg.capture(outer, x, y, q).hash
    assert torch.equal(again.run(*other), got)


def test_the_node_names_what_it_adapts_and_prints_its_region():
    model, (x, y, q) = mlp(), task()
    graph = tg.capture(outer_of(model, only="2"), x, y, q)
    (node,) = nodes(graph)
    # What is adapted, the support set, and what the inner gradient needs besides.
    assert node.inputs[:4] == ("model.2.weight", "model.2.bias", "x", "y")
    assert set(node.inputs[4:]) == {"model.0.weight", "model.0.bias"}
    assert node.attributes["steps"] == 3
    assert node.attributes["lr"] == 0.5
    head = next(line for line in graph.text().splitlines() if "tessera.maml_step" in line)
    assert "{steps = 3, lr = 0.5, create_graph = true}" in head
    assert "    gradients(%theta0: tensor<3x6xf64>, %theta1: tensor<3xf64>, " in graph.text()


def test_the_hash_is_the_same_in_another_process():
    model, (x, y, q) = mlp(), task()
    script = f"""
import sys; sys.path.insert(0, {str(sys.path[0])!r})
import torch
from torch import nn
import torch.nn.functional as F
from tessera import graph as tg
from tessera.data import Batch
from tessera.meta.maml import maml_step
model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double()
def outer(x, y, q):
    adapted, _ = maml_step(model, Batch(x, y), inner_opt=tg.SGD(0.5), K=3)
    return F.cross_entropy(adapted(q), y)
x = torch.zeros(5, 2).double()
print(tg.capture(outer, x, torch.zeros(5, dtype=torch.int64), x + 1).hash)
"""
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert other.stdout.strip() == tg.capture(outer_of(model), x, y, q).hash, other.stderr


def test_its_gradient_is_that_of_the_region_differentiated_again():
    model, given = mlp(), task()
    joint = tg.capture(outer_of(model), *given).joint()
    value, found = joint.run(*given)
    outer_of(model)(*given).backward()
    assert len(found) == 4
    for name, g in found.items():
        expected = model.get_parameter(name.removeprefix("model.")).grad
        torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-14)
    assert value.dim() == 0


def test_the_support_set_gets_its_gradient_and_vmap_runs_the_node_over_tasks():
    model, (x, y, q) = mlp(), task(4)
    graph = tg.capture(outer_of(model), x[0], y[0], q[0])
    outer = outer_of(model)
    mapped = torch.func.vmap(lambda *t: execute(graph.program, list(t)))(x, y, q)
    rows = torch.stack([outer(x[i], y[i], q[i]) for i in range(4)])
    torch.testing.assert_close(mapped, rows, rtol=1e-12, atol=0)
    leaf, same = x[0].clone().requires_grad_(), x[0].clone().requires_grad_()
    graph.run(leaf, y[0], q[0]).backward()
    outer(same, y[0], q[0]).backward()
    torch.testing.assert_close(leaf.grad, same.grad, rtol=1e-10, atol=1e-14)
    assert leaf.grad.abs().sum() > 0


def test_many_tasks_are_not_captured_and_it_says_what_is():
    model, (x, y, q) = mlp(), task(4)
    with pytest.raises(GraphError, match="capture one task with maml_step"):
        tg.capture(
            lambda x, y, q: maml_tasks(model, Batch(x, y), inner_opt=tg.SGD(0.5), K=3)[0](q),
            *(x, y, q),
        )


def test_a_delta_and_what_the_loss_closes_over_become_inputs_of_the_node():
    model, (x, y, q) = mlp(), task()
    delta = peft.lora(model, r=2)
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)

    def weighed(z, y):
        return F.cross_entropy(z, y, weight=weight)

    outer = outer_of(model, only=delta, loss_fn=weighed)
    graph = tg.capture(outer, x, y, q)
    (node,) = nodes(graph)
    assert len(node.inputs) > len(delta.tensors) + 2
    values = graph.run(x, y, q), outer(x, y, q)
    torch.testing.assert_close(*values, rtol=1e-13, atol=0)
    by = [*(t for t in delta.tensors.values() if t.requires_grad), *model.parameters()]
    here, there = (torch.autograd.grad(v, by, allow_unused=True) for v in values)
    for a, b in zip(here, there, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_torch_export_shows_one_node():
    class Adapts(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = mlp()

        def forward(self, x, y, q):
            adapted, _ = maml_step(self.model, Batch(x, y), inner_opt=tg.SGD(0.5), K=3)
            return adapted(q)

    module, given = Adapts(), task()
    exported = torch.export.export(module, given, strict=False)
    targets = [str(n.target) for n in exported.graph.nodes]
    assert targets.count("tessera.maml_step.default") == 1
    assert not any("tanh_backward" in t for t in targets)
    other = task(seed=2)
    torch.testing.assert_close(exported.module()(*other), module(*other), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"inner_opt": tg.Adam(0.1)}, "got inner_opt=InnerAdam"),
        ({"inner_opt": tg.SGD(0.1, momentum=0.9)}, "momentum"),
        ({"inner_opt": tg.SGD(torch.tensor(0.1))}, "tensors"),
        ({"buffers": "per_task"}, "buffers='per_task'"),
        ({"remat": True}, "remat=True"),
        ({"truncate": 1}, "truncate="),
        ({"state": MetaState.at({})}, "state="),
        ({"loss_fn": lambda z, y: z.detach().sum() + z.sum()}, "stops the gradient"),
    ],
)
def test_what_no_node_can_hold(how, message):
    with pytest.raises(GraphError, match=message):
        tg.capture(outer_of(mlp(), **how), *task())


def test_a_convolution_whose_input_needs_no_gradient_has_none_there(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    x, y, q = (t[:, None] if t.is_floating_point() else t for t in task())
    x, q = (F.pad(t, (0, 3)) for t in (x, q))
    outer = outer_of(model)
    graph = tg.capture(outer, x, y, q)
    assert "(none, tensor<2x1x3xf64>, tensor<2xf64>)" in graph.text()
    graph.save(tmp_path / "g")
    again = tg.Graph.load(tmp_path / "g")
    assert again.hash == graph.hash
    torch.testing.assert_close(again.run(x, y, q), outer(x, y, q), rtol=1e-13, atol=0)

"""`tg.capture`: what a graph says, computes, stores and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import arch, data, loss, opt
from tessera import graph as tg
from tessera import ops as T
from tessera.errors import GraphError, MissingDataError
from tessera.graph import store
from tessera.ops.registry import OPS

X, Y = torch.linspace(-1, 1, 20).reshape(5, 4), torch.tensor([0, 1, 0, 1, 1])

SMALL = """
import torch
from tessera import graph as tg

torch.manual_seed(0)
model = torch.nn.Linear(4, 2)

def step(x, y):
    logits = model(x)
    with tg.no_grad():
        best = logits.softmax(-1).amax(-1).mean()
    return torch.nn.functional.cross_entropy(logits, y) * best

graph = tg.capture(step, torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64))
"""

TEXT = """\
func @step(%x: tensor<5x4xf32>, %y: tensor<5xi64>) -> tensor<f32> {
  params {
    %model.weight: tensor<2x4xf32> trainable
    %model.bias: tensor<2xf32> trainable
  }
  %linear = aten.linear(%x, %model.weight, %model.bias) : tensor<5x2xf32>
  no_grad {
    %softmax = aten.softmax(%linear) {dim = -1} : tensor<5x2xf32>
    %amax = aten.amax(%softmax) {dim = [-1]} : tensor<5xf32>
    %mean = aten.mean(%amax) : tensor<f32>
  }
  %cross_entropy_loss = aten.cross_entropy_loss(%linear, %y) : tensor<f32>
  %mul = aten.mul(%cross_entropy_loss, %mean) : tensor<f32>
  return %mul
}
"""


def small() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(SMALL, "small.py", "exec"), names)
    return names


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


# --- what it says ----------------------------------------------------------------------------


def test_the_text_of_a_small_step() -> None:
    assert small()["graph"].text() == TEXT


def test_the_hash_is_the_same_in_another_process() -> None:
    script = f"{SMALL}\nprint(graph.hash)"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert other.stdout.strip() == small()["graph"].hash, other.stderr


def test_ops_know_their_inputs_attributes_shapes_and_line() -> None:
    ops = small()["graph"].ops()
    assert [n.op for n in ops][:2] == ["aten.linear.default", "aten.softmax.int"]
    assert ops[0].inputs == ("x", "model.weight", "model.bias")
    assert (ops[1].attributes, ops[1].shapes, ops[1].no_grad) == ({"dim": -1}, ((5, 2),), True)
    assert [n.line for n in ops] == [f"small.py:{n}" for n in (9, 11, 11, 11, 12, 12)]


def test_penalties_are_one_node_each_and_anchors_give_names() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    anchor = arch.anchor_from(model, "t0", data=[data.Batch(X, Y)])

    def step(batch: data.Batch, before: dict[str, Tensor]) -> Tensor:
        logits = model(batch.x)
        task = F.cross_entropy(logits, batch.y)
        return task + loss.ewc(model, anchor, lam=2.0) + loss.lwf(logits, before["logits"])

    batch = data.Batch(X, Y)
    graph = tg.capture(step, batch, {"logits": torch.zeros(5, 2)})
    assert graph.text().startswith(
        "func @step(%batch.x: tensor<5x4xf32>, %batch.y: tensor<5xi64>, "
    )
    ops = [node.op for node in graph.ops() if node.op.startswith("tessera.")]
    assert ops == ["tessera.ewc.default", "tessera.lwf.default"]
    assert "%anchor.fisher.0.weight" in graph.text()
    assert "%anchor.params.2.bias" in graph.text()
    with torch.no_grad():
        model[0].weight += 0.1  # the graph sees what training does
    now = (batch, {"logits": torch.ones(5, 2)})
    torch.testing.assert_close(graph.run(*now), step(*now))
    for a, b in zip(gradients(graph.run(*now), model), gradients(step(*now), model), strict=True):
        torch.testing.assert_close(a, b)


def test_every_op_of_the_package_is_one_node_and_the_teacher_has_its_name() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=opt.path_integral())
    optimizer.zero_grad()
    model(X).sum().backward()
    optimizer.step()
    anchor = arch.anchor_from(model, "t0", data=[data.Batch(X, Y)])
    A, B = torch.ones(2, 4), torch.ones(3, 2)

    def step(x: Tensor, y: Tensor, old: Tensor) -> Tensor:
        weight = T.parameter(model[0].weight, "0.weight", anchor="t0")
        hidden = T.delta_apply(x, weight, model[0].bias, A, B, 0.5)
        logits = model[2](hidden.relu())
        with tg.no_grad():
            before = anchor.model(x)
        new = T.cross_entropy(logits, y)
        kept = loss.ewc(model, anchor, lam=2.0) + loss.si(model, anchor, c=0.1)
        kept = kept + loss.l2sp(model, anchor, lam=0.1) + loss.lwf(logits, before)
        kept = kept + T.kl_divergence(T.log_softmax(logits), T.softmax(before))
        return loss.recency_weighted(new, loss.der(logits, old, alpha=0.1), rho=0.7) + kept

    given = (X, Y, torch.ones(5, 2))
    graph = tg.capture(step, *given)
    ours = [n.op.split(".")[1] for n in graph.ops() if n.op.startswith("tessera.")]
    assert sorted(ours) == sorted(set(OPS) - {"maml_step"})
    assert "%anchor.model.0.weight, %anchor.model.0.bias" in graph.text()
    assert "%anchor.path_integral.2.bias" in graph.text()
    assert "aten.to(" not in graph.text()
    assert '{name = "0.weight", anchor = "t0"}' in graph.text()
    torch.testing.assert_close(graph.run(*given), step(*given))
    pairs = zip(gradients(graph.run(*given), model), gradients(step(*given), model), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_a_training_step_is_captured_as_it_was_and_trains_nothing() -> None:
    model = nn.Linear(4, 2)
    before = model.weight.clone()

    @tg.training_step(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    def step(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    assert [n.op for n in tg.capture(step, X, Y).ops()][-1] == "aten.cross_entropy_loss.default"
    assert torch.equal(model.weight, before)


def test_unknown_constants_are_numbered_and_several_results_are_picked() -> None:
    graph = tg.capture(lambda x: x.split(2, dim=1)[1] * torch.tensor(3.0), X)
    assert "%const0: tensor<f32>" in graph.text()
    assert "%split:2 = aten.split(%x) {split_size = 2, dim = 1}" in graph.text()
    assert "%split#1" in graph.text()
    assert torch.equal(graph.run(X), X[:, 2:] * 3)


def test_the_drawing_has_every_value() -> None:
    dot = small()["graph"].dot()
    assert all(f'"{name}"' in dot for name in ("x", "model.weight", "softmax", "mul"))
    assert '"mul" -> "return"' in dot


# --- what it computes ------------------------------------------------------------------------


def test_run_is_the_function_gradients_included() -> None:
    names = small()
    graph, step, model = names["graph"], names["step"], names["model"]
    assert torch.equal(graph.run(X, Y), step(X, Y))
    for a, b in zip(gradients(graph.run(X, Y), model), gradients(step(X, Y), model), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert not graph.run(X, Y).requires_grad


def test_joint_is_autograd() -> None:
    names = small()
    joint = names["graph"].joint()
    value, found = joint.run(X, Y)
    assert torch.equal(value, names["step"](X, Y))
    assert list(found) == ["model.weight", "model.bias"]
    expected = gradients(names["step"](X, Y), names["model"])
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not value.requires_grad


def test_random_ops_stay_random() -> None:
    graph = tg.capture(lambda x: F.dropout(x, 0.5, training=True), torch.ones(100))
    assert graph.ops()[0].op == "aten.dropout.default"
    assert not torch.equal(graph.run(torch.ones(100)), graph.run(torch.ones(100)))


@pytest.mark.parametrize("inputs", [(X,), (X[:2], Y), (X.double(), Y), (X, Y, Y), (X, 3)])
def test_run_refuses_other_inputs(inputs: tuple[Any, ...]) -> None:
    with pytest.raises(GraphError, match=r"takes \(%x: tensor<5x4xf32>, %y: tensor<5xi64>\), got"):
        small()["graph"].run(*inputs)


# --- graphs inside ops -----------------------------------------------------------------------


def squares(params: list[Tensor], batch: list[Tensor]) -> Tensor:
    return (batch[0] @ params[0]).square().sum()


def descent(x: Tensor) -> tg.Graph:
    start = torch.ones(4)
    region = tg.gradient_region(squares, [start], [x])
    return tg.capture(
        lambda x: torch.ops.tessera.maml_step([start], [x], region, 2, 0.1, True)[0].sum(), x
    )


def test_a_region_is_printed_inside_its_op_and_travels_with_the_file(tmp_path: Path) -> None:
    graph = descent(X)
    assert [n.op for n in graph.ops()] == ["tessera.maml_step.default", "aten.sum.default"]
    text = graph.text()
    assert "{steps = 2, lr = 0.1, create_graph = true} : (tensor<4xf32>) {\n    gradients(" in text
    assert "      return [%" in text
    graph.save(tmp_path / "g")
    script = f"""
import torch
from tessera import graph as tg
graph = tg.Graph.load({str(tmp_path / "g")!r})
print(graph.hash, graph.run(torch.linspace(-1, 1, 20).reshape(5, 4)).item())
"""
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert other.stdout.split() == [graph.hash, str(graph.run(X).item())], other.stderr


def test_a_region_that_is_not_the_one_it_says_it_is(tmp_path: Path) -> None:
    graph, path = descent(X), tmp_path / "g"

    def unknown(tree: dict[str, Any]) -> None:
        tree["nodes"][0]["arguments"][2][1] = "0" * 64

    def swapped(tree: dict[str, Any]) -> None:
        (inner,) = tree["regions"].values()
        inner["nodes"][0]["name"] += "_"
        inner["output"] = [{"ref": [inner["nodes"][0]["name"], None]}]

    for change, message in (
        (unknown, "holds the region '000"),
        (swapped, "nothing before it|hash"),
    ):
        graph.save(path)
        forge(path, change)
        with pytest.raises(GraphError, match=message):
            tg.Graph.load(path)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (lambda p, b: (b[0] @ p[0].detach()).sum() + p[0].sum(), r"%detach at .* stops the grad"),
        (lambda p, b: (b[0] * torch.tensor([1.0, 2, 3, 4]) @ p[0]).sum(), r"closes over %const0"),
        (lambda p, b: b[0].sum(), r"depend on params\[0\]"),
        (lambda p, b: p[0].sum() if b[0].sum() > 0 else p[0].prod(), r"depends on the data"),
    ],
)
def test_a_loss_that_gives_no_region(inner: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        tg.gradient_region(inner, [torch.ones(4)], [X])
    with pytest.raises(GraphError, match="no region 'none' is known here"):
        torch.ops.tessera.maml_step([torch.ones(4)], [X], "none", 1, 0.1, True)


# --- what it refuses -------------------------------------------------------------------------


def branch(x: Tensor) -> Tensor:
    if x.sum() > 0:  # the line the message names
        return x
    return -x


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (branch, r"test_capture.py:\d+: if x.sum\(\) > 0.*torch.where"),
        (lambda x: x * x.sum().item(), r"%item .*test_capture.py:\d+ .*takes a number out of"),
        (lambda x: x[x > 0].sum(), r"%index .*takes the size out of.*mask"),
        (lambda x: torch.tensor(x.numpy()), r"depends on the data"),
        (lambda x: x.add_(1), r"aten.add_.Tensor.* writes into %x.*x.clone\(\)"),
        (lambda x: x.view(-1).mul_(2), r"aten.mul_.Tensor.* writes into %x"),
        (lambda x: None, r"must return a tensor.*NoneType"),
        (lambda x: 3.0, r"must return a tensor.*float"),
    ],
)
def test_a_step_that_is_no_graph(fn: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        tg.capture(fn, X.clone())


def test_a_write_into_what_the_step_closes_over_is_refused_and_undone() -> None:
    counter = torch.zeros(4)
    with pytest.raises(GraphError, match="writes into %counter"):
        tg.capture(lambda x: x + counter.add_(1), X)
    assert torch.equal(counter, torch.zeros(4))
    norm = nn.BatchNorm1d(4)
    with pytest.raises(GraphError, match=r"model.eval\(\)"):
        tg.capture(lambda x: norm(x), X)
    assert int(norm.num_batches_tracked) == 0


def test_inputs_are_tensors() -> None:
    with pytest.raises(GraphError, match=r"input y of .* is a int, not a tensor; close over it"):
        tg.capture(lambda x, y: x * y, X, 3)


def test_joint_differentiates_a_loss() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(GraphError, match=r"one 0-d float; @lambda returns tensor<5x2xf32>"):
        tg.capture(lambda x: model(x), X).joint()
    with pytest.raises(GraphError, match="several tensors"):
        tg.capture(lambda x: (x, x), X).joint()
    with pytest.raises(GraphError, match="no trainable constant"):
        tg.capture(lambda x: x.sum(), X).joint()
    with pytest.raises(GraphError, match="no trainable constant"):
        tg.capture(lambda x: model(x).detach().sum(), X).joint()


# --- the file --------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small()["graph"].save(tmp_path / "g")
    return tmp_path / "g"


def test_a_round_trip_keeps_text_results_and_gradients(saved: Path) -> None:
    names, again = small(), tg.Graph.load(saved)
    assert again.text() == TEXT
    assert torch.equal(again.run(X, Y), names["step"](X, Y))
    assert torch.equal(again.joint().run(X, Y)[0], again.run(X, Y))
    joint = names["graph"].joint()
    joint.save(saved)
    assert tg.Graph.load(saved).hash == joint.hash
    assert list(saved.parent.iterdir()) == [saved]


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the file's graph, its digest included."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    tree = json.loads(metadata["graph"])
    change(tree)
    metadata["graph"] = json.dumps(tree)
    metadata["sha256"] = store._digest(metadata["graph"], tensors)
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["nodes"][0].update(op="os.system"), r"%linear: op 'os.system' is not"),
        (lambda t: t["nodes"][0].update(op="os.system.default"), r"%linear: op 'os.system"),
        (lambda t: t["nodes"][0].update(op="aten.from_file.default"), r"%linear.*filename"),
        (lambda t: t["nodes"][0].update(op="aten.save.default"), r"%linear.*does not exist"),
        (lambda t: t["nodes"][0].update(op="aten.__class__.default"), r"does not exist"),
        (lambda t: t["nodes"][0].update(op="aten.linear.nonsense"), r"does not exist"),
        (lambda t: t["nodes"][0].update(op="aten.add_.Tensor"), r"has the arguments self, other"),
        (lambda t: t["nodes"][0].update(op="prims.add.default"), r"aten, tessera"),
        (lambda t: t["nodes"].reverse(), r"reads %\w+, which nothing before it defines"),
        (lambda t: t.update(output={"ref": ["nowhere", None]}), r"the output reads %nowhere"),
        (lambda t: t.update(output={"ref": ["mul", 3]}), r"reads %mul#3"),
        (lambda t: t.update(output=None), r"the output is not a nest"),
        (lambda t: t["nodes"][1].update(name="linear"), r"two values are named %linear"),
        (lambda t: t["nodes"][0].update(name="x\n}"), r"is not a name"),
        (lambda t: t["inputs"][0].__setitem__(1, [[-1], "torch.load"]), r"is not a shape"),
        (lambda t: t["inputs"][0].__setitem__(1, [[1], "torch.load"]), r"not a constant of torch"),
        (lambda t: t.pop("nodes"), r"damaged"),
        (lambda t: t.update(constants=[]), r"its tensors are not its constants"),
    ],
)
def test_a_hostile_file_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    forge(saved, change)
    with pytest.raises(GraphError, match=message):
        tg.Graph.load(saved)


def test_a_damaged_foreign_newer_or_missing_file_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        saved.write_bytes(whole[:cut])
        with pytest.raises(GraphError, match="is no graph, or a damaged one"):
            tg.Graph.load(saved)
    saved.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(GraphError, match="checksum"):
        tg.Graph.load(saved)
    saved.write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(GraphError, match="newer Tessera"):
        tg.Graph.load(saved)
    saved.write_bytes(safetensors.torch.save({"w": X}))
    with pytest.raises(GraphError, match=r"not one of Graph\.save"):
        tg.Graph.load(saved)
    with pytest.raises(GraphError, match="is not a file"):
        tg.Graph.load(saved.parent)
    with pytest.raises(MissingDataError, match="there is no graph"):
        tg.Graph.load(saved.parent / "none")

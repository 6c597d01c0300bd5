"""What goes in comes out, to the last bit."""

import json
import math
import struct
import tracemalloc
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tessera.arch.anchor import Anchor
from tessera.checkpoint import State, file, load, save, tree
from tessera.errors import AnchorError, CheckpointError, InputError

DTYPES = sorted(file.DTYPES.values(), key=str)


def through(path: Path, value: object) -> object:
    """`value` after a trip through a file."""
    save(path, State(weights={}, counters=value))
    return load(path).counters


def header_of(path: Path) -> dict:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])


# -- anything nests -----------------------------------------------------------------------------

names = st.text(max_size=6) | st.sampled_from(
    ["", "$tensor", "$dict", "a/b", "a", "__metadata__", "0", "ключ", "\ud800", "x~2"]
)
bits64 = st.binary(min_size=8, max_size=8).map(lambda b: struct.unpack(">d", b)[0])
scalars = st.none() | st.booleans() | st.integers() | bits64 | st.floats() | names
scalars |= st.sampled_from([2**53, -(2**53), 2**64 - 1, -(2**200), -0.0])


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    if dtype is torch.bool:
        raw = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    else:
        raw = list(draw(st.binary(min_size=size, max_size=size)))
    tensor = torch.tensor(raw, dtype=torch.uint8).view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


@st.composite
def anchors(draw):
    params = {draw(names): torch.ones(draw(st.integers(0, 3))) for _ in range(2)}
    fisher = {name: torch.rand(p.shape) for name, p in params.items()}
    return Anchor(draw(names), params, {"fisher": fisher, "samples": 3})


values = st.recursive(
    scalars | tensors() | anchors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(scalars, inner, max_size=3)
        | st.dictionaries(names, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=values)
def test_any_nesting_comes_back_exactly(tmp_path, exact, value):
    assert exact(through(tmp_path / "f", value)) == exact(value)
    with safetensors.safe_open(tmp_path / "f", "np") as other:
        assert other.metadata()["format"] == "tessera"


# -- the states that are really saved -----------------------------------------------------------


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def anchor_of(model: nn.Module, name: str) -> Anchor:
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    importance = {n: p.abs() for n, p in params.items()}
    stats = {
        "fisher": importance,
        "path_integral": {n: p * 2 for n, p in importance.items()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "estimator": "exact",
        "samples": 128,
    }
    return Anchor(name, params, stats)


def test_a_whole_run_comes_back_and_goes_on_alike(tmp_path, exact, trained):
    model, optimizer = trained
    state = State(
        weights=model.state_dict(),
        optimizer=optimizer.state_dict(),
        anchors=[anchor_of(model, "task1"), anchor_of(model, "task2")],
        replay={"x": torch.arange(6).reshape(2, 3), "seen": 9, "policy": "ring"},
        stream={"position": 2**40},
        counters={1: 0.5, False: None},
        step=7,
    )
    save(tmp_path / "run.ckpt", state)
    back = load(tmp_path / "run.ckpt")

    assert type(back.weights) is dict
    assert type(back.anchors) is tuple
    assert back.step == 7
    for name in ("optimizer", "replay", "stream", "counters"):
        assert exact(getattr(back, name)) == exact(getattr(state, name))
    assert exact(back.weights) == exact(dict(state.weights))
    assert exact(list(back.anchors)) == exact(list(state.anchors))

    twin = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=1.0)
    twin.load_state_dict(back.weights)
    twin_optimizer.load_state_dict(back.optimizer)
    x = torch.randn(8, 3)
    for net, opt in ((model, optimizer), (twin, twin_optimizer)):
        opt.zero_grad()
        net(x).square().sum().backward()
        opt.step()
    assert exact(dict(twin.state_dict())) == exact(dict(model.state_dict()))
    assert back.anchors[0].bind(twin)(x).shape == (8, 2)


def test_names_are_readable_and_other_readers_see_the_same_tensors(tmp_path, exact, trained):
    model, optimizer = trained
    path = tmp_path / "run.ckpt"
    anchors = {"task1": anchor_of(model, "task1")}
    save(
        path,
        State(weights=model.state_dict(), optimizer=optimizer.state_dict(), anchors=anchors),
    )
    seen = safetensors.torch.load_file(path)
    assert exact(seen["weights/0.weight"]) == exact(model[0].weight)
    assert exact(seen["anchors/task1/fisher/0.weight"]) == exact(model[0].weight.abs())
    assert exact(seen["optimizer/state/0/exp_avg"]) == exact(
        optimizer.state_dict()["state"][0]["exp_avg"]
    )
    assert {"anchors/task1/params/0.bias", "anchors/task1/buffers/1.running_mean"} <= set(seen)
    assert list(load(path).anchors) == ["task1"]


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.float8_e8m0fnu], ids=str)
def test_every_dtype_is_what_safetensors_reads(tmp_path, exact, dtype):
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (6 * dtype.itemsize,))
    tensor = raw.to(torch.uint8).view(dtype).reshape(2, 3)
    weights = {"t": tensor, "odd": torch.ones(3, dtype=torch.uint8), "0-d": tensor[0, 0]}
    weights |= {"empty": tensor[:0], "turned": tensor.t()}
    save(tmp_path / "f", State(weights=weights))
    seen = safetensors.torch.load_file(tmp_path / "f")
    assert exact(load(tmp_path / "f").weights) == exact(weights)
    assert {name: exact(t) for name, t in seen.items()} == {
        f"weights/{name}": exact(t) for name, t in weights.items()
    }


def test_lazy_complex_views_are_stored_as_what_they_show(tmp_path, exact):
    z = torch.tensor([1 + 2j, 3 - 4j])
    value = {"z": z, "conj": z.conj(), "minus": z.conj().imag}
    assert exact(through(tmp_path / "f", value)) == exact(value)


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    w = torch.randn(2, 3)
    save(tmp_path / "f", State(weights={"in": w, "out": w.detach(), "turned": w.t()}))
    assert list(header_of(tmp_path / "f")) == ["__metadata__", "weights/in", "weights/turned"]
    back = load(tmp_path / "f").weights
    assert back["in"] is back["out"]
    assert torch.equal(back["turned"], w.t())


def test_colliding_names_are_told_apart(tmp_path, exact):
    value = {"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1), 0: torch.zeros(2), "0": torch.eye(2)}
    assert exact(through(tmp_path / "f", value)) == exact(value)


def test_integers_that_python_refuses_to_print_come_back(tmp_path):
    huge = 10**5000
    assert through(tmp_path / "f", {huge: [-huge]}) == {huge: [-huge]}


def test_ordered_dicts_sizes_and_parameters_come_back_as_their_plain_kin(tmp_path, exact):
    value = OrderedDict(size=torch.Size([2, 3]), p=nn.Parameter(torch.ones(2)))
    back = through(tmp_path / "f", value)
    assert exact(back) == exact({"size": (2, 3), "p": torch.ones(2)})
    assert not back["p"].requires_grad


def test_loaded_tensors_own_their_memory(tmp_path):
    save(tmp_path / "f", State(weights={"w": torch.ones(1000)}))
    weights = load(tmp_path / "f").weights
    with open(tmp_path / "f", "r+b") as raw:
        raw.write(b"\xff" * (tmp_path / "f").stat().st_size)
    assert bool((weights["w"].add_(1) == 2).all())


def test_saving_copies_nothing(tmp_path):
    weights = {str(i): torch.zeros(2**21) for i in range(4)}  # 32 MiB
    tracemalloc.start()
    save(tmp_path / "f", State(weights=weights))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


# -- what cannot be stored ----------------------------------------------------------------------

Point = namedtuple("Point", "x y")
cycle: list = []
cycle.append(cycle)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {2}]}, r"counters/a/1, a set\. It holds None"),
        ({"a": np.float64(1)}, r"counters/a, a float64; pass its \.item\(\)"),
        ({"a": np.zeros(2)}, r"counters/a, a ndarray"),
        ({"a": torch.float32}, r"counters/a, a dtype"),
        ({"a": b"raw"}, r"counters/a, a bytes"),
        ({"a": Point(1, 2)}, r"counters/a, a Point"),
        ({"a": {(1, 2): 3}}, r"counters/a, a mapping with a key of type tuple"),
        ({"a": torch.optim.SGD([torch.zeros(1)])}, r"an? SGD; pass its \.state_dict\(\)"),
        (
            {"a": torch.zeros(2, dtype=torch.complex128)},
            r"counters/a, a tensor of torch.complex128",
        ),
        ({"a": torch.eye(2).to_sparse()}, r"counters/a, a tensor of layout torch.sparse_coo"),
        ({"a": torch.zeros(2, device="meta")}, r"counters/a, a tensor without data"),
        (Anchor(3, {}), r"counters, a malformed anchor"),
        (cycle, r"at most 64 levels.*contain itself"),
    ],
    ids=str,
)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(tmp_path, value, message):
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "sub" / "f", State(weights={}, counters=value))
    assert list(tmp_path.iterdir()) == []


def test_an_anchor_overwritten_with_nan_is_refused_when_saved_not_when_needed(tmp_path):
    anchor = Anchor("t", {"w": torch.zeros(1)}, {"fisher": {"w": torch.ones(1)}})
    anchor.fisher["w"].fill_(math.nan)
    with pytest.raises(AnchorError, match="anchor 't'"):
        save(tmp_path / "f", State(weights={}, anchors=[anchor]))
    assert list(tmp_path.iterdir()) == []


def test_the_deepest_tree_comes_back_and_one_deeper_is_refused(tmp_path, exact):
    value: object = {0: 1.0}
    for _ in range(tree.MAX_DEPTH - 2):
        value = {0: value}
    assert exact(through(tmp_path / "f", value)) == exact(value)
    with pytest.raises(CheckpointError, match="levels"):
        through(tmp_path / "f", {0: value})


def test_a_header_too_large_for_safetensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(file, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(CheckpointError, match="turn long lists into tensors"):
        save(tmp_path / "f", State(weights={}, counters=list(range(1000))))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": nn.Linear(1, 1)}, r"got Linear; pass model\.state_dict\(\)"),
        ({"weights": {"w": 1.0}}, "'w' is a float"),
        ({"weights": {}, "anchors": Anchor("a", {})}, r"anchors=\[it\]"),
        ({"weights": {}, "anchors": [{}]}, "a dict among them"),
        ({"weights": {}, "step": -1}, "got -1"),
        ({"weights": {}, "step": True}, "got True"),
    ],
)
def test_a_malformed_state_is_refused_at_once(arguments, message):
    with pytest.raises(InputError, match=message):
        State(**arguments)


def test_an_empty_tensor_with_a_zero_stride_round_trips(tmp_path: Path) -> None:
    empty = torch.zeros(0, dtype=torch.int64).as_strided((0,), (0,))
    save(tmp_path / "c", State(weights={}, replay={"keys": empty}))
    assert load(tmp_path / "c").replay["keys"].shape == (0,)

"""The Open Inference Protocol's bodies: by hand, there and back, and whatever a stranger sends."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("orjson", reason="the server is not installed: pip install -e .[serve]")

from tessera.errors import InputError
from tessera.serve.datatypes import DATATYPES
from tessera.serve.oip import decode, decode_answer, encode, encode_request
from tessera.serve.settings import Limits


def body(*inputs: dict, **more: object) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def tensor(**changes: object) -> dict:
    one = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4.5]}
    return {k: v for k, v in {**one, **changes}.items() if v is not ...}


def read(*inputs: dict, **more: object) -> dict[str, torch.Tensor]:
    return dict(decode(body(*inputs, **more), None).inputs)


# --- by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [[1, 2, 3, 4.5], [[1, 2], [3, 4.5]]])
def test_json_data_is_flat_or_nested(data):
    assert torch.equal(read(tensor(data=data))["x"], torch.tensor([[1, 2], [3, 4.5]]))


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("BOOL", [True, False]),
        ("UINT8", [0, 255]),
        ("UINT16", [0, 2**16 - 1]),
        ("UINT32", [0, 2**32 - 1]),
        ("UINT64", [0, 2**64 - 1]),
        ("INT8", [-128, 127]),
        ("INT16", [-(2**15), 2**15 - 1]),
        ("INT32", [-(2**31), 2**31 - 1]),
        ("INT64", [-(2**63), 2**63 - 1]),
        ("FP16", [-65504.0, 0.5]),
        ("FP32", [3, 1.5]),
        ("FP64", [1e300, 0.1]),
    ],
)
def test_each_datatype_to_its_last_value(datatype, data):
    x = read(tensor(shape=[2], datatype=datatype, data=data))["x"]
    assert x.dtype == DATATYPES[datatype]
    assert x.tolist() == data


def test_the_binary_extension_as_the_specification_writes_it():
    head = json.dumps(
        {
            "id": "42",
            "inputs": [
                {
                    "name": "raw",
                    "shape": [1, 2],
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": 2},
                },
                {"name": "plain", "shape": [1], "datatype": "FP32", "data": [0.5]},
                {
                    "name": "last",
                    "shape": [2],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": 8},
                },
            ],
            "outputs": [
                {"name": "a", "parameters": {"binary_data": True}},
                {"name": "b", "parameters": {"binary_data": False}},
                {"name": "c"},
            ],
            "parameters": {"binary_data_output": True, "priority": 3},
        }
    ).encode()
    asked = decode(head + b"\x07\xff" + struct.pack("<ff", 1.25, math.inf), len(head))
    assert asked.id == "42"
    assert asked.inputs["raw"].tolist() == [[7, 255]]
    assert asked.inputs["plain"].tolist() == [0.5]
    assert asked.inputs["last"].tolist() == [1.25, math.inf]
    assert asked.outputs == (("a", True), ("b", False), ("c", True))
    assert asked.binary
    assert asked.parameters["priority"] == 3


def test_an_aligned_tensor_lies_over_the_body():
    written, length = encode_request({"x": torch.zeros(4, dtype=torch.uint8)})
    held = bytearray(written)
    x = decode(held, length).inputs["x"]
    held[-1] = 9
    assert x.tolist() == [0, 0, 0, 9]


def test_an_answer_by_hand():
    outputs = {"y": torch.tensor([[1.5, 2.0]]), "n": torch.tensor([True])}
    said, length = encode("m", "3", "r", outputs, [("n", False), ("y", True)])
    assert json.loads(said[:length]) == {
        "model_name": "m",
        "model_version": "3",
        "id": "r",
        "outputs": [
            {"name": "n", "datatype": "BOOL", "shape": [1], "data": [True]},
            {
                "name": "y",
                "datatype": "FP32",
                "shape": [1, 2],
                "parameters": {"binary_data_size": 8},
            },
        ],
    }
    assert said[length:] == struct.pack("<ff", 1.5, 2.0)


def test_json_of_a_float_is_the_shortest_that_reads_back():
    said, _ = encode("m", "1", "", {"y": torch.tensor([0.1])})
    assert b'"data":[0.1]' in said


# --- there and back --------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 3), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any shape, datatype and bits."""
    shape, name = draw(SHAPES), draw(st.sampled_from(sorted(DATATYPES)))
    dtype = DATATYPES[name]
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if name == "BOOL":
        raw = bytearray(byte & 1 for byte in raw)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    def bits(t: torch.Tensor) -> bytes:
        return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""

    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


@given(st.lists(tensors(), min_size=1, max_size=4))
def test_binary_data_comes_back_bit_for_bit(given_tensors):
    named = {f"t{i}": t for i, t in enumerate(given_tensors)}
    got = decode(*encode_request(named, id="i")).inputs
    assert list(got) == list(named)
    assert all(same(got[n], named[n]) for n in named)
    back = decode_answer(*encode("m", "1", "i", named, binary_default=True))
    assert all(same(back[n], named[n]) for n in named)


@given(tensors())
def test_json_comes_back_bit_for_bit_or_is_refused(x):
    finite = not x.is_floating_point() or bool(torch.isfinite(x).all())
    if not finite or x.dtype == torch.bfloat16:
        with pytest.raises(InputError, match="'x'"):
            encode_request({"x": x}, binary=False)
        return
    said, length = encode_request({"x": x}, binary=False)
    assert length is None
    assert same(decode(said, None).inputs["x"], x)


def test_a_tensor_that_is_no_row_after_row_in_memory_is_written_as_if_it_were():
    x = torch.arange(6.0).view(2, 3).T
    assert torch.equal(decode(*encode_request({"x": x})).inputs["x"], x)
    assert torch.equal(decode(*encode_request({"x": x}, binary=False)).inputs["x"], x)


# --- faults ----------------------------------------------------------------------------------

TINY = Limits(body_bytes=400, json_bytes=300, tensors=2, elements=16, dimensions=3, text=8)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"", "the body is empty"),
        (b"{", "the body is no JSON"),
        (b'{"inputs": [{"data": [NaN]}]}', "the body is no JSON"),
        (b"\xff\xfe", "the body is no JSON"),
        (b"[" * 5000, "the body is no JSON|bytes of JSON"),
        (b"[]", "the body is a list"),
        (b"{}", "inputs must be a list of tensors, it is missing"),
        (b'{"inputs": []}', "the request has no inputs"),
        (b'{"inputs": [3]}', r"inputs\[0\] must be an object, it is 3"),
        (body(tensor(), inputz=1), "the request has a field 'inputz'"),
        (body(tensor(dtype="FP32")), r"inputs\[0\] has a field 'dtype'"),
        (body(tensor(name="")), r"inputs\[0\] has no name"),
        (body(tensor(name=3)), r"inputs\[0\].name must be text"),
        (body(tensor(name=...)), r"inputs\[0\].name must be text"),
        (body(tensor(), tensor()), "inputs has 'x' twice"),
        (body(tensor(), id=7), "the request's id must be text"),
        (body(tensor(datatype="fp32")), "datatype 'fp32'; choose one of: BOOL"),
        (body(tensor(datatype=...)), "datatype 'None'"),
        (body(tensor(datatype="BYTES")), "'x' is of BYTES, text"),
        (body(tensor(datatype="BF16")), "BF16 travels as binary data"),
        (body(tensor(shape=...)), "'x' has no list of sizes as shape, but missing"),
        (body(tensor(shape=4)), "'x' has no list of sizes"),
        (body(tensor(shape=[2.0, 2])), "'x' has no list of sizes"),
        (body(tensor(shape=[True, 4])), "'x' has no list of sizes"),
        (body(tensor(shape=[-1, -4])), r"'x' has the shape \[-1, -4\]"),
        (body(tensor(shape=[3, 2])), r"'x' of shape \[3, 2\] takes 6 values, got 4"),
        (body(tensor(data=...)), "'x' has no data and no binary_data_size"),
        (body(tensor(data="1234")), "'x' has as data a str"),
        (body(tensor(data=None)), "'x' has as data a NoneType"),
        (body(tensor(data=[1, 2, 3, "4"])), "'x' is of FP32 and holds '4'"),
        (body(tensor(data=[1, 2, 3, None])), "'x' is of FP32 and holds 'None'"),
        (body(tensor(data=[1, 2, 3, True])), "'x' is of FP32 and holds 'True'"),
        (body(tensor(data=[1, 2, 3, 1e39])), "'x' holds a number beyond FP32"),
        (body(tensor(data=[1, 2, 3, 65536], datatype="FP16")), "a number beyond FP16"),
        (body(tensor(data=[1, 2, 3, 4.0], datatype="INT32")), "of INT32 and holds '4.0'"),
        (body(tensor(data=[1, 2, 3, 128], datatype="INT8")), "a number beyond INT8"),
        (body(tensor(data=[1, 2, 3, -1], datatype="UINT64")), "a number beyond UINT64"),
        (body(tensor(data=[1, 0, 1, 0], datatype="BOOL")), "of BOOL and holds '1'"),
        (body(tensor(data=[[1, 2], [3]])), "nested data does not fit dimension 1"),
        (body(tensor(data=[[1, 2], 3])), "nested data does not fit dimension 1"),
        (body(tensor(data=[[1], [2], [3]])), "nested data does not fit dimension 0"),
        (body(tensor(data=[[[1], [2]], [[3], [4]]])), "'x' is of FP32 and holds"),
        (body(tensor(shape=[], data=[[1]])), "nested data does not fit|holds"),
        (body(tensor(parameters=[])), "parameters of tensor 'x' must be an object"),
        (body(tensor(parameters={"a": [1]})), "parameters of tensor 'x' must be an object"),
        (body(tensor(parameters={"binary_data_size": 16})), "data and a binary_data_size"),
        (body(tensor(parameters={"shared_memory_region": "r"})), "in shared memory"),
        (body(tensor(data=..., parameters={"binary_data_size": 16})), "0 bytes are left"),
        (body(tensor(data=..., parameters={"binary_data_size": -1})), "the binary_data_size -1"),
        (body(tensor(data=..., parameters={"binary_data_size": True})), "binary_data_size True"),
        (body(tensor(), outputs={}), "outputs must be a list"),
        (body(tensor(), outputs=[1]), r"outputs\[0\] must be an object"),
        (body(tensor(), outputs=[{"name": "y"}] * 2), "outputs has 'y' twice"),
        (body(tensor(), outputs=[{"name": "y", "data": []}]), r"outputs\[0\] has a field 'data'"),
        (
            body(tensor(), outputs=[{"name": "y", "parameters": {"binary_data": 1}}]),
            r"binary_data of outputs\[0\] must be true or false, it is 1",
        ),
        (body(tensor(), parameters={"binary_data_output": "yes"}), "binary_data_output of the"),
    ],
)
def test_a_fault_is_named(said, message):
    with pytest.raises(InputError, match=message):
        decode(said, None)


@pytest.mark.parametrize("header", [0, -1, 1000])
def test_a_header_length_that_is_not_in_the_body(header):
    with pytest.raises(InputError, match=f"Inference-Header-Content-Length is {header}, the body"):
        decode(body(tensor()), header)


def test_bytes_that_belong_to_no_tensor_and_tensors_without_bytes():
    said, length = encode_request({"x": torch.zeros(2)})
    for wrong, message in (
        (said + b"\0", "1 bytes of the body belong to no tensor"),
        (said[:-1], "binary_data_size of 8, 7 bytes are left"),
    ):
        with pytest.raises(InputError, match=message):
            decode(wrong, length)
    head = body(tensor(data=..., parameters={"binary_data_size": 12}))
    with pytest.raises(InputError, match=r"'x' of shape \[2, 2\] and FP32 takes 16 bytes .* 12"):
        decode(head + bytes(12), len(head))
    head = body(tensor(shape=[2], datatype="BOOL", data=..., parameters={"binary_data_size": 2}))
    with pytest.raises(InputError, match="holds a byte that is not 0 or 1"):
        decode(head + b"\1\2", len(head))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (bytes(401), "at most 400 bytes, this one 401"),
        (b" " * 301, "at most 300 bytes of JSON, this one 301"),
        (body(*[tensor(name=f"x{i}") for i in range(3)]), "at most 2 inputs, got 3"),
        (body(tensor(shape=[17])), "at most 16 elements"),
        (body(tensor(shape=[1] * 4)), "has 4 dimensions, at most 3"),
        (body(tensor(shape=[2**62, 2**62])), "at most 16 elements"),
        # A zero excuses nothing: torch counts strides past it, in 64 bits.
        (body(tensor(shape=[0, 2**40, 2**40])), "at most 16 elements"),
        (body(tensor(name="n" * 9)), "text of at most 8 characters"),
        (body(tensor(), id="i" * 9), "text of at most 8 characters"),
        (body(tensor(), outputs=[{"name": str(i)} for i in range(3)]), "a list of at most 2"),
    ],
)
def test_what_is_too_large_is_refused(said, message):
    with pytest.raises(InputError, match=message):
        decode(said, None, limits=TINY)


def test_an_output_that_there_is_not_and_one_that_json_cannot_say():
    outputs = {"y": torch.tensor([math.nan]), "c": torch.zeros(1, dtype=torch.complex64)}
    for wanted, message in (
        ([("z", True)], "there is no output 'z'; there is y, c"),
        ([("y", False)], "'y' holds NaN or infinity"),
        ([("c", True)], "'c' is torch.complex64"),
    ):
        with pytest.raises(InputError, match=message):
            encode("m", "1", "", outputs, wanted)


# --- whatever a stranger sends ---------------------------------------------------------------

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from([*DATATYPES, "BYTES", "x", 2**63, -1, 0, 1]),
)
ANY = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner)
)
SIZES = st.one_of(st.integers(-1, 9), st.sampled_from([2**31, 2**63 - 1, 2**64]), ANY)
PARAMETERS = ANY | st.fixed_dictionaries(
    {},
    optional={
        "binary_data_size": SIZES,
        "binary_data": ANY,
        "binary_data_output": ANY,
        "shared_memory_region": ANY,
    },
)
ONE = ANY | st.fixed_dictionaries(
    {},
    optional={
        "name": ANY | st.just("x"),
        "shape": ANY | st.lists(SIZES, max_size=9),
        "datatype": ANY | st.sampled_from(sorted(DATATYPES)),
        "data": ANY | st.lists(st.lists(PLAIN, max_size=3), max_size=3),
        "parameters": PARAMETERS,
    },
)
REQUEST = ANY | st.fixed_dictionaries(
    {},
    optional={
        "id": ANY,
        "inputs": ANY | st.lists(ONE, max_size=3),
        "outputs": ANY | st.lists(ONE, max_size=3),
        "parameters": PARAMETERS,
    },
)


def never_worse_than_an_input_error(said: bytes, header: int | None) -> None:
    for reader in (decode, decode_answer):
        try:
            reader(said, header)
        except InputError as error:
            said_of_it = str(error)
        else:
            said_of_it = ""
        assert len(said_of_it) < 2000  # it goes into logs and answers


@given(REQUEST, st.binary(max_size=40), st.integers(-2, 3))
def test_nothing_that_is_like_a_request_does_worse_than_an_input_error(request, tail, shift):
    head = json.dumps(request).encode()
    never_worse_than_an_input_error(head + tail, len(head) + shift if tail else None)


@given(st.binary(max_size=200), st.none() | st.integers(-5, 300))
def test_nor_do_bytes(said, header):
    never_worse_than_an_input_error(said, header)


@given(st.data())
def test_nor_does_a_good_request_with_a_few_bytes_changed(data):
    said, length = encode_request({"x": torch.ones(2, 2), "n": torch.tensor([True, False])})
    changed = bytearray(said)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    never_worse_than_an_input_error(bytes(changed), length)

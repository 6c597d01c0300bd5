"""The Open Inference Protocol v2 over HTTP: requests and answers as bytes, JSON and binary tensors.

A body is JSON, and behind it the bytes of the tensors that say ``binary_data_size``; the header
``Inference-Header-Content-Length`` says where the JSON ends. What is read may come from anywhere:
every fault of it is an `InputError` that names the field or the tensor.

Source: https://github.com/kserve/open-inference-protocol (REST), and Triton's "binary tensor data
extension" of it, which tritonclient speaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import orjson
from torch import Tensor

from tessera.errors import InputError
from tessera.serve.datatypes import bytes_of, json_of, name_of
from tessera.serve.oip_read import (
    Binary,
    only_known,
    read_flag,
    read_outputs,
    read_parameters,
    read_tensors,
    read_text,
)
from tessera.serve.settings import Limits

__all__ = ["InferRequest", "decode", "decode_answer", "encode", "encode_request"]

_REQUEST = frozenset({"id", "parameters", "inputs", "outputs"})
_ANSWER = frozenset({"model_name", "model_version", "id", "parameters", "outputs"})
_NOTHING: Mapping[str, Any] = {}


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InferRequest:
    """A request for inference, checked.

    Attributes:
        id: The client's; "" if it gave none.
        inputs: By name, in the order they came. They may share the memory of the body.
        outputs: What is asked for and whether as binary data; empty: everything.
        binary: Whether outputs go back as binary data where the request does not say.
        parameters: What else it says: text, numbers and bools.

    Example:
        >>> InferRequest(id="r-1", inputs={}).outputs
        ()
    """

    id: str
    inputs: Mapping[str, Tensor]
    outputs: tuple[tuple[str, bool], ...] = ()
    binary: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)


def decode(
    body: bytes | bytearray, header_length: int | None, *, limits: Limits | None = None
) -> InferRequest:
    """Read a request.

    Args:
        body: All of it. The inputs lie over a `bytearray` without a copy: leave it alone then.
        header_length: Bytes of its JSON; None: all.
        limits: By default `Limits()`.

    Raises:
        InputError: Something is not as the protocol has it, or too large; the message names it.

    Example:
        >>> asked = decode(
        ...     b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}',
        ...     None,
        ... )
        >>> asked.inputs
        {'x': tensor([[1., 2.]])}
    """
    limits = limits or Limits()
    said, binary = parts_of(body, header_length, limits)
    only_known(said, _REQUEST, "the request")
    found = read_tensors(said.get("inputs"), "inputs", binary, limits)
    if not found:
        raise InputError("the request has no inputs")
    parameters = read_parameters(said, "the request")
    back = read_flag(parameters, "binary_data_output", "the request") or False
    return InferRequest(
        id=read_text(said.get("id", ""), "the request's id", limits),
        inputs=found,
        outputs=read_outputs(said.get("outputs"), back, limits),
        binary=back,
        parameters=parameters,
    )


def encode(
    model_name: str,
    version: str,
    id: str,
    outputs: Mapping[str, Tensor],
    wanted: Sequence[tuple[str, bool]] = (),
    binary_default: bool = False,
) -> tuple[bytes, int | None]:
    """Write an answer.

    Args:
        model_name: As asked for.
        version: That answered.
        id: The client's; left out if "".
        outputs: All that the model gave.
        wanted: What to send, and whether as binary data; empty: everything.
        binary_default: Whether everything is sent as binary data.

    Returns:
        The body, and the length of its JSON if binary data follows it.

    Raises:
        InputError: An output is wanted that there is not, or it has no form that is wanted: NaN
            in JSON, for one.

    Example:
        >>> import torch
        >>> encode("m", "1", "", {"y": torch.tensor([[1.5]])})
        (b'{"model_name":"m","model_version":"1",\
"outputs":[{"name":"y","datatype":"FP32","shape":[1,1],"data":[1.5]}]}', None)
    """
    head: dict[str, Any] = {"model_name": model_name, "model_version": version}
    if id:
        head["id"] = id
    chosen = []
    for name, binary in wanted or [(name, binary_default) for name in outputs]:
        if name not in outputs:
            raise InputError(f"there is no output {name[:60]!r}; there is {', '.join(outputs)}")
        chosen.append((name, outputs[name], binary))
    return _write(head, "outputs", chosen)


def encode_request(
    inputs: Mapping[str, Tensor],
    *,
    id: str = "",
    outputs: Sequence[str] = (),
    binary: bool = True,
    parameters: Mapping[str, Any] = _NOTHING,
) -> tuple[bytes, int | None]:
    """Write a request; the client's half of `decode`.

    Args:
        inputs: By name.
        id: Comes back with the answer.
        outputs: What is wanted; empty: everything.
        binary: Whether tensors travel as binary data, both ways.
        parameters: What else to say.

    Returns:
        The body, and the length of its JSON if binary data follows it.

    Raises:
        InputError: A tensor has no form that is wanted.

    Example:
        >>> import torch
        >>> body, length = encode_request({"x": torch.tensor([[0.5]])})
        >>> decode(body, length).inputs
        {'x': tensor([[0.5000]])}
    """
    head: dict[str, Any] = {"id": id} if id else {}
    if outputs:
        head["outputs"] = [{"name": n, "parameters": {"binary_data": binary}} for n in outputs]
    head["parameters"] = {**parameters, "binary_data_output": binary}
    return _write(head, "inputs", [(name, tensor, binary) for name, tensor in inputs.items()])


def decode_answer(
    body: bytes | bytearray, header_length: int | None, *, limits: Limits | None = None
) -> dict[str, Tensor]:
    """Read an answer's outputs; the client's half of `encode`.

    Args:
        body: All of it.
        header_length: Bytes of its JSON; None: all.
        limits: By default `Limits()`.

    Raises:
        InputError: It is not as the protocol has it.

    Example:
        >>> import torch
        >>> decode_answer(*encode("m", "1", "", {"y": torch.tensor([2])}, binary_default=True))
        {'y': tensor([2])}
    """
    limits = limits or Limits()
    said, binary = parts_of(body, header_length, limits)
    only_known(said, _ANSWER, "the answer")
    return read_tensors(said.get("outputs"), "outputs", binary, limits)


# --- writing ---------------------------------------------------------------------------------


def _write(
    head: dict[str, Any], kind: str, chosen: Sequence[tuple[str, Tensor, bool]]
) -> tuple[bytes, int | None]:
    listed: list[dict[str, Any]] = []
    pieces: list[memoryview] = []
    for name, tensor, binary in chosen:
        if tensor.device.type != "cpu":
            tensor = tensor.cpu()
        about: dict[str, Any] = {
            "name": name,
            "datatype": name_of(tensor, name),
            "shape": list(tensor.shape),
        }
        if binary:
            piece = bytes_of(tensor)
            pieces.append(piece)
            about["parameters"] = {"binary_data_size": len(piece)}
        else:
            about["data"] = json_of(tensor, name)
        listed.append(about)
    head[kind] = listed
    words = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    if not pieces:
        return words, None
    return b"".join([words, *pieces]), len(words)


def length_of(header: bytes | None) -> int | None:
    """The number that Inference-Header-Content-Length holds; None where it was not sent.

    Raises:
        InputError: It is none.

    Example:
        >>> length_of(b"120"), length_of(None)
        (120, None)
    """
    if header is None:
        return None
    if not (header.isdigit() and len(header) < 19):
        raise InputError(f"Inference-Header-Content-Length is no number: {header[:40]!r}")
    return int(header)


def parts_of(
    body: bytes | bytearray, header_length: int | None, limits: Limits
) -> tuple[dict[str, Any], Binary]:
    """The JSON, and the bytes behind it.

    Args:
        body: Of a request or an answer.
        header_length: Bytes of JSON, as Inference-Header-Content-Length says; None: all.
        limits: See `Limits`.

    Raises:
        InputError: It is too large, empty, or no JSON object.

    Example:
        >>> parts_of(b'{"inputs": []}', None, Limits())[0]
        {'inputs': []}
    """
    if len(body) > limits.body_bytes:
        raise InputError(f"a body has at most {limits.body_bytes} bytes, this one {len(body)}")
    length = len(body) if header_length is None else header_length
    if header_length is None and not body:
        raise InputError("the body is empty; send JSON with inputs")
    if not 0 < length <= len(body):
        raise InputError(
            f"Inference-Header-Content-Length is {length}, the body has {len(body)} bytes"
        )
    if length > limits.json_bytes:
        raise InputError(
            f"a request has at most {limits.json_bytes} bytes of JSON, this one {length}; send "
            "tensors as binary data"
        )
    try:
        said = orjson.loads(memoryview(body)[:length])
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is no JSON: {error}") from error
    if type(said) is not dict:
        raise InputError(f"the body is a {type(said).__name__}, not an object with inputs")
    return said, Binary(body, length)

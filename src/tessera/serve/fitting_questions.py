"""What the clients ask of the part that adapts; see `questions`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx
import orjson
from torch import Tensor

from tessera.errors import InputError
from tessera.serve.fitting_values import Adapted, FitSettings, Spent
from tessera.serve.oip import encode_request
from tessera.serve.questions import Question
from tessera.serve.records import DeltaRecord, Session

__all__ = ["end_session", "fit", "keep_session", "session", "sessions"]

_LENGTH = "Inference-Header-Content-Length"
_LABELS = "labels"


def fit(
    tenant: str,
    inputs: Mapping[str, Tensor],
    labels: Tensor | None,
    how: FitSettings | None,
    more: Mapping[str, Any],
) -> Question[Adapted]:
    """Fit a delta to shots; `more`: other fields."""
    body, headers = _body(inputs, labels, how, more)
    return Question(
        method="POST",
        path=f"/v1/tenants/{quote(tenant, safe='')}/deltas:fit",
        read=lambda r: _adapted(r.json()),
        headers=headers,
        content=body,
    )


def session(
    tenant: str,
    delta: str,
    ttl_s: float,
    inputs: Mapping[str, Tensor] | None,
    labels: Tensor | None,
    how: FitSettings | None,
) -> Question[Session]:
    """Begin a session."""
    if inputs is None:
        if labels is not None or how is not None:
            raise InputError("a session with labels= or how= fits a delta: it needs inputs= too")
        return Question(
            method="POST",
            path=_sessions(tenant),
            json={"delta": delta, "ttl_s": ttl_s},
            read=_session,
        )
    more: dict[str, Any] = {"ttl_s": ttl_s, "delta": delta or None}
    body, headers = _body(inputs, labels, how, more)
    return Question(
        method="POST", path=_sessions(tenant), read=_session, headers=headers, content=body
    )


def sessions(tenant: str) -> Question[list[Session]]:
    """Those that are not over."""
    return Question(
        method="GET", path=_sessions(tenant), read=lambda r: [Session(**s) for s in r.json()]
    )


def end_session(tenant: str, id: str) -> Question[None]:
    """End one."""
    return Question(method="DELETE", path=_sessions(tenant, id), read=lambda r: None)


def keep_session(tenant: str, id: str) -> Question[DeltaRecord]:
    """Hold its delta."""
    return Question(
        method="POST",
        path=_sessions(tenant, id) + ":keep",
        read=lambda r: DeltaRecord(**r.json()),
    )


def _body(
    inputs: Mapping[str, Tensor],
    labels: Tensor | None,
    how: FitSettings | None,
    more: Mapping[str, Any],
) -> tuple[bytes, dict[str, str]]:
    """Tensors travel as binary data, the labels' after the others'."""
    if labels is not None and _LABELS in inputs:
        raise InputError("the labels are given twice: in inputs, and as labels=")
    every = dict(inputs) if labels is None else {**inputs, _LABELS: labels}
    body, length = encode_request(every)
    said = orjson.loads(body[:length])
    del said["parameters"]
    if labels is not None:
        said[_LABELS] = said["inputs"].pop()
    how = how or FitSettings()
    values = {f.name: getattr(how, f.name) for f in dataclasses.fields(how)}
    for name, value in {**values, **more}.items():
        if value is not None:
            said[name] = dict(value) if isinstance(value, Mapping) else _plain(value)
    words = orjson.dumps(said)
    binary = b"" if length is None else body[length:]
    headers = {"Content-Type": "application/octet-stream", _LENGTH: str(len(words))}
    return words + binary, headers


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _sessions(tenant: str, *more: str) -> str:
    return "/" + "/".join(quote(w, safe="") for w in ("v1", "tenants", tenant, "sessions", *more))


def _session(response: httpx.Response) -> Session:
    return Session(**response.json()["session"])


def _adapted(said: dict[str, Any]) -> Adapted:
    return Adapted(**{**said, "spent": Spent(**said["spent"])})

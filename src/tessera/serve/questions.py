"""What the clients ask, as values: a request to be sent, and how its answer is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final
from urllib.parse import quote

import httpx
from torch import Tensor

from tessera import errors
from tessera.arch import Delta
from tessera.errors import (
    AccessError,
    BusyError,
    ConflictError,
    InputError,
    TesseraError,
    UnknownNameError,
)
from tessera.serve.oip import decode_answer, encode_request
from tessera.serve.packing import pack
from tessera.serve.records import Alias, DeltaRecord, Key, Tenant
from tessera.serve.settings import Limits

__all__ = [
    "Question",
    "aliases",
    "check",
    "create_key",
    "create_tenant",
    "deltas",
    "history",
    "infer",
    "keys",
    "metadata",
    "own_key",
    "ready",
    "revoke_key",
    "rollback",
    "set_alias",
    "tenants",
    "upload",
]

T = TypeVar("T")

_LENGTH = "Inference-Header-Content-Length"
# An answer comes from the server the client chose: only what no honest one sends is refused.
_ANSWER = Limits(body_bytes=1 << 31, json_bytes=1 << 28, tensors=4096, elements=1 << 31)
_BY_STATUS = {
    400: InputError,
    401: AccessError,
    403: AccessError,
    404: UnknownNameError,
    409: ConflictError,
    413: InputError,
    415: InputError,
}


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question(Generic[T]):
    """A request, and how its answer is read.

    Attributes:
        method: HTTP's.
        path: Escaped.
        read: The answer's value.
        headers: Beside the key.
        content: The body, where it is bytes.
        json: The body, where it is JSON.
        files: The body, where it is a form: (name, bytes).
        fields: Beside the files.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    headers: Mapping[str, str] | None = None
    content: bytes | None = None
    json: Any = None
    files: Sequence[tuple[str, bytes]] = ()
    fields: Mapping[str, str] | None = None

    def arguments(self) -> dict[str, Any]:
        """For `httpx.Client.request`."""
        kind = "application/octet-stream"
        return {
            "method": self.method,
            "url": self.path,
            "headers": self.headers,
            "content": self.content,
            "json": self.json,
            "data": self.fields,
            "files": [("files", (name, data, kind)) for name, data in self.files] or None,
        }


def check(response: httpx.Response) -> None:
    """Raise the error that the server raised, if it did.

    Raises:
        TesseraError: Of the same class.

    Example:
        >>> check(httpx.Response(409, json={"error": "it moved", "type": "ConflictError"}))
        Traceback (most recent call last):
        tessera.errors.ConflictError: it moved
    """
    if response.is_success:
        return
    try:
        said = response.json()
        message, name = str(said["error"]), str(said.get("type", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        message, name = f"HTTP {response.status_code} from {response.url}", ""
    if response.status_code == 429 or name == "BusyError":
        raise BusyError(message, retry_after_s=_seconds(response.headers.get("retry-after")))
    kind = getattr(errors, name, None) if name in errors.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, TesseraError)):
        kind = _BY_STATUS.get(response.status_code, TesseraError)
    raise kind(message)


def _seconds(said: str | None) -> float:
    try:
        found = float(said or "1")
    except ValueError:
        return 1.0
    return found if 0 <= found < math.inf else 1.0


# --- the data --------------------------------------------------------------------------------


def ready() -> Question[bool]:
    """Whether the server takes requests."""
    return Question(method="GET", path="/v2/health/ready", read=lambda r: r.is_success)


def metadata(model: str) -> Question[dict[str, Any]]:
    """What a model takes and gives."""
    return Question(method="GET", path=f"/v2/models/{_word(model)}", read=_json)


def infer(
    model: str,
    inputs: Mapping[str, Tensor],
    *,
    outputs: Sequence[str] = (),
    request_id: str = "",
    timeout_s: float | None = None,
    session: str = "",
) -> Question[dict[str, Tensor]]:
    """What a model makes of some inputs; tensors travel as binary data."""
    parameters: dict[str, Any] = {}
    if timeout_s is not None:
        parameters["timeout"] = max(1, int(1e6 * timeout_s))
    if session:
        parameters["session"] = session
    body, length = encode_request(inputs, id=request_id, outputs=outputs, parameters=parameters)
    headers = {"Content-Type": "application/octet-stream", _LENGTH: str(length)}
    if request_id:
        headers["X-Request-Id"] = request_id
    return Question(
        method="POST",
        path=f"/v2/models/{_word(model)}/infer",
        read=_tensors,
        headers=headers,
        content=body,
    )


def _tensors(response: httpx.Response) -> dict[str, Tensor]:
    length = response.headers.get(_LENGTH)
    return decode_answer(response.content, None if length is None else int(length), limits=_ANSWER)


# --- the management --------------------------------------------------------------------------


def own_key() -> Question[Key]:
    """The key that asks."""
    return Question(method="GET", path="/v1/key", read=lambda r: _key(_json(r)))


def create_tenant(name: str) -> Question[Tenant]:
    """Make a tenant."""
    return Question(
        method="POST", path="/v1/tenants", json={"name": name}, read=lambda r: Tenant(**_json(r))
    )


def tenants() -> Question[list[Tenant]]:
    """Those that the key sees."""
    return Question(
        method="GET", path="/v1/tenants", read=lambda r: [Tenant(**t) for t in _json(r)]
    )


def create_key(tenant: str | None, scopes: Sequence[str]) -> Question[tuple[Key, str]]:
    """Make a key of the tenant, or one like the own."""

    def read(response: httpx.Response) -> tuple[Key, str]:
        said = _json(response)
        return _key(said["key"]), str(said["secret"])

    return Question(method="POST", path=_keys(tenant), json={"scopes": list(scopes)}, read=read)


def keys(tenant: str | None) -> Question[list[Key]]:
    """Those in force."""
    return Question(method="GET", path=_keys(tenant), read=lambda r: [_key(k) for k in _json(r)])


def revoke_key(tenant: str | None, id: str) -> Question[None]:
    """Put a key out of force."""
    return Question(method="DELETE", path=f"{_keys(tenant)}/{_word(id)}", read=lambda r: None)


def _keys(tenant: str | None) -> str:
    return "/v1/keys" if tenant is None else _of(tenant, "keys")


def upload(tenant: str, delta: Delta, parent: str) -> Question[DeltaRecord]:
    """Upload a delta, as it is now."""
    return Question(
        method="POST",
        path=_of(tenant, "deltas"),
        files=[("delta.safetensors", pack(delta.snapshot()))],
        fields={"parent": parent} if parent else None,
        read=lambda r: DeltaRecord(**_json(r)),
    )


def deltas(tenant: str) -> Question[list[DeltaRecord]]:
    """Those a tenant holds."""
    return Question(
        method="GET",
        path=_of(tenant, "deltas"),
        read=lambda r: [DeltaRecord(**d) for d in _json(r)],
    )


def aliases(tenant: str) -> Question[list[Alias]]:
    """Those a tenant has."""
    return Question(
        method="GET", path=_of(tenant, "aliases"), read=lambda r: [Alias(**a) for a in _json(r)]
    )


def set_alias(
    tenant: str, name: str, delta: str, *, generation: int, reason: str
) -> Question[Alias]:
    """Point an alias to a delta."""
    return Question(
        method="PUT",
        path=_of(tenant, "aliases", name),
        json={"delta": delta, "generation": generation, "reason": reason},
        read=lambda r: Alias(**_json(r)),
    )


def rollback(tenant: str, name: str, generation: int | None, reason: str) -> Question[Alias]:
    """Point an alias to what it pointed to before."""
    return Question(
        method="POST",
        path=_of(tenant, "aliases", name) + ":rollback",
        json={"generation": generation, "reason": reason},
        read=lambda r: Alias(**_json(r)),
    )


def history(tenant: str, name: str) -> Question[list[Alias]]:
    """All generations of an alias."""
    return Question(
        method="GET",
        path=_of(tenant, "aliases", name) + "/history",
        read=lambda r: [Alias(**a) for a in _json(r)],
    )


def _of(tenant: str, *words: str) -> str:
    return "/".join(["/v1/tenants", *map(_word, (tenant, *words))])


def _word(word: str) -> str:
    return quote(word, safe="")


def _json(response: httpx.Response) -> Any:
    return response.json()


def _key(said: Mapping[str, Any]) -> Key:
    return Key(id=said["id"], tenant=said["tenant"], scopes=frozenset(said["scopes"]))

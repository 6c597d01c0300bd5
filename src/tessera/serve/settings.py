"""What the server allows: sizes, times and counts, each with a bound."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

__all__ = ["AppSettings", "Limits"]

_MIB = 1 << 20


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Limits:
    """How large a request for inference may be; what is larger is refused before it is built.

    Attributes:
        body_bytes: The whole body.
        json_bytes: Its JSON. Apart, as a megabyte of JSON takes some twenty in memory.
        tensors: Inputs, and outputs asked for.
        elements: Numbers in one tensor.
        dimensions: Of one tensor.
        text: Characters of a name or an id.

    Example:
        >>> Limits(tensors=4).tensors
        4
    """

    body_bytes: int = 64 * _MIB
    json_bytes: int = 8 * _MIB
    tensors: int = 64
    elements: int = 1 << 26
    dimensions: int = 8
    text: int = 256


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AppSettings:
    """The settings of the HTTP face.

    Attributes:
        name: What the server calls itself in its metadata.
        limits: Of a request for inference.
        management_bytes: The largest JSON body under /v1.
        upload_bytes: The largest upload of a delta.
        fit_bytes: The largest body with shots to fit a delta to.
        buffered_bytes: Bodies that all requests may hold in memory or on disk together; beyond it
            a request is asked to come again (429).
        body_timeout_s: A client has this long to send its body.
        send_timeout_s: And this long to take each piece of the answer.
        infer_timeout_s: How long a request waits for its answer at most.
        look_s: How often a waiting request looks whether its client has gone.
        tenant_labels: Tenants with their own label in the metrics; the rest are "_other".
        metrics_on_loopback: Whether /metrics answers without a key on this machine. Not behind a
            proxy on the same machine that does not say whom it forwards.
        drain_retry_s: What is said to a client that comes while the server drains.

    Example:
        >>> AppSettings(infer_timeout_s=5.0).limits.dimensions
        8
    """

    name: str = "tessera"
    limits: Limits = field(default_factory=Limits)
    management_bytes: int = _MIB
    upload_bytes: int = 256 * _MIB
    fit_bytes: int = 16 * _MIB
    buffered_bytes: int = 1024 * _MIB
    body_timeout_s: float = 30.0
    send_timeout_s: float = 30.0
    infer_timeout_s: float = 30.0
    look_s: float = 0.25
    tenant_labels: int = 50
    metrics_on_loopback: bool = True
    drain_retry_s: float = 5.0

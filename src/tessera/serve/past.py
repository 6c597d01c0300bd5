"""Compute past answers again, and say of each whether it is the same to the last bit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from tessera import trees
from tessera.arch import Delta, base_hash
from tessera.errors import CheckpointError, TesseraError
from tessera.serve.again import execute
from tessera.serve.audit import Audit
from tessera.serve.batch import Plan
from tessera.serve.blobs import Blobs
from tessera.serve.recorder import fingerprint, response_hash
from tessera.serve.records import Event

__all__ = ["Replayed", "replay"]

_BLOBS_KEPT = 8


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replayed:
    """What became of one past request.

    Attributes:
        seq: Of its event.
        time_s: When it was answered.
        tenant: Whose it was.
        request: Its id.
        verdict: "identical"; "different"; "damaged", what is needed does not fit its hash; or
            "unknown", what is needed was not kept.
        detail: Why, where it is not identical.
    """

    seq: int
    time_s: float
    tenant: str
    request: str
    verdict: str
    detail: str


def replay(
    model: nn.Module,
    audit: Audit,
    blobs: Blobs,
    load_delta: Callable[[str], Delta],
    *,
    since_s: float | None = None,
    tenant: str | None = None,
) -> Iterator[Replayed]:
    """Run the requests of the log again.

    Args:
        model: The base, in eval mode.
        audit: The log. `Audit.verify` says whether it is whole.
        blobs: Of inputs.
        load_delta: A delta by its hash.
        since_s: Leave out older ones, seconds since 1970.
        tenant: Only of this one.

    Yields:
        One for each request, in the log's order.

    Example:
        >>> import tempfile
        >>> from tessera.serve.registry import Registry
        >>> folder, model = tempfile.mkdtemp(), nn.Linear(2, 1).eval()
        >>> blobs, db = Blobs(f"{folder}/blobs"), f"sqlite:///{folder}/registry.db"
        >>> registry = Registry(db, blobs, base_hash=base_hash(model))
        >>> list(replay(model, registry.audit, blobs, registry.load))  # nothing was asked yet
        []
        >>> registry.close()
    """
    past = _Past(model, audit, blobs, load_delta)
    for event in audit.read(since_s=since_s, tenant=tenant, kinds=["request"]):
        verdict, detail = past.judge(event)
        yield Replayed(
            seq=event.seq,
            time_s=event.time_s,
            tenant=event.tenant,
            request=str(event.body.get("request", "")),
            verdict=verdict,
            detail=detail,
        )


@final
class _Past:
    """What requests refer to: the plans of batches, the starts of servers, blobs of inputs."""

    def __init__(
        self, model: nn.Module, audit: Audit, blobs: Blobs, load_delta: Callable[[str], Delta]
    ) -> None:
        self._model, self._blobs, self._load = model.eval(), blobs, load_delta
        self._base = base_hash(model)
        self._plans: dict[tuple[str, int], Mapping[str, Any]] = {}
        self._boots: dict[str, Mapping[str, Any]] = {}
        for event in audit.read(kinds=["batch", "server.start"]):
            boot = str(event.body.get("boot"))
            if event.kind == "batch":
                self._plans[boot, int(event.body["batch"])] = event.body["plan"]
            else:
                self._boots[boot] = event.body
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def judge(self, event: Event) -> tuple[str, str]:
        """The verdict on a request, and why."""
        body = event.body
        try:
            boot, batch = str(body["boot"]), int(body["batch"])
            start, plan = self._boots.get(boot), self._plans.get((boot, batch))
            if not body["blob"]:
                return "unknown", "its inputs were not kept (the server keeps hashes)"
            if start is None or plan is None:
                return "unknown", f"batch {batch} of server {boot} is not in the log"
            if start["base"] != self._base:
                return "unknown", f"it ran on another base, {str(start['base'])[:12]}..."
            inputs = self._inputs(str(body["blob"]), int(body["at"]))
            if trees.sha256(inputs) != body["inputs"]:
                return "damaged", "its inputs do not fit their hash"
            outputs = execute(self._model, Plan.parse(plan), int(body["part"]), inputs, self._load)
        except (CheckpointError, KeyError) as error:
            return "damaged", str(error)
        except TesseraError as error:
            return "unknown", str(error)
        if response_hash(outputs) == body["response"]:
            return "identical", ""
        now, then = fingerprint(), {k: start.get(k) for k in fingerprint()}
        other = [f"{k} {then[k]} then, {now[k]} now" for k in now if now[k] != then[k]]
        return "different", "; ".join(other) or "on the same machine: this should not happen"

    def _inputs(self, blob: str, at: int) -> dict[str, Tensor]:
        found = self._kept.get(blob)
        if found is None:
            try:
                found = load(self._blobs.get(blob))
            except SafetensorError as error:
                raise CheckpointError(f"the blob {blob} holds no inputs: {error}") from error
            self._kept[blob] = found
            while len(self._kept) > _BLOBS_KEPT:
                self._kept.popitem(last=False)
        start = f"{at}."
        return {n.removeprefix(start): t for n, t in found.items() if n.startswith(start)}

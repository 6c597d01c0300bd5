"""What servers did, done again: answers, fits and gates, and whether each is the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from tessera import trees
from tessera.arch import Delta, base_hash
from tessera.errors import (
    CheckpointError,
    InputError,
    MissingDataError,
    StorageError,
    TesseraError,
    UnknownNameError,
)
from tessera.serve.again import decision_differs, execute, refit
from tessera.serve.audit import Audit
from tessera.serve.batch import Plan, device_of
from tessera.serve.blobs import Blobs
from tessera.serve.recorder import fingerprint, response_hash
from tessera.serve.records import Event

__all__ = ["WHAT", "Replayed", "replay"]

# What there is to do again -> the events that tell of it.
WHAT: Mapping[str, tuple[str, ...]] = {
    "requests": ("request",),
    "fits": ("delta.fit", "learn.fit"),
    "gates": ("gate.passed", "gate.refused", "watch.regressed"),
}
_BLOBS_KEPT = 8


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replayed:
    """What became of one event.

    Attributes:
        seq: Of the event.
        time_s: When it was.
        tenant: Whose it was.
        what: "requests", "fits" or "gates": see `WHAT`.
        name: The request's id, the hash of the fit's delta, or that of the gate's evidence.
        verdict: "identical"; "different"; "damaged", what is needed does not fit its hash; or
            "unknown", what is needed was not kept.
        detail: Why, where it is not identical.
    """

    seq: int
    time_s: float
    tenant: str
    what: str
    name: str
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
    what: Collection[str] = tuple(WHAT),
) -> Iterator[Replayed]:
    """Answer the requests of the log again, fit its fits again, and decide its gates again.

    Args:
        model: The base, in eval mode.
        audit: The log. `Audit.verify` says whether it is whole.
        blobs: Of inputs, shots and evidence.
        load_delta: A delta by its hash.
        since_s: Leave out older ones, seconds since 1970.
        tenant: Only of this one.
        what: Of "requests", "fits" and "gates".

    Yields:
        One for each, in the log's order.

    Raises:
        InputError: There is no such thing to do again.
        StorageError: The database or the blobs are away.

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
    if unknown := set(what) - WHAT.keys():
        raise InputError(f"there are {', '.join(WHAT)} to replay, not {min(unknown)!r:.40}")
    kinds = {kind: name for name in WHAT if name in what for kind in WHAT[name]}
    past = _Past(model, audit, blobs, load_delta, plans="requests" in what)
    for event in audit.read(since_s=since_s, tenant=tenant, kinds=kinds):
        name, (verdict, detail) = past.judge(event)
        yield Replayed(
            seq=event.seq,
            time_s=event.time_s,
            tenant=event.tenant,
            what=kinds[event.kind],
            name=name,
            verdict=verdict,
            detail=detail,
        )


@final
class _Past:
    """What events refer to: the plans of batches, the starts of servers, blobs, deltas."""

    def __init__(
        self,
        model: nn.Module,
        audit: Audit,
        blobs: Blobs,
        load_delta: Callable[[str], Delta],
        *,
        plans: bool,
    ) -> None:
        self._model, self._blobs, self._load = model.eval(), blobs, load_delta
        self._base, self._device = base_hash(model), device_of(model)
        self._plans: dict[tuple[str, int], Mapping[str, Any]] = {}
        self._boots: dict[str, Mapping[str, Any]] = {}
        for event in audit.read(kinds=["batch", "server.start"]) if plans else ():
            boot = str(event.body.get("boot"))
            if event.kind == "batch":
                self._plans[boot, int(event.body["batch"])] = event.body["plan"]
            else:
                self._boots[boot] = event.body
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def judge(self, event: Event) -> tuple[str, tuple[str, str]]:
        """What it is about; and the verdict, and why."""
        body = event.body
        if event.kind == "request":
            return str(body.get("request", "")), self._request(body)
        if event.kind in WHAT["fits"]:
            return str(body.get("delta", "")), self._fit(event)
        return str(body.get("evidence", body.get("gate", ""))), self._gate(event)

    def _request(self, body: Mapping[str, Any]) -> tuple[str, str]:
        try:
            boot, batch = str(body["boot"]), int(body["batch"])
            start, plan = self._boots.get(boot), self._plans.get((boot, batch))
            if not body["blob"]:
                return "unknown", "its inputs were not kept (the server keeps hashes)"
            if start is None or plan is None:
                return "unknown", f"batch {batch} of server {boot} is not in the log"
            if start["base"] != self._base:
                return "unknown", _other_base(start["base"])
            inputs = self._inputs(str(body["blob"]), int(body["at"]))
            if trees.sha256(inputs) != body["inputs"]:
                return "damaged", "its inputs do not fit their hash"
            outputs = execute(self._model, Plan.parse(plan), int(body["part"]), inputs, self._load)
        except StorageError:  # nothing can be said while the blobs are away
            raise
        except (CheckpointError, KeyError) as error:
            return "damaged", str(error)
        except TesseraError as error:
            return "unknown", str(error)
        if response_hash(outputs) == body["response"]:
            return "identical", ""
        return _different(start, fingerprint(self._device))

    def _fit(self, event: Event) -> tuple[str, str]:
        body = event.body
        try:
            old = body["rehearsal"]
            if not body["shots_blob"] or (old is not None and not old["shots_blob"]):
                return "unknown", "its shots were not kept (the server keeps hashes)"
            if body["base"] != self._base:
                return "unknown", _other_base(body["base"])
            found = refit(self._model, event, self._blobs, self._load)
        except StorageError:  # nothing can be said while the blobs are away
            raise
        except (CheckpointError, KeyError) as error:
            return "damaged", str(error)
        except (MissingDataError, UnknownNameError) as error:
            return "unknown", str(error)
        except TesseraError as error:
            return "different", f"it fails now: {error}"
        if found.hash == body["delta"]:
            return "identical", ""
        machine = body["machine"]
        now = fingerprint(self._device) | {"threads": machine["threads"]}
        return _different(machine, now)

    def _gate(self, event: Event) -> tuple[str, str]:
        try:
            odd = decision_differs(event, self._blobs)
        except StorageError:  # nothing can be said while the blobs are away
            raise
        except (CheckpointError, KeyError) as error:
            return "damaged", str(error)
        except TesseraError as error:
            return "unknown", str(error)
        return ("different", odd) if odd else ("identical", "")

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


def _different(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str]:
    then, now = ({"device": "the CPU"} | dict(machine) for machine in (then, now))
    other = [f"{k} {then.get(k)} then, {now[k]} now" for k in now if now[k] != then.get(k)]
    return "different", "; ".join(other) or "on the same machine: this should not happen"


def _other_base(then: object) -> str:
    return f"it ran on another base, {str(then)[:12]}..."

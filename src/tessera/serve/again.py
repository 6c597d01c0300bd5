"""An answer, a fit or a gate's decision made again, from the log's words and the blobs alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tessera.arch import Delta
from tessera.errors import InputError
from tessera.serve.batch import Bank, Part, Plan, form_of, run
from tessera.serve.blobs import Blobs
from tessera.serve.fitting_log import order_of
from tessera.serve.fitting_run import FitterSettings, run_order
from tessera.serve.gates import decision_hash, is_regression, recompute
from tessera.serve.records import Event

__all__ = ["decision_differs", "execute", "refit"]

# Whatever the server allowed then is no cap now: as many steps as it took are taken.
_ANY = FitterSettings(rows=1 << 40, steps=1 << 40, ms=1e15)


def execute(
    model: nn.Module,
    plan: Plan,
    part: int,
    inputs: Mapping[str, Tensor],
    load: Callable[[str], Delta],
) -> dict[str, Tensor]:
    """The outputs of one part of a batch, computed again, to the same bits on the same machine.

    The other parts are run with rows of padding in their place: their deltas count, for these
    decide what is computed; their values do not.

    Args:
        model: The base, in eval mode.
        plan: Of the batch.
        part: Which part.
        inputs: That part's.
        load: A delta by its hash.

    Raises:
        InputError: The plan has no such part.
    """
    if not 0 <= part < len(plan.parts):
        raise InputError(f"the batch had {len(plan.parts)} parts, there is no {part}")
    form = form_of(model)
    length = next((t.shape[1] for n, t in inputs.items() if n in form.padding), 0)
    deltas = {name: load(name) for name, _ in plan.parts if name}
    parts = []
    for at, (name, rows) in enumerate(plan.parts):
        own = dict(inputs) if at == part else {n: _blank(n, t, rows) for n, t in inputs.items()}
        parts.append(Part(inputs=own, delta=name, rows=rows, length=length))
    bank = Bank(model, max(1, len(deltas)), plan.room)
    return run(bank, form, parts, deltas, plan.bucket)[part]


def _blank(name: str, like: Tensor, rows: int) -> Tensor:
    blank = like.new_zeros(rows, *like.shape[1:])
    if name == "attention_mask":
        blank[:, :1] = 1
    return blank


def refit(model: nn.Module, event: Event, blobs: Blobs, load: Callable[[str], Delta]) -> Delta:
    """The delta of a fit, fitted again: the same to the last bit on the same machine.

    Args:
        model: The base, in eval mode.
        event: "delta.fit" or "learn.fit", with its shots kept.
        blobs: Where they are.
        load: A delta by its hash, for what the fit went on from.

    Raises:
        CheckpointError: Shots do not fit their hash, or the event is none of a fit.
        MissingDataError: They, or what it went on from, are lost.
        InputError: The fit fails now; so NonFiniteError and DeltaError.
    """
    order = order_of(event.body, event.tenant, blobs)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(int(event.body["machine"]["threads"]))
        return run_order(model, lambda hash, tenant=None: load(hash), order, _ANY).delta
    finally:
        torch.set_num_threads(before)


def decision_differs(event: Event, blobs: Blobs) -> str:
    """How the decision that an event tells differs from the one its evidence gives; "": it is that.

    Args:
        event: "gate.passed", "gate.refused" or "watch.regressed".
        blobs: Where evidence is.

    Raises:
        CheckpointError: The evidence is damaged.
        MissingDataError: It is lost.
    """
    body = event.body
    if event.kind == "watch.regressed":
        right, n = body["before"]
        live_right, live_n = body["live"]
        regressed = is_regression(
            (right, n),
            (live_right, live_n),
            margin=body["margin"],
            confidence=body["confidence"],
            look=body["look"],
        )
        return "" if regressed else "the outcomes it names are no regression"
    blob = blobs.get(str(body["evidence"]))
    decision, evidence = recompute(blob), json.loads(blob)
    about = ("alias", "generation", "incumbent", "candidate", "look")
    if evidence["tenant"] != event.tenant or any(evidence[n] != body[n] for n in about):
        return "the evidence is of another gate"
    verdict = "passed" if decision["passed"] else "refused"
    if f"gate.{verdict}" != event.kind:
        said = event.kind.removeprefix("gate.")
        return f"the log says {said}, the evidence gives {verdict}"
    odd = [n for n in ("outcomes", "overall") if decision[n] != body[n]]
    if decision["reasons"][: len(body["reasons"])] != body["reasons"]:
        odd.append("reasons")
    if body["decision"] != decision_hash(decision):
        odd.append("decision")
    return f"the evidence gives other {', '.join(odd)} than the log says" if odd else ""

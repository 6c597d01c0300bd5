"""/v1, the part that rolls out: experiments, feedback and gates."""

from __future__ import annotations

from typing import Annotated, Any, final

from fastapi import APIRouter, Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from tessera.errors import InputError
from tessera.serve.callers import By, owner_of
from tessera.serve.feedback import Said
from tessera.serve.gates import Policy
from tessera.serve.oip_read import Binary, read_tensors
from tessera.serve.ports import Viewing
from tessera.serve.records import Alias
from tessera.serve.rollout import Experiment
from tessera.serve.rollout_desk import Desk
from tessera.serve.rollout_values import Asked, Feedback, Gate, Shots, Watch
from tessera.serve.settings import Limits

__all__ = ["add_rollouts"]

_STRICT = ConfigDict(extra="forbid", strict=True)
_router = APIRouter(prefix="/v1")


@final
class NewExperiment(BaseModel):
    """An experiment to be begun, or changed."""

    model_config = _STRICT

    candidate: str = Field(description="A delta's hash; '' for the base alone.")
    share: float = Field(ge=0, le=1, description="Of the keys, in steps of 1/10,000.")
    mode: str = Field(default="split", json_schema_extra={"enum": ["split", "shadow"]})
    salt: str = Field(default="", description="Deals the keys; '': a new one.")


@final
class Report(BaseModel):
    """An experiment, and what is known of it."""

    experiment: Experiment
    holds: bool = Field(description="False: the alias was moved since, which ended it.")
    feedback: dict[str, list[int]] = Field(description="Arm: right, all.")
    shadows: dict[str, int] = Field(description="Of the first 10,000: requests, rows, agree.")


@final
class NewFeedback(BaseModel):
    """What became of an answer; label or correct, and metric, at least one."""

    model_config = _STRICT

    request: str = Field(description="The answer's X-Request-Id.")
    label: int | list[int] | None = Field(
        default=None, description="The right class, or each row's."
    )
    correct: bool | list[bool] | None = None
    metric: float | None = Field(default=None, allow_inf_nan=False)
    slices: dict[str, str | int | bool] = Field(default_factory=dict)


@final
class NewShots(BaseModel):
    """Held-out examples."""

    model_config = _STRICT

    inputs: list[dict[str, Any]] = Field(description="As in /v2, with their data as JSON.")
    labels: list[int]
    ids: list[str] = Field(default_factory=list)
    slices: dict[str, list[str | int | bool]] = Field(default_factory=dict)


@final
class NewGate(BaseModel):
    """A gate that is asked for."""

    model_config = _STRICT

    candidate: str | None = Field(default=None, description="None: the experiment's.")
    policy: dict[str, Any] = Field(
        default_factory=dict,
        description="metric, min_n, margin, confidence, slices, slice_margin, slice_min_n",
    )
    shots: NewShots | None = Field(default=None, description="None: by the experiment's feedback.")
    output: str = ""
    promote: bool = False
    watch: dict[str, Any] | None = Field(default=None, description="min_n, margin, confidence")


@final
class GateMade(BaseModel):
    """A decision, and the alias where it was moved."""

    gate: Gate
    alias: Alias | None


@final
class GateShown(BaseModel):
    """A decision and its evidence, from which it was made again just now."""

    gate: Gate
    evidence: dict[str, Any]


@final
class _Server:
    def __init__(self, registry: Viewing, desk: Desk, limits: Limits) -> None:
        self.registry, self.desk, self.limits = registry, desk, limits


def _server(request: Request) -> _Server:
    found = request.app.state.rollouts
    assert isinstance(found, _Server)
    return found


_Known = Annotated[_Server, Depends(_server)]


def add_rollouts(app: FastAPI, registry: Viewing, desk: Desk, limits: Limits) -> None:
    """Put the routes below into the application of /v1.

    Args:
        app: See `management`.
        registry: Knows the aliases.
        desk: Answers.
        limits: Of tensors in a body.
    """
    app.state.rollouts = _Server(registry, desk, limits)
    app.include_router(_router)


_AT = "/tenants/{tenant}/aliases/{name}"


@_router.post(_AT + "/experiment", status_code=201)
def begin(tenant: str, name: str, body: NewExperiment, by: By, server: _Known) -> Experiment:
    """Give a candidate a share of an alias's traffic, or change the share it has."""
    return server.desk.rollouts.experiments.start(
        owner_of(by, tenant),
        name,
        body.candidate,
        share=body.share,
        mode=body.mode,
        salt=body.salt,
        by=by,
    )


@_router.get(_AT + "/experiment")
def report(tenant: str, name: str, by: By, server: _Known) -> Report:
    """The experiment of an alias, and what is known of it."""
    owner, rollouts = owner_of(by, tenant), server.desk.rollouts
    found = rollouts.experiments.get(owner, name)
    alias = server.registry.view().aliases.get((owner, name))
    return Report(
        experiment=found,
        holds=alias is not None and found.holds(alias),
        feedback=rollouts.journal.counts(owner, found.id),
        shadows=server.desk.shadows(owner, found),
    )


@_router.delete(_AT + "/experiment", status_code=204)
def end(tenant: str, name: str, by: By, server: _Known, reason: str = "") -> None:
    """End the experiment of an alias; the log has the reason."""
    server.desk.rollouts.experiments.end(owner_of(by, tenant), name, by=by, reason=reason)


@_router.post("/tenants/{tenant}/feedback", status_code=201)
def feedback(tenant: str, body: NewFeedback, by: By, server: _Known) -> Feedback:
    """Say what became of an answer; the same again is no harm."""
    said = Said.parse(body.model_dump())
    return server.desk.feedback(owner_of(by, tenant, "infer"), said, by=by)


@_router.post(_AT + ":gate", status_code=201)
def gate(tenant: str, name: str, body: NewGate, by: By, server: _Known) -> GateMade:
    """Decide whether a candidate may take an alias's place, and promote it where asked."""
    found = server.desk.gate(owner_of(by, tenant), name, _asked(body, server.limits), by=by)
    return GateMade(gate=found.gate, alias=found.alias)


@_router.get(_AT + "/gates")
def gates(tenant: str, name: str, by: By, server: _Known) -> list[Gate]:
    """The last 100 gates of an alias, the newest first."""
    return server.desk.rollouts.gates.all(owner_of(by, tenant), name)


@_router.get(_AT + "/gates/{id}")
def evidence(tenant: str, name: str, id: str, by: By, server: _Known) -> GateShown:
    """One of them, and its evidence."""
    found = server.desk.rollouts.gates.get(owner_of(by, tenant), name, id)
    return GateShown(gate=found, evidence=server.desk.rollouts.gates.evidence(found))


def _asked(body: NewGate, limits: Limits) -> Asked:
    try:
        watch = None if body.watch is None else Watch(**body.watch)
    except TypeError as error:
        raise InputError(f"a watch has min_n, margin and confidence, {error}") from error
    if watch is not None and not body.promote:
        raise InputError("watch says when a promotion is taken back; it needs promote: true")
    shots = body.shots
    return Asked(
        candidate=body.candidate,
        policy=Policy.parse(body.policy),
        shots=None if shots is None else _shots(shots, limits),
        output=body.output,
        promote=body.promote,
        watch=watch,
    )


def _shots(said: NewShots, limits: Limits) -> Shots:
    found = Shots(
        inputs=read_tensors(said.inputs, "inputs", Binary(b"", 0), limits),
        labels=said.labels,
        ids=said.ids,
        slices={name: [str(v) for v in values] for name, values in said.slices.items()},
    )
    found.check()
    return found

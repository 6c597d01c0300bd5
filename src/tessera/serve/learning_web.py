"""/v1, the part that learns: policies of aliases, rounds, and budgets of tenants."""

from __future__ import annotations

from typing import Annotated, Any, final

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from tessera.serve.callers import By, owner_of
from tessera.serve.learning_values import (
    LearningPolicy,
    LearningState,
    LearningStep,
    Round,
    Spending,
)
from tessera.serve.learning_watcher import Learner
from tessera.serve.records import alias_name
from tessera.serve.registry import Registry
from tessera.serve.web import tenant_for, want_scope

__all__ = ["add_learning"]

_STRICT = ConfigDict(extra="forbid", strict=True)
_router = APIRouter(prefix="/v1")


@final
class NewLearning(BaseModel):
    """When an alias learns from its feedback, and how."""

    model_config = _STRICT

    on: str = Field(default="both", json_schema_extra={"enum": ["drift", "schedule", "both"]})
    every_s: float = Field(default=3600.0, description="How often 'schedule' is.")
    min_new: int = Field(default=200, description="Labelled examples that must have come.")
    window: int = Field(default=128, description="New examples that a round is fitted to.")
    replay: int = Field(default=128, description="Older ones that are rehearsed.")
    rho: float = Field(default=0.5, description="The new ones' share of the loss.")
    lam: float = Field(default=10.0, description="Strength of elastic weight consolidation.")
    holdout: float = Field(default=0.25, description="The share that is held out for the gate.")
    fit: dict[str, Any] = Field(default_factory=dict, description="As in deltas:fit.")
    gate: dict[str, Any] = Field(default_factory=dict, description="As the policy in :gate.")
    promote: bool = True
    watch: dict[str, Any] | None = Field(default=None, description="As in :gate.")
    output: str = Field(default="", description="With the scores of classes; '': the only one.")


@final
class NewBudget(BaseModel):
    """What a tenant's rounds may take in a window of time."""

    model_config = _STRICT

    ms: float = Field(gt=0, allow_inf_nan=False, description="Milliseconds of fits.")
    joules: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    window_s: float = Field(default=86_400.0, ge=1, le=366 * 86_400)


@final
class _Server:
    """What the functions below need."""

    def __init__(self, registry: Registry, learner: Learner) -> None:
        self.registry, self.learner = registry, learner


def _server(request: Request) -> _Server:
    found = request.app.state.learning
    assert isinstance(found, _Server)
    return found


_Known = Annotated[_Server, Depends(_server)]


def add_learning(app: FastAPI, registry: Registry, learner: Learner) -> None:
    """Put the routes below into the application of /v1.

    Args:
        app: See `management`.
        registry: Has the policies and budgets.
        learner: Runs rounds.
    """
    app.state.learning = _Server(registry, learner)
    app.include_router(_router)


_AT = "/tenants/{tenant}/aliases/{name}/learning"


@_router.put(_AT)
def learn(tenant: str, name: str, body: NewLearning, by: By, server: _Known) -> LearningPolicy:
    """Let an alias learn from its feedback, or otherwise than so far."""
    policy = LearningPolicy.parse(owner_of(by, tenant), alias_name(name), body.model_dump())
    return server.learner.set(policy, by=by)


@_router.get(_AT)
def state(tenant: str, name: str, by: By, server: _Known) -> LearningState:
    """How far an alias is."""
    return server.registry.learning.state(owner_of(by, tenant), name)


@_router.delete(_AT, status_code=204)
def end(tenant: str, name: str, by: By, server: _Known) -> None:
    """Let an alias learn no more."""
    server.registry.learning.end(owner_of(by, tenant), name, by=by)


@_router.get(_AT + "/steps")
def steps(
    tenant: str,
    name: str,
    by: By,
    server: _Known,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[LearningStep]:
    """What was done, the newest last."""
    owner = owner_of(by, tenant)
    server.registry.tenant(owner)
    return server.registry.learning.steps(owner, alias_name(name), limit)


@_router.post(_AT + ":run", status_code=201)
def run(tenant: str, name: str, by: By, server: _Known) -> Round:
    """Run a round now; it is answered when the gate has decided."""
    return server.learner.run(owner_of(by, tenant), alias_name(name))


@_router.put("/tenants/{tenant}/budget")
def set_budget(tenant: str, body: NewBudget, by: By, server: _Known) -> Spending:
    """Set what a tenant's rounds may take; with an admin's key."""
    want_scope(by, "admin")
    return server.registry.learning.budgets.set(
        tenant_for(by, tenant),
        ms=body.ms,
        joules=body.joules,
        window_s=body.window_s,
        by=by,
    )


@_router.get("/tenants/{tenant}/budget")
def budget(tenant: str, by: By, server: _Known) -> Spending:
    """What a tenant's rounds may take, and what they took in this window."""
    return server.registry.learning.spending(owner_of(by, tenant))

"""What the clients ask of the part that learns; see `questions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from tessera.serve.learning_values import (
    LearningPolicy,
    LearningState,
    LearningStep,
    Round,
    Spending,
)
from tessera.serve.questions import Question
from tessera.serve.records import Alias

__all__ = ["end", "learn", "run", "state"]


def learn(tenant: str, policy: LearningPolicy) -> Question[LearningPolicy]:
    """Let an alias learn."""
    return Question(
        method="PUT",
        path=_of(tenant, policy.alias),
        json=policy.json(),
        read=lambda r: _policy(r.json()),
    )


def state(tenant: str, alias: str) -> Question[LearningState]:
    """How far it is."""

    def read(response: Any) -> LearningState:
        said = response.json()
        own = {"policy": _policy(said["policy"]), "spending": Spending(**said["spending"])}
        steps = [LearningStep(**step) for step in said["steps"]]
        return LearningState(**{**said, **own, "steps": steps})

    return Question(method="GET", path=_of(tenant, alias), read=read)


def end(tenant: str, alias: str) -> Question[None]:
    """Let it learn no more."""
    return Question(method="DELETE", path=_of(tenant, alias), read=lambda r: None)


def run(tenant: str, alias: str) -> Question[Round]:
    """A round, now."""

    def read(response: Any) -> Round:
        said = response.json()
        alias = None if said["alias"] is None else Alias(**said["alias"])
        return Round(step=LearningStep(**said["step"]), alias=alias)

    return Question(method="POST", path=_of(tenant, alias) + ":run", read=read)


def _policy(said: Mapping[str, Any]) -> LearningPolicy:
    own = {k: v for k, v in said.items() if k not in ("tenant", "alias")}
    return LearningPolicy.parse(said["tenant"], said["alias"], own)


def _of(tenant: str, alias: str) -> str:
    words = ("v1", "tenants", tenant, "aliases", alias, "learning")
    return "/" + "/".join(quote(word, safe="") for word in words)

"""From a model's name in a request to the delta that answers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

from tessera.errors import UnknownNameError
from tessera.serve.ports import Call, Viewing, alias_of, reader
from tessera.serve.records import Alias
from tessera.serve.rollout import Arm, Experiment, arm_of, sticky_key
from tessera.serve.web import authenticate

__all__ = ["SESSION", "Finding", "Ways", "choose", "resolve"]

SESSION = "session:"  # begins no alias: their names have no colon


class Finding(Protocol):
    """What is asked of the sessions on the hot path."""

    def find(self, tenant: str, name: str) -> Alias | None:
        """The session of that name, as an alias at generation 1; None: there is none, or it ended.

        From memory: nothing here waits.
        """


class Dealing(Protocol):
    """What is asked of the experiments on the hot path."""

    def running(self) -> Mapping[tuple[str, str], Experiment]:
        """(tenant, alias) -> its experiment, from memory."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ways:
    """What besides the registry's aliases decides which delta answers; a None: nothing does.

    Attributes:
        sessions: Names that end by themselves.
        experiments: Give candidates a share of an alias's traffic.
    """

    sessions: Finding | None = None
    experiments: Dealing | None = None


def resolve(registry: Viewing, ways: Ways, call: Call, name: str, version: str | None) -> Alias:
    """What a request's model name stands for now: whose it is, which generation, which delta.

    It is asked twice of each request, before its body is read and after, and answers from memory.

    Raises:
        AccessError: There is no key, or one that may not infer.
        UnknownNameError: The tenant has no such model, or not at this version; no such tenant.
    """
    if not name.startswith(SESSION):
        return alias_of(registry, call, name, version)
    tenant, _ = reader(registry, call)
    found = None if ways.sessions is None else ways.sessions.find(tenant, name)
    if found is None:
        raise UnknownNameError(f"there is no model {name[:128]!r}, or its session has ended")
    if version is not None and version != str(found.generation):
        raise UnknownNameError(f"model {name[:128]!r} is served at version {found.generation} only")
    return found


def choose(
    registry: Viewing, ways: Ways, call: Call, alias: Alias, parameters: Mapping[str, Any]
) -> Arm:
    """Which delta answers a request of an alias, by its experiment.

    Args:
        registry: Knows the key.
        ways: See `Ways`.
        call: The request.
        alias: What it named.
        parameters: The request's own: ``session`` says whose requests stay together.

    Raises:
        AccessError: The key is no longer in force.
        InputError: `session` is no text of 1 to 256 characters.
    """
    running = {} if ways.experiments is None else ways.experiments.running()
    if (alias.tenant, alias.name) not in running:
        return Arm(delta=alias.delta)
    said, header = parameters.get("session"), call.headers.get(b"x-tessera-session")
    by = authenticate(registry.view(), call.headers)
    return arm_of(running, alias, sticky_key(said, header, by.id))

"""A server with a past: three tenants, gates, an experiment, feedback that drifts, budgets.

Used by the dashboard's tests. To look at it: python tests/serve/_state.py FOLDER [PORT]
"""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tessera import peft, random
from tessera.arch import Delta, base_hash
from tessera.serve.app import App, make_app
from tessera.serve.blobs import Blobs
from tessera.serve.dashboard import Dashboard, add_dashboard
from tessera.serve.engine import Engine
from tessera.serve.feedback import Said
from tessera.serve.gates import Policy
from tessera.serve.learning_values import LearningPolicy
from tessera.serve.listen import Server
from tessera.serve.records import Key
from tessera.serve.registry import Registry
from tessera.serve.rollout_values import Gate, Watch

ADMIN = "an-admin-key-for-the-tests-only"
NOW = 1_790_000_000.0  # 2026-09-21, 14:13 UTC
DAY, HOUR = 86_400.0, 3_600.0
ROWS = 8  # of a request, each with an outcome


@dataclass
class Clock:
    """Says what it is told to."""

    at_s: float

    def __call__(self) -> float:
        return self.at_s


@dataclass
class Past:
    """What was written into a folder.

    Attributes:
        deltas: Tenant -> hashes, the oldest first.
        gates: "refused", "promoted", "learned" and "passed", of acme's alias intent.
    """

    folder: Path
    deltas: dict[str, list[str]]
    gates: dict[str, Gate]


@dataclass
class State:
    """A server over it."""

    registry: Registry
    engine: Engine
    app: App
    clock: Clock
    by: Key

    def close(self) -> None:
        self.engine.close()
        self.app.close()
        self.registry.close()


def net() -> nn.Module:
    """The base."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def _registry(folder: Path, model: nn.Module, clock: Clock) -> Registry:
    blobs = Blobs(folder / "blobs")
    url = f"sqlite:///{folder}/registry.db"
    return Registry(url, blobs, base_hash=base_hash(model), clock=clock)


class _Maker:
    """Writes the past, in its order, on a clock of its own."""

    def __init__(self, folder: Path) -> None:
        self.model, self.clock = net(), Clock(NOW - 9 * DAY)
        self.registry = _registry(folder, self.model, self.clock)
        self.registry.first_admin_key(ADMIN)
        self.by = self.registry.authenticate(ADMIN)
        self.deltas: dict[str, list[str]] = {}
        self.gates: dict[str, Gate] = {}
        self.asked = 0
        self.draw = random.generator(0, "tests.state")

    def chance(self, p: float) -> int:
        return int(torch.rand((), generator=self.draw) < p)

    def at(self, days_ago: float) -> _Maker:
        self.clock.at_s = NOW - days_ago * DAY
        return self

    def tenant(self, name: str, deltas: int) -> None:
        self.registry.create_tenant(name, by=self.by, max_deltas=200)
        self.registry.create_key(name, {"infer", "manage"}, by=self.by)
        self.registry.create_key(name, {"infer"}, by=self.by)
        self.deltas[name] = []
        for number in range(deltas):
            self.clock.at_s += 2 * HOUR
            parent = self.deltas[name][-1] if number % 3 == 2 else ""
            delta = self.delta(f"{name}.{number}", number)
            record = self.registry.put_delta(name, delta, by=self.by, parent=parent)
            self.deltas[name].append(record.hash)

    def delta(self, name: str, number: int) -> Delta:
        made = peft.ia3(self.model, sites=["0"]) if number % 5 == 4 else peft.lora(self.model, 2)
        own = random.generator(0, f"tests.state.{name}")
        for tensor in made.parameters():
            tensor.data.copy_(torch.randn(tensor.shape, generator=own))
        return made.snapshot()

    def feedback(
        self, tenant: str, alias: str, days_ago: float, accuracy: float, arm: str = ""
    ) -> None:
        """An answer to a request of some rows, and what became of each."""
        self.at(days_ago)
        now = self.registry.alias(tenant, alias)
        self.asked += 1
        id = f"{tenant}-{self.asked}"
        body: dict[str, Any] = {"request": id, "alias": alias, "generation": now.generation}
        body["delta"] = now.delta
        if arm:
            running = self.registry.rollouts.experiments.get(tenant, alias)
            body |= {"experiment": running.id, "arm": arm}
            body["delta"] = running.candidate if arm == "candidate" else running.incumbent
        answer = self.registry.audit.append("request", tenant, body)
        correct = tuple(bool(self.chance(accuracy)) for _ in range(ROWS))
        said = Said(request=id, correct=correct, slices={"lang": "de" if self.asked % 3 else "en"})
        self.registry.rollouts.journal.add(tenant, said, said.outcomes(), answer, by=self.by)
        self.registry.learning.rounds.look(tenant, alias)

    def gate(
        self,
        name: str,
        candidate: str,
        right: dict[str, tuple[float, float]],
        *,
        n: int = 300,
        watch: Watch | None = None,
    ) -> Gate:
        """Held-out shots of acme/intent: slice -> how often each arm is right."""
        gates, owner, alias = self.registry.rollouts.gates, "acme", "intent"
        now, look = gates.prepare(owner, alias, candidate, by=self.by)
        examples = []
        for at in range(n):
            value = list(right)[at % len(right)]
            shared = torch.rand((), generator=self.draw).item()
            arms = [int(0.7 * shared + 0.3 * self.chance(p) < p * 0.98) for p in right[value]]
            examples.append([f"{value}-{at:03d}", {"lang": value}, *arms])
        policy = Policy(min_n=100, slices=("lang",), slice_min_n=20)
        evidence = {
            "version": 1,
            "tenant": owner,
            "alias": alias,
            "generation": now.generation,
            "incumbent": now.delta,
            "candidate": candidate,
            "experiment": "",
            "policy": policy.json(),
            "look": look,
            "paired": True,
            "examples": examples,
        }
        self.gates[name] = gates.record(evidence, watch=watch, by=self.by)
        return self.gates[name]

    def learn(self, days_ago: float, candidate: str, right: dict[str, tuple[float, float]]) -> None:
        """A round of acme/intent's learning, as the log has one."""
        rounds = self.at(days_ago).registry.learning.rounds
        task = rounds.begin("acme", "intent", "asked")
        assert task is not None
        loss = {"first_loss": 1.31, "last_loss": 0.42}
        fit = {"delta": candidate, "rows": 128, "rehearsal": {"rows": 128}, "ms": 21_400.0} | loss
        rounds.fitted(task, fit)
        gate = self.gate("learned", candidate, right)
        rounds.finish(
            task,
            "learn.gate",
            {
                "candidate": candidate,
                "gate": gate.id,
                "passed": gate.passed,
                "overall": gate.decision["overall"],
                "reasons": list(gate.decision["reasons"]),
                "generation": None,
            },
            (21_400.0, 310.0),
        )

    def point(self, tenant: str, alias: str, number: int, reason: str) -> None:
        found = self.registry.view().aliases.get((tenant, alias))
        self.registry.set_alias(
            tenant,
            alias,
            self.deltas[tenant][number],
            generation=found.generation if found else 0,
            reason=reason,
            by=self.by,
        )

    def shadows(self, tenant: str, alias: str) -> None:
        running = self.registry.rollouts.experiments.get(tenant, alias)
        body = {"experiment": running.id, "alias": alias, "rows": ROWS, "differ": {}}
        noted = [body | {"request": f"s{i}", "agree": ROWS - (i % 4 == 0)} for i in range(120)]
        self.registry.audit.extend([("shadow", tenant, b) for b in noted])


def build(folder: Path) -> Past:
    """Write the whole of it into a folder that is empty."""
    made = _Maker(folder)
    made.at(9).tenant("acme", 12)
    made.at(8).tenant("globex", 6)
    made.at(7.4).tenant("initech", 2)
    acme = made.deltas["acme"]
    made.at(6.9).point("acme", "intent", 0, "first version, 400 shots")
    made.at(6.7).point("acme", "toxicity", 1, "imported from the old service")
    made.at(6.2).point("acme", "intent", 2, "more Dutch")
    made.at(6.1).registry.rollback("acme", "intent", by=made.by)
    made.at(6.05).point("globex", "triage", 1, "")
    for step in range(36):
        made.feedback("acme", "intent", 6.0 - step / 22, 0.88)
        if step == 22:
            lost = {"en": (0.8, 0.88), "de": (0.85, 0.55), "fr": (0.8, 0.9)}
            made.gate("refused", acme[4], lost)
    better = {"en": (0.75, 0.9), "de": (0.7, 0.85), "fr": (0.75, 0.93)}
    made.at(4.2)
    promoted = made.gate("promoted", acme[5], better, watch=Watch(min_n=200, margin=0.05))
    made.at(4.19).registry.rollouts.gates.promote(promoted, by=made.by)
    policy = LearningPolicy(
        tenant="acme", alias="intent", on="both", every_s=6 * HOUR, promote=False
    )
    made.registry.learning.set(policy, by=made.by)
    made.registry.learning.budgets.set("acme", ms=60_000.0, joules=900.0, window_s=DAY, by=made.by)
    for step in range(120):
        ago = 4.1 - step / 36
        made.feedback("acme", "intent", ago, 0.95 if ago > 2 else 0.74)
        if step % 5 == 0:
            made.feedback("globex", "triage", ago, 0.9)
    made.at(0.85)
    made.registry.rollouts.experiments.start(
        "acme", "intent", acme[9], share=0.1, mode="split", by=made.by
    )
    for step in range(48):
        ago = 0.7 - step / 72
        if step == 20:
            made.learn(ago, acme[6], {"en": (0.8, 0.85), "de": (0.75, 0.6), "fr": (0.8, 0.8)})
        made.feedback("acme", "intent", ago, 0.74, "incumbent")
        if step % 3 == 0:
            made.feedback("acme", "intent", ago, 0.93, "candidate")
    made.at(0.3)
    made.registry.rollouts.experiments.start(
        "globex", "triage", made.deltas["globex"][3], share=1.0, mode="shadow", by=made.by
    )
    made.shadows("globex", "triage")
    made.at(0.05).gate("passed", acme[9], better)
    made.at(0.01).registry.sessions.start("acme", acme[3], ttl_s=3600.0, by=made.by)
    made.registry.close()
    return Past(folder, made.deltas, made.gates)


def opened(past: Past, folder: Path | None = None, *, busy: bool = False) -> State:
    """A server over the past.

    Args:
        past: Is changed, unless a folder is given.
        folder: To copy it to first.
        busy: Whether there was an hour of traffic.
    """
    if folder is not None:
        shutil.copytree(past.folder, folder, dirs_exist_ok=True)
    model, clock = net(), Clock(NOW)
    registry = _registry(folder or past.folder, model, clock)
    engine = Engine(model, registry.load, slots=16)
    app, ticks = make_app(registry, engine), Clock(0.0)
    dashboard = add_dashboard(app, registry, engine, clock=clock, ticks=ticks)
    if busy:
        _traffic(app, dashboard, ticks)
    return State(registry, engine, app, clock, registry.authenticate(ADMIN))


def _traffic(app: App, dashboard: Dashboard, ticks: Clock) -> None:
    draw = random.generator(0, "tests.state.traffic")
    for step in range(360):
        ticks.at_s += 10.0
        wave = 1 + 0.4 * math.sin(step / 40) + 0.3 * math.sin(step / 11)
        for tenant, rate in (("acme", 12.0), ("globex", 4.0)):
            for _ in range(
                round(rate * wave * (0.7 + 0.6 * torch.rand((), generator=draw).item()))
            ):
                slow = 4.0 if step in range(200, 212) else 1.0
                took = 0.0035 * slow * math.exp(0.5 * torch.randn((), generator=draw).item())
                failed = slow > 1 and bool(torch.rand((), generator=draw) < 0.02)
                app.meters.done("infer", tenant, 500 if failed else 200, took)
        dashboard.sample()


def main(folder: str, port: str = "8080") -> None:
    """Serve it until it is interrupted."""
    Path(folder).mkdir(parents=True)
    state = opened(build(Path(folder)), busy=True)
    print(f"http://127.0.0.1:{port}, the admin key is {ADMIN}", flush=True)
    try:
        Server(state.app, port=int(port), drain_s=1).run()
    finally:
        state.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A registry with traffic in it, and a learner that looks when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from tessera import peft, random
from tessera.arch import base_hash
from tessera.serve.blobs import Blobs
from tessera.serve.engine import Engine
from tessera.serve.feedback import Said
from tessera.serve.fitting import Fitter, FitterSettings
from tessera.serve.fitting_values import FitSettings
from tessera.serve.gates import Policy
from tessera.serve.learning_going import Means
from tessera.serve.learning_values import LearningPolicy
from tessera.serve.learning_watcher import Learner
from tessera.serve.records import SYSTEM
from tessera.serve.registry import Registry
from tessera.serve.rollout_desk import Desk

ROWS = 16
ROUND_MS = 30_000.0


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).eval()


def policy(**more: object) -> LearningPolicy:
    """One that is through in a second."""
    wanted: dict[str, object] = {
        "on": "drift",
        "min_new": 128,
        "replay": 0,
        "fit": FitSettings(r=2, steps=40, lr=0.05, head="2", budget={"ms": ROUND_MS}),
        "gate": Policy(min_n=16),
        **more,
    }
    return LearningPolicy(alias="clf", tenant="acme", **wanted)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Place:
    """One process: a registry, an engine, a fitter and a learner, none of them running by itself.

    The world has a rule, which the base knows; once it has drifted each class is the next one.
    """

    def __init__(self, url: str, folder: Path, *, clock: Clock | None = None, **means: object):
        self.model, self.blobs = net(), Blobs(folder / "blobs")
        self.clock = clock or Clock()
        self.registry = Registry(url, self.blobs, base_hash=base_hash(self.model), clock=self.clock)
        if not self.registry.tenants():
            self.registry.create_tenant("acme", by=SYSTEM)
            self.registry.set_alias("acme", "clf", "", generation=0, by=SYSTEM)
        self.learning = self.registry.learning
        self.engine = Engine(self.model, self.registry.load, deadline_ms=0.0)
        self.fitter = Fitter(self.model, self.registry, FitterSettings())
        given: dict[str, object] = {
            "registry": self.registry,
            "blobs": self.blobs,
            "fitter": self.fitter,
            "desk": Desk(self.registry.rollouts, self.engine, None),
            "keep": "inputs",
            "padding": {},
            **means,
        }
        self.learner = Learner(Means(**given))
        self.asked = 0

    def close(self) -> None:
        self.learner.close()
        self.fitter.close()
        self.engine.close()
        self.registry.close()

    def rule(self, x: Tensor, drifted: bool) -> Tensor:
        with torch.no_grad():
            found = self.model(x).argmax(1)
        return (found + 1) % 3 if drifted else found

    def traffic(
        self, requests: int, *, drifted: bool = False, slices: Mapping[str, str] | None = None
    ) -> None:
        """Requests of 16 rows, answered by what the alias points to, and their labels."""
        alias = self.registry.alias("acme", "clf")
        delta = self.registry.load(alias.delta) if alias.delta else None
        model = self.model if delta is None else peft.apply(self.model, delta)
        for _ in range(requests):
            self.asked += 1
            draw = random.generator(0, "tests.learning", self.asked)
            x = torch.randn(ROWS, 6, generator=draw)
            y = self.rule(x, drifted)
            with torch.no_grad():
                right = model(x).argmax(1) == y
            self.answered(f"r-{self.asked}", {"input": x}, alias.generation, alias.delta)
            self.labelled(f"r-{self.asked}", y.tolist(), right.tolist(), slices or {})

    def answered(
        self, request: str, inputs: Mapping[str, Tensor], generation: int, delta: str = ""
    ) -> None:
        blob = self.blobs.put(save({f"0.{n}": x.contiguous() for n, x in inputs.items()}))
        body = {"request": request, "alias": "clf", "generation": generation, "delta": delta}
        self.registry.audit.append("request", "acme", {**body, "blob": blob, "at": 0})

    def labelled(
        self, request: str, labels: list[int], right: list[bool], slices: Mapping[str, str]
    ) -> None:
        said = Said.parse({"request": request, "label": labels, "slices": dict(slices)})
        journal = self.registry.rollouts.journal
        answer = journal.answer("acme", request)
        assert answer is not None
        outcomes = "".join("01"[r] for r in right)
        journal.add("acme", said, outcomes, answer, by=SYSTEM)

    def steps(self) -> list[str]:
        return [s.kind.removeprefix("learn.") for s in self.learning.steps("acme", "clf")]

    def told(self) -> str:
        return self.learning.steps("acme", "clf")[-1].text

    def alias(self) -> tuple[int, str]:
        found = self.registry.alias("acme", "clf")
        return found.generation, found.delta


def together(*acts: object) -> list[BaseException]:
    """Do things at the same time; what they raised."""
    gate, raised = threading.Barrier(len(acts)), list[BaseException]()

    def run(act: object) -> None:
        gate.wait(10)
        try:
            act()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=[act]) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised

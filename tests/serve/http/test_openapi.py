"""Whatever the OpenAPI description lets one ask: never an error of the server's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from torch import nn

from tessera import peft
from tessera.serve.consistency import differences
from tessera.serve.database import Database
from tessera.serve.fitting_run import FitterSettings
from tessera.serve.service import Service, ServiceSettings

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed: pip install schemathesis"
)

KINDS = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
EXAMPLES = {True: 10, False: 3}  # with a body, without one


@dataclass
class Whole:
    """A whole service with something of everything, and the keys of those who ask."""

    service: Service
    secrets: dict[str, str]
    known: dict[str, str]  # parameter of a path -> what there is
    bodies: dict[str, dict[str, Any]]  # the end of a path -> a body that is taken there
    url: str


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Whole]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    url = f"sqlite:///{tmp_path}/registry.db"
    where = ServiceSettings(
        db=url, blobs=f"{tmp_path}/blobs", fits=FitterSettings(steps=50, ms=5000.0)
    )
    with Service(model, where) as service:
        registry, secrets = service.registry, {"admin": service.admin_key or ""}
        by = registry.authenticate(secrets["admin"])
        registry.create_tenant("acme", by=by)
        secrets["acme"] = registry.create_key("acme", {"infer", "manage"}, by=by)[1]
        secrets["reader"] = registry.create_key("acme", {"infer"}, by=by)[1]
        hashes = []
        for seed in range(2):
            delta = peft.lora(model, 2, seed=seed)
            delta.parameters()[0].data.add_(0.1)
            hashes.append(registry.put_delta("acme", delta.snapshot(), by=by).hash)
        registry.set_alias("acme", "m", hashes[0], generation=0, by=by)
        registry.rollouts.experiments.start("acme", "m", hashes[1], share=0.5, by=by)
        answer = service.engine.submit({"input": torch.ones(1, 6)}, hashes[0], tenant="acme")
        service.recorder.request(
            "r-1",
            tenant="acme",
            alias="m",
            generation=1,
            answer=answer.result(),
            inputs={"input": torch.ones(1, 6)},
        )
        session = registry.sessions.start("acme", hashes[0], ttl_s=3600, by=by)
        known = {"id": session.id, "tenant": "acme", "hash": hashes[0], "name": "m"}
        yield Whole(service, secrets, known, bodies(hashes), url)


def bodies(hashes: list[str]) -> dict[str, dict[str, Any]]:
    shots = {"name": "input", "shape": [2, 6], "datatype": "FP32", "data": [0.5] * 6 + [-0.5] * 6}
    fit = {"inputs": [shots], "labels": [0, 2], "steps": 2}
    return {
        ":fit": fit,
        "/sessions": fit | {"ttl_s": 60},
        "/experiment": {"candidate": hashes[1], "share": 0.5},
        "/feedback": {"request": "r-1", "label": 1},
        ":gate": {
            "candidate": hashes[1],
            "policy": {"min_n": 1, "slices": ["lang"]},
            "shots": {"inputs": [shots], "labels": [0, 2], "slices": {"lang": ["de", "en"]}},
            "promote": True,
            "watch": {"min_n": 1},
        },
        "/learning": {"fit": {"r": 1}, "min_new": 2, "watch": {"min_n": 5}},
        "/budget": {"ms": 100.0, "joules": 5.0},
    }


def ask(whole: Whole, operation: Any, seen: set[tuple[str, int]]) -> None:
    """Ask one operation all that is described, and some that is not."""

    good = next((b for end, b in whole.bodies.items() if operation.path.endswith(end)), None)

    def one(case: Any, who: str, known: bool, at: int) -> None:
        for name in (case.path_parameters or {}).keys() & whole.known.keys() if known else ():
            case.path_parameters[name] = whole.known[name]
        if known and good is not None and isinstance(case.body, dict):
            # One field as it was drawn, so that the others let it come far.
            odd = sorted(case.body)[at % len(case.body) :][:1] if case.body else []
            case.body = good | {name: case.body[name] for name in odd}
        response = case.call(headers={"Authorization": f"Bearer {whole.secrets[who]}"})
        seen.add((operation.path, response.status_code))
        assert response.status_code < 500, response.text
        if response.status_code >= 400 and case.method != "HEAD":
            assert response.json().keys() == {"error", "type"}

    if good is not None and operation.body:
        case = operation.Case(path_parameters=dict(whole.known), body=good)
        said = case.call(headers={"Authorization": f"Bearer {whole.secrets['admin']}"})
        assert said.status_code in (200, 201), said.text
    for kind in KINDS:
        made = given(
            operation.as_strategy(generation_mode=kind),
            st.sampled_from(["admin", "acme", "reader"]),
            st.booleans(),
            st.integers(0, 100),
        )(one)
        # Without a body there is nothing malformed to send: any text is a path.
        bare = kind is KINDS[1] and not operation.body
        with suppress(Unsatisfiable) if bare else nullcontext():
            settings(
                max_examples=EXAMPLES[bool(operation.body)], suppress_health_check=list(HealthCheck)
            )(made)()


@pytest.mark.slow
def test_no_request_that_is_described_makes_the_server_fail(whole, start):
    schema = schemathesis.openapi.from_url(f"http://{start(whole.service.app)}/v1/openapi.json")
    seen: set[tuple[str, int]] = set()
    operations = [result.ok() for result in schema.get_all_operations()]
    for part in ("deltas:fit", "sessions", "experiment", "feedback", "gates", "learning"):
        assert any(part in operation.path for operation in operations), part
    for operation in sorted(operations, key=lambda o: o.method == "delete"):
        ask(whole, operation, seen)
    assert {status for _, status in seen} >= {200, 201, 400, 403, 404}
    assert whole.service.registry.audit.verify() > 0
    database = Database(whole.url)
    assert list(differences(database)) == []
    database.close()

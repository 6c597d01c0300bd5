"""What /metrics counts, and that the guide's table is about metrics that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient
from torch import nn

from tessera.serve.meters import Meters
from tessera.serve.records import Event
from tessera.serve.service import Service, ServiceSettings

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "deploy.md"
ADMIN = "an-admin-key-for-the-tests-only"


@pytest.fixture
def service(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_ADMIN_KEY", ADMIN)
    torch.manual_seed(0)
    where = ServiceSettings(db=f"sqlite:///{tmp_path}/registry.db", blobs=f"{tmp_path}/blobs")
    with Service(nn.Linear(3, 2), where) as found:
        yield found


def values(page: str) -> dict[str, float]:
    """Name with labels -> value."""
    lines = [line for line in page.splitlines() if line and line[0] != "#"]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_what_tenants_do_is_counted_by_tenant_and_the_table_is_of_metrics_that_there_are(service):
    web = TestClient(service.app, headers={"Authorization": f"Bearer {ADMIN}"})
    assert web.post("/v1/tenants", json={"name": "acme"}).status_code == 201
    shots = [{"name": "input", "shape": [2, 3], "datatype": "FP32", "data": [1, 0, 0, 0, 1, 0]}]
    asked = {"inputs": shots, "labels": [0, 1], "steps": 3, "r": 1}
    fitted = web.post("/v1/tenants/acme/deltas:fit", json=asked)
    assert fitted.status_code == 201, fitted.text
    alias = "/v1/tenants/acme/aliases/m"
    for generation, delta in enumerate(("", fitted.json()["hash"])):
        said = {"delta": delta, "generation": generation}
        assert web.put(alias, json=said).status_code == 200
    assert web.post(f"{alias}:rollback").status_code == 200
    with service.fitter.place("acme"):
        refused = web.post("/v1/tenants/acme/deltas:fit", json=asked)
    assert refused.status_code == 429
    asked_m = {"inputs": [{**shots[0], "shape": [2, 3]}]}
    headers = {"X-Tessera-Tenant": "acme"}
    assert web.post("/v2/models/m/infer", json=asked_m, headers=headers).status_code == 200
    assert service.recorder.flush()

    page = web.get("/metrics").text
    found = values(page)
    events = {
        re.search('kind="([^"]+)"', name)[1]: count
        for name, count in found.items()
        if name.startswith("tessera_events_total") and 'tenant="acme"' in name
    }
    assert events == {
        "tenant.created": 1,
        "delta.put": 1,
        "delta.fit": 1,
        "alias.set": 2,
        "alias.rolled_back": 1,
    }
    assert found['tessera_fit_seconds_total{tenant="acme"}'] == pytest.approx(
        fitted.json()["spent"]["ms"] / 1e3, abs=1e-6
    )
    for status, count in (("201", 1), ("429", 1)):
        name = f'tessera_requests_total{{route="fit",status="{status}",tenant="acme"}}'
        assert found[name] == count

    table = re.findall(r"^\| `(tessera_\w+)(?:\{([\w,]+)\})?` \|", GUIDE.read_text(), re.M)
    assert len(table) >= 8
    for name, labels in table:
        shown = [key for key in found if re.split("[{]", key)[0] == name]
        assert shown, f"{name} is in the guide, and not on the page"
        assert set(re.findall(r'(\w+)="', shown[0])) == set(filter(None, labels.split(",")))
    own = {re.split("[{]", name)[0] for name in found if name.startswith("tessera_")}
    bare = {re.sub("_(bucket|sum|count|created|total)$", "", name) for name in own}
    assert bare == {re.sub("_(bucket|total)$", "", name) for name, _ in table}


def test_a_tenant_that_only_a_path_names_has_no_label(service):
    web = TestClient(service.app)
    for number in range(3):
        web.get(f"/v1/tenants/nobody-{number}/deltas")
        web.get(f"/tenants/nobody-{number}")
        web.post(f"/v1/tenants/nobody-{number}/deltas:fit", content=b"{")
    assert "nobody" not in service.app.meters.page().decode()


def test_tenants_beyond_the_first_share_a_label_in_events_too():
    meters = Meters(1)
    for seq, (tenant, kind) in enumerate(
        [("acme", "alias.set"), ("globex", "alias.set"), ("initech", "alias.set"), ("", "x.y")]
    ):
        body = {"ms": 5.0}
        meters.event(
            Event(seq=seq, previous="", hash="", time_s=0.0, kind=kind, tenant=tenant, body=body)
        )
    found = values(meters.page().decode())
    counts = {name: n for name, n in found.items() if name.startswith("tessera_events_total")}
    assert counts == {
        'tessera_events_total{kind="alias.set",tenant="acme"}': 1,
        'tessera_events_total{kind="alias.set",tenant="_other"}': 2,
        'tessera_events_total{kind="x.y",tenant=""}': 1,
    }


def test_a_change_that_failed_is_not_counted(service):
    registry, before = service.registry, service.app.meters.page()
    told = []
    registry.audit.told = told.append

    def fail() -> None:
        with registry._ledger.write() as change:
            registry.audit.record(change, "alias.set", "acme", {})
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail()
    assert told == []
    assert b"alias.set" not in before

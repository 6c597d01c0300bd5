"""A full disk, a database that is away, a clock that jumps, names and shapes that are traps.

Each is an answer with a JSON error, nothing is lost, and the server goes on.
"""

from __future__ import annotations

import errno
import functools
import gzip
import time

import pytest
from starlette.testclient import TestClient

from tessera.errors import StorageError
from tessera.serve.blobs import pack

INFER = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}]}
CHANGES = [
    ("POST", "/v1/tenants", {"name": "new"}, "admin"),
    ("POST", "/v1/keys", {"scopes": ["admin"]}, "admin"),
    ("POST", "/v1/tenants/acme/keys", {"scopes": ["infer"]}, "acme"),
    ("PUT", "/v1/tenants/acme/aliases/other", {"delta": "", "generation": 0}, "acme"),
    ("GET", "/v1/tenants/acme/deltas", None, "acme"),
    ("GET", "/v1/tenants/acme/aliases/m/history", None, "acme"),
]


@pytest.fixture
def web(house):
    # As the real engine does, it keeps what it has read.
    house.engine.load = functools.cache(house.registry.load)
    found = TestClient(house.app())
    infers(found, house)
    house.engine.asked.clear()
    return found


def infers(web, house) -> None:
    answer = web.post("/v2/models/m/infer", json=INFER, headers=house.headers("acme"))
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"][0]["data"] == [2.0, 4.0]


def is_problem(answer, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "type"}
    assert answer.headers["x-request-id"]
    return answer.json()["error"]


@pytest.mark.parametrize(("method", "path", "body", "who"), CHANGES)
def test_while_the_database_is_away_changes_are_503_and_answers_go_on(
    house, web, monkeypatch, method, path, body, who
):
    revision = house.registry.view().revision

    def away(*_):
        raise StorageError("the registry postgresql://db.internal/x could not be reached")

    with monkeypatch.context() as gone:
        gone.setattr(type(house.registry._ledger.database), "_open", away)
        answer = web.request(method, path, json=body, headers=house.headers(who))
        assert "db.internal" not in is_problem(answer, 503)
        assert answer.headers["retry-after"] == "5"
        infers(web, house)
    assert house.registry.view().revision == revision
    assert web.request(method, path, json=body, headers=house.headers(who)).is_success


def test_a_full_disk_refuses_a_delta_and_keeps_nothing_of_it(house, web, monkeypatch):
    delta, before = house.times(5), house.registry.deltas("acme")
    files = [("files", ("delta.safetensors", pack(delta)))]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("os.fsync", full)
        answer = web.post("/v1/tenants/acme/deltas", files=files, headers=house.headers("acme"))
        assert "blobs" not in is_problem(answer, 503)
        infers(web, house)
    assert [d.hash for d in house.registry.deltas("acme")] == [d.hash for d in before]
    answer = web.post("/v1/tenants/acme/deltas", files=files, headers=house.headers("acme"))
    assert answer.json()["hash"] == delta.hash
    assert house.registry.load(delta.hash, tenant="acme").hash == delta.hash


@pytest.mark.parametrize("jump", [-1e9, -3600.0, 3600.0, 1e9])
def test_a_clock_that_jumps_ends_no_request_and_no_key(house, web, monkeypatch, jump):
    real = time.time
    infers(web, house)
    monkeypatch.setattr("time.time", lambda: real() + jump)
    infers(web, house)
    body = {"delta": "", "generation": 0}
    made = web.put("/v1/tenants/acme/aliases/o", json=body, headers=house.headers("acme"))
    assert made.json()["generation"] == 1
    monkeypatch.setattr("time.time", real)
    infers(web, house)
    assert house.registry.audit.verify() > 0  # its order is by number


@pytest.mark.parametrize(
    "path",
    [
        "/v1/tenants/acme/aliases/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/tenants/acme/deltas/..%2f..%2fr.db",
        "/v1/tenants/%2e%2e/deltas",
        "/static/..%2f..%2fapp.py",
        "/v2/models/..%2f..%2fm",
    ],
)
def test_a_name_that_climbs_leads_nowhere(house, web, path):
    for who in ("admin", "acme"):
        answer = web.get(path, headers=house.headers(who))
        assert answer.status_code in (400, 404)
        assert "error" in answer.json()


def test_an_alias_for_a_delta_that_nobody_or_another_holds(house, web):
    (other,) = house.registry.deltas("globex")
    for hash in ("f" * 64, other.hash):
        body = {"delta": hash, "generation": 1}
        answer = web.put("/v1/tenants/acme/aliases/m", json=body, headers=house.headers("acme"))
        assert hash in is_problem(answer, 404)
    infers(web, house)


@pytest.mark.parametrize(
    "shape", [[1 << 40], [1 << 31, 1 << 31], [1 << 20] * 8, [0, 1 << 62], [-1], [1] * 9]
)
def test_a_shape_bomb_is_refused_before_it_is_built(house, web, shape):
    one = {"name": "x", "shape": shape, "datatype": "FP32", "data": [1.0]}
    answer = web.post("/v2/models/m/infer", json={"inputs": [one]}, headers=house.headers("acme"))
    is_problem(answer, 400)
    assert not house.engine.asked


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("POST", "/v2/models/m/infer", "application/json"),
        ("PUT", "/v1/tenants/acme/aliases/m", "application/json"),
        ("POST", "/v1/tenants/acme/deltas", "multipart/form-data; boundary=x"),
    ],
)
def test_a_decompression_bomb_is_not_unpacked(house, web, method, path, kind):
    bomb = gzip.compress(b" " * (16 << 20))
    headers = {**house.headers("acme"), "Content-Encoding": "gzip", "Content-Type": kind}
    said = is_problem(web.request(method, path, content=bomb, headers=headers), 415)
    assert "compressed" in said
    infers(web, house)

"""The application over a real server: what it answers, to whom, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tessera.errors import BusyError, CheckpointError, DeltaError, MissingDataError
from tessera.serve.listen import Server
from tessera.serve.oip import encode_request
from tessera.serve.settings import AppSettings, Limits

INFER = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}


@pytest.fixture
def web(house, start) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{start(house.app())}") as client:
        yield client


def error(response: httpx.Response, status: int, message: str = "") -> dict:
    """What an error's body says, after a look at its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    said = response.json()
    assert said.keys() == {"error", "type"}
    assert re.search(message, said["error"]), said
    return said


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- what anybody may ask --------------------------------------------------------------------


def test_health_and_metadata_need_no_key_and_models_do(web):
    assert web.get("/v2/health/live").json() == {"live": True}
    assert web.get("/v2/health/ready").json() == {"ready": True}
    assert web.head("/v2/health/ready").status_code == 200
    assert web.get("/v2").json()["name"] == "tessera"
    said = error(web.get("/v2/models/m"), 401, "needs a key")
    assert said["type"] == "AccessError"
    assert web.get("/v2/models/m").headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v2/nothing", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v2/health/live", 405),
        ("PUT", "/v1/tenants", 405),
        ("GET", "/v2/models/m/infer", 405),
    ],
)
def test_what_is_not_there_is_said_as_json(web, house, method, path, status):
    response = web.request(method, path, headers=house.headers("acme"))
    error(response, status)
    assert ("allow" in response.headers) == (status == 405)


def test_the_request_id_is_the_clients_if_it_is_a_plain_word(web):
    def back(given: str) -> str:
        return web.get("/v2/health/live", headers={"X-Request-Id": given}).headers["x-request-id"]

    assert back("r-17.a:b_c") == "r-17.a:b_c"
    for odd in ("two words", "<script>", "x" * 129, "\xe9", ""):
        assert re.fullmatch("[0-9a-f]{32}", back(odd.encode("latin-1")))
    assert web.get("/v1/nothing", headers={"X-Request-Id": "r-1"}).headers["x-request-id"] == "r-1"


# --- inference -------------------------------------------------------------------------------


def test_infer_in_json(web, house):
    response = web.post("/v2/models/m/infer", json=INFER, headers=house.headers("acme"))
    assert response.json() == {
        "model_name": "m",
        "model_version": "1",
        "outputs": [{"name": "x_times", "datatype": "FP32", "shape": [1, 2], "data": [2, 4]}],
    }
    assert response.headers["x-tessera-delta"] == house.times(2).hash


def test_the_version_is_the_generation(web, house):
    acme = house.headers("acme")
    assert web.post("/v2/models/m/versions/1/infer", json=INFER, headers=acme).is_success
    said = web.post("/v2/models/m/versions/2/infer", json=INFER, headers=acme)
    error(said, 404, "'m' is served at version 1, not '2'")


def test_a_swap_is_seen_by_the_next_request_and_not_by_one_under_way(web, house):
    acme = house.headers("acme")
    admin = house.registry.authenticate(house.secrets["admin"])
    house.engine.held = True
    with httpx.Client(base_url=web.base_url) as other:
        began = asyncio.new_event_loop()
        try:
            under_way = began.run_in_executor(
                None, lambda: other.post("/v2/models/m/infer", json=INFER, headers=acme)
            )
            until(lambda: house.engine.waiting)
            record = house.registry.put_delta("acme", house.times(5), by=admin)
            house.registry.set_alias("acme", "m", record.hash, generation=1, by=admin)
            house.engine.release()
            old = began.run_until_complete(under_way).json()
        finally:
            began.close()
    new = web.post("/v2/models/m/infer", json=INFER, headers=acme).json()
    assert (old["model_version"], old["outputs"][0]["data"]) == ("1", [2, 4])
    assert (new["model_version"], new["outputs"][0]["data"]) == ("2", [5, 10])


def test_a_large_request_is_read_aside(web, house):
    values = list(range(50_000))
    said = {"inputs": [{"name": "x", "shape": [50_000], "datatype": "INT64", "data": values}]}
    response = web.post("/v2/models/m/infer", json=said, headers=house.headers("acme"))
    assert response.json()["outputs"][0]["data"][-1] == 99_998


def test_a_large_answer_comes_whole(web, house):
    x = torch.arange(400_000, dtype=torch.float32)
    head = {
        "inputs": [
            {
                "name": "x",
                "shape": [1, 400_000],
                "datatype": "FP32",
                "parameters": {"binary_data_size": 1_600_000},
            }
        ],
        "parameters": {"binary_data_output": True},
    }
    words = json.dumps(head).encode()
    response = web.post(
        "/v2/models/m/infer",
        content=words + x.numpy().tobytes(),
        headers={**house.headers("acme"), "Inference-Header-Content-Length": str(len(words))},
    )
    length = int(response.headers["inference-header-content-length"])
    assert response.content[length:] == (2 * x).numpy().tobytes()


@pytest.mark.parametrize(
    ("raised", "status", "kind"),
    [
        (BusyError("the queue is full", retry_after_s=2.5), 429, "BusyError"),
        (DeltaError("it does not fit"), 400, "DeltaError"),
        (CheckpointError("the blob is damaged"), 503, "CheckpointError"),
        (MissingDataError("the blob is gone"), 503, "MissingDataError"),
    ],
)
def test_what_the_engine_raises(web, house, caplog, raised, status, kind):
    def fail() -> None:
        raise raised

    house.engine.before = fail
    response = web.post("/v2/models/m/infer", json=INFER, headers=house.headers("acme"))
    assert error(response, status)["type"] == kind
    assert response.headers.get("retry-after") == {429: "3", 503: "5"}.get(status)
    # What storage fails is the log's business: it names folders and hosts.
    assert (str(raised) in response.text) == (status != 503)
    assert (str(raised) in caplog.text) == (status == 503)


def test_of_a_fault_of_ours_the_client_learns_its_number_and_the_log_the_rest(web, house, caplog):
    def fail() -> None:
        raise RuntimeError("the secret of the house")

    house.engine.before = fail
    headers = {**house.headers("acme"), "X-Request-Id": "r-99"}
    said = error(web.post("/v2/models/m/infer", json=INFER, headers=headers), 500, "r-99")
    assert "secret" not in said["error"]
    assert "the secret of the house" in caplog.text
    assert "r-99" in caplog.text
    house.engine.before = lambda: None
    assert web.post("/v2/models/m/infer", json=INFER, headers=headers).is_success


def test_a_request_waits_no_longer_than_it_says(web, house):
    house.engine.held = True
    said = {**INFER, "parameters": {"timeout": 50_000}}  # microseconds
    acme = house.headers("acme")
    error(web.post("/v2/models/m/infer", json=said, headers=acme), 503, r"within 0\.05 s")
    assert house.engine.asked == [0.05]
    assert house.engine.waiting[0][0].cancelled()
    said["parameters"]["timeout"] = 0
    error(web.post("/v2/models/m/infer", json=said, headers=acme), 400, "in microseconds")


def test_nor_than_the_server_lets_it(house, start):
    house.engine.held = True
    url = start(house.app(AppSettings(infer_timeout_s=0.3, look_s=0.01)))
    said = {**INFER, "parameters": {"timeout": 10**9}}
    response = httpx.post(
        f"http://{url}/v2/models/m/infer", json=said, headers=house.headers("acme")
    )
    error(response, 503, r"within 0\.3 s")


def test_a_client_that_goes_takes_its_request_with_it(house, start):
    house.engine.held = True
    app = house.app(AppSettings(look_s=0.01))
    connection = connect(start(app))
    words = json.dumps(INFER).encode()
    connection.sendall(head("POST", "/v2/models/m/infer", house, len(words)) + words)
    until(lambda: house.engine.waiting)
    connection.close()
    until(lambda: house.engine.waiting[0][0].cancelled())
    until(lambda: app.under_way == 0)
    page = app.meters.page().decode()
    assert 'tessera_requests_total{route="infer",status="499",tenant="acme"} 1.0' in page


# --- who may what ----------------------------------------------------------------------------

ALIAS = {"delta": "", "generation": 0}


@pytest.mark.parametrize(
    ("method", "path", "body", "good"),
    [
        ("GET", "/v1/tenants/{t}/deltas", None, 200),
        ("GET", "/v1/tenants/{t}/deltas/{d}", None, 200),
        ("GET", "/v1/tenants/{t}/aliases", None, 200),
        ("GET", "/v1/tenants/{t}/aliases/m", None, 200),
        ("GET", "/v1/tenants/{t}/aliases/m/history", None, 200),
        ("GET", "/v1/tenants/{t}/keys", None, 200),
        ("PUT", "/v1/tenants/{t}/aliases/new", ALIAS, 200),
        ("POST", "/v1/tenants/{t}/aliases/m:rollback", None, 409),
        ("POST", "/v1/tenants/{t}/keys", {"scopes": ["infer"]}, 201),
        ("DELETE", "/v1/tenants/{t}/keys/nobody", None, 404),
        ("POST", "/v1/tenants/{t}/deltas", None, 415),
    ],
)
def test_a_tenants_things_are_its_own(web, house, method, path, body, good):
    path = path.format(t="acme", d=house.times(2).hash)
    seen = house.registry.audit.head()

    def ask(who: str | None) -> httpx.Response:
        headers = house.headers(who) if who else {}
        return web.request(method, path, json=body, headers=headers)

    error(ask(None), 401)
    error(ask("reader"), 403, "'manage'")
    theirs = error(ask("globex"), 404, "there is no tenant 'acme'")
    missing = web.request(
        method,
        path.replace("acme", "nobody"),
        json=body,
        headers=house.headers("globex"),
    )
    # Whether there is such a tenant cannot be told from the answer.
    assert error(missing, 404)["error"].replace("nobody", "acme") == theirs["error"]
    assert house.registry.audit.head() == seen
    assert ask("acme").status_code == good
    assert ask("admin").status_code in (good, 409)  # the alias is there by then


def test_only_an_admin_makes_tenants_and_sees_all(web, house):
    for who, status in (("acme", 403), ("reader", 403)):
        error(web.post("/v1/tenants", json={"name": "new"}, headers=house.headers(who)), status)
    admin = house.headers("admin")
    made = web.post("/v1/tenants", json={"name": "new"}, headers=admin)
    assert made.status_code == 201
    assert made.json()["name"] == "new"
    error(web.post("/v1/tenants", json={"name": "new"}, headers=admin), 409)
    for bad in ("../etc", "A", "", "-a", "x" * 64):
        error(web.post("/v1/tenants", json={"name": bad}, headers=admin), 400, "a tenant's name")
    seen = web.get("/v1/tenants", headers=admin).json()
    assert [t["name"] for t in seen] == ["acme", "globex", "new"]
    own = web.get("/v1/tenants", headers=house.headers("reader")).json()
    assert [t["name"] for t in own] == ["acme"]


def test_a_key_is_made_used_and_revoked(web, house):
    acme = house.headers("acme")
    error(web.post("/v1/tenants/acme/keys", json={"scopes": ["admin"]}, headers=acme), 403)
    error(web.post("/v1/tenants/acme/keys", json={"scopes": []}, headers=acme), 400)
    made = web.post("/v1/tenants/acme/keys", json={"scopes": ["infer"]}, headers=acme).json()
    fresh = {"X-API-Key": made["secret"]}
    assert made["key"]["scopes"] == ["infer"]
    assert web.get("/v1/key", headers=fresh).json() == made["key"]
    assert web.post("/v2/models/m/infer", json=INFER, headers=fresh).is_success
    listed = web.get("/v1/tenants/acme/keys", headers=acme)
    assert made["key"] in listed.json()
    assert made["secret"] not in listed.text
    path = f"/v1/tenants/{{}}/keys/{made['key']['id']}"
    globex = house.headers("globex")
    error(web.delete(path.format("globex"), headers=globex), 404)
    assert web.post("/v2/models/m/infer", json=INFER, headers=fresh).is_success
    assert web.delete(path.format("acme"), headers=acme).status_code == 204
    error(web.post("/v2/models/m/infer", json=INFER, headers=fresh), 401, "no longer in force")


def test_two_credentials_that_differ_are_none(web, house):
    both = {**house.headers("acme"), "X-API-Key": house.secrets["globex"]}
    error(web.get("/v1/key", headers=both), 401)
    error(web.get("/v1/key", headers={"Authorization": "Basic YTpi"}), 401, "Bearer")
    error(web.get("/v1/key", headers={"Authorization": "Bearer \xff".encode("latin-1")}), 401)


def test_an_alias_is_swapped_by_whoever_read_it_last(web, house):
    acme, path = house.headers("acme"), "/v1/tenants/acme/aliases/m"
    said = {"delta": "", "generation": 1, "reason": "back to the base"}
    done = web.put(path, json=said, headers=acme).json()
    assert (done["generation"], done["delta"]) == (2, "")
    error(web.put(path, json=said, headers=acme), 409, "at generation 2")
    error(web.put(path, json={**said, "delta": "f" * 64, "generation": 2}, headers=acme), 404)
    error(web.put(path, json={**said, "delta": "../x", "generation": 2}, headers=acme), 400)
    theirs = {"delta": house.times(3).hash, "generation": 2}
    error(web.put(path, json=theirs, headers=acme), 404)
    error(web.post(f"{path}:rollback", json={"generation": 1}, headers=acme), 409)
    back = web.post(f"{path}:rollback", headers=acme).json()
    assert (back["generation"], back["delta"]) == (3, house.times(2).hash)
    told = web.get(f"{path}/history", headers=acme).json()
    assert [a["delta"][:4] for a in told] == [house.times(2).hash[:4], "", house.times(2).hash[:4]]
    for bad in ({}, {"delta": ""}, {**said, "generation": "2"}, {**said, "x": 1}, [1], 3):
        error(web.put(path, json=bad, headers=acme), 400, "body")
    error(web.put(path, content=b"{", headers=acme), 400)


# --- what a body may be ----------------------------------------------------------------------


def head(method: str, path: str, house, length: int | None, more: str = "") -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    key = house.secrets["acme"]
    return (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n{size}\r\n"
        f"Content-Type: application/json\r\n{more}\r\n"
    ).encode()


def connect(address: str) -> socket.socket:
    name, _, port = address.partition(":")
    return socket.create_connection((name, int(port)), timeout=20)


def answer(connection: socket.socket) -> bytes:
    """All until the server closes, or resets the connection."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            said += piece
    return said


SMALL = AppSettings(
    limits=Limits(body_bytes=1000, json_bytes=900),
    management_bytes=1000,
    upload_bytes=3000,
    body_timeout_s=0.3,
)


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v2/models/m/infer"), ("PUT", "/v1/tenants/acme/aliases/m")],
)
def test_a_body_that_is_too_large_too_slow_or_compressed(house, start, method, path):
    address = start(house.app(SMALL))
    for length, sent, more, status in (
        (5000, b"x" * 5000, "", b"413"),
        (10**30, b"", "", b"4"),  # what no body can have
        (None, b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n", "", b"413"),
        (10, b"x" * 10, "Content-Encoding: gzip\r\n", b"415"),
        (100, b"x" * 10, "", b"408"),
    ):
        with connect(address) as connection:
            connection.sendall(head(method, path, house, length, more) + sent)
            assert connection.recv(65536).startswith(b"HTTP/1.1 " + status)
    good = httpx.get(f"http://{address}/v2/models/m", headers=house.headers("acme"))
    assert good.status_code == 200


def test_an_upload_that_is_too_large(house, start):
    url = f"http://{start(house.app(SMALL))}/v1/tenants/acme/deltas"
    files = [("files", ("a.safetensors", b"x" * 5000))]
    error(httpx.post(url, files=files, headers=house.headers("acme")), 413)


def test_bodies_share_a_bounded_room(house, start):
    url = start(house.app(AppSettings(buffered_bytes=50)))
    response = httpx.post(
        f"http://{url}/v2/models/m/infer", json=INFER, headers=house.headers("acme")
    )
    error(response, 429, "50 may be held")
    for _ in range(3):  # and what was refused gave its part back
        small = httpx.post(f"http://{url}/v2/repository/index", headers=house.headers("acme"))
        assert small.is_success


def test_a_client_that_goes_in_the_middle_of_its_body_gives_its_room_back(house, start):
    app = house.app(AppSettings(buffered_bytes=1000))
    address = start(app)
    for _ in range(3):
        with connect(address) as connection:
            connection.sendall(head("POST", "/v2/models/m/infer", house, 950) + b"x" * 900)
            until(lambda: app.under_way == 1)
        until(lambda: app.under_way == 0)
    url = f"http://{address}/v2/models/m/infer"
    assert httpx.post(url, json=INFER, headers=house.headers("acme")).is_success
    page = app.meters.page().decode()
    assert 'tessera_requests_total{route="infer",status="499",tenant="acme"} 3.0' in page


def test_a_client_that_does_not_read_its_answer_is_let_go(house, start, caplog):
    app = house.app(AppSettings(send_timeout_s=0.2))
    size = 16 << 20
    one = {"name": "x", "shape": [1, size], "datatype": "UINT8"}
    asked = {
        "inputs": [{**one, "parameters": {"binary_data_size": size}}],
        "parameters": {"binary_data_output": True},
    }
    words = json.dumps(asked).encode()
    more = f"Inference-Header-Content-Length: {len(words)}\r\n"
    with connect(start(app)) as connection:
        length = len(words) + size
        connection.sendall(head("POST", "/v2/models/m/infer", house, length, more))
        connection.sendall(words + bytes(size))
        until(lambda: "failed while it was answered" in caplog.text)
        until(lambda: app.under_way == 0)
        assert len(answer(connection)) < size


def test_the_header_of_the_binary_extension_is_a_number(web, house):
    for odd in ("x", "-1", "1" * 30, "1.5", ""):
        headers = {**house.headers("acme"), "Inference-Header-Content-Length": odd}
        response = web.post("/v2/models/m/infer", json=INFER, headers=headers)
        error(response, 400, "Inference-Header-Content-Length")


@hypothesis.settings(
    max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=st.data())
def test_no_body_whatever_makes_the_server_fail(web, house, data):
    inputs = {"x": torch.ones(2, 2), "n": torch.tensor([True, False])}
    said, length = encode_request(inputs, binary=data.draw(st.booleans()))
    changed = bytearray(said)
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    told = length if length is None else length + data.draw(st.integers(-1, 1))
    headers = house.headers("acme")
    if told is not None:
        headers["Inference-Header-Content-Length"] = str(told)
    response = web.post("/v2/models/m/infer", content=bytes(changed), headers=headers)
    assert response.status_code in (200, 400)
    if response.status_code == 400:
        error(response, 400)


def test_a_head_that_is_too_slow_or_too_large_ends_the_connection(house, start, monkeypatch):
    monkeypatch.setattr("tessera.serve.listen.HEAD_S", 0.2)
    address = start(house.app())
    with connect(address) as idle:
        assert answer(idle) == b""
    with connect(address) as slow:
        slow.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost:")
        assert answer(slow) == b""
    monkeypatch.setattr("tessera.serve.listen.HEAD_S", 10)
    for bomb in (b"GET /" + b"x" * 70_000, b"GET / HTTP/1.1\r\n" + b"a: " + b"x" * 70_000):
        with connect(address) as large:
            large.sendall(bomb + b"\r\n\r\n")
            assert answer(large) == b""
    # One connection asks twice: the time of its second head counts anew.
    with connect(address) as good:
        for _ in range(2):
            good.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert good.recv(65536).startswith(b"HTTP/1.1 200")


# --- the rest --------------------------------------------------------------------------------


def test_a_server_that_drains_answers_what_it_has_and_takes_no_more(house, start):
    app = house.app()
    house.engine.held = True
    address = start(app)
    words = json.dumps(INFER).encode()
    with connect(address) as under_way:
        under_way.sendall(head("POST", "/v2/models/m/infer", house, len(words)) + words)
        until(lambda: house.engine.waiting)
        app.drain()
        ready = httpx.get(f"http://{address}/v2/health/ready")
        error(ready, 503, "shutting down")
        assert httpx.get(f"http://{address}/v2/health/live").is_success
        refused = httpx.post(
            f"http://{address}/v2/models/m/infer", json=INFER, headers=house.headers("acme")
        )
        error(refused, 503, "shutting down")
        assert refused.headers["retry-after"] == "5"
        house.engine.release()
        assert under_way.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_server_that_is_told_to_stop_answers_what_it_has(house):
    house.engine.held = True
    server = Server(house.app(), port=0, drain_s=10)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    words = json.dumps(INFER).encode()
    with connect(f"127.0.0.1:{server.port}") as under_way:
        under_way.sendall(head("POST", "/v2/models/m/infer", house, len(words)) + words)
        until(lambda: house.engine.waiting)
        server.should_exit = True
        until(lambda: not server.servers[0].is_serving())
        assert thread.is_alive()
        house.engine.release()
        assert answer(under_way).startswith(b"HTTP/1.1 200")
    thread.join(20)
    assert not thread.is_alive()


def test_inference_goes_on_while_the_database_is_away(web, house):
    house.registry.close()
    acme = house.headers("acme")
    assert web.post("/v2/models/m/infer", json=INFER, headers=acme).status_code in (200, 503)
    error(web.get("/v1/tenants/acme/aliases", headers=acme), 503)
    assert web.get("/v2/models/m", headers=acme).is_success
    assert web.get("/v2/health/live").is_success


def asked(app, path: str, client: str, headers: dict[str, str]) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as web:
            return await web.get(path, headers=headers)

    return asyncio.run(ask())


def test_metrics_are_for_this_machine_and_for_admins(house):
    app = house.app()
    assert asked(app, "/metrics", "127.0.0.1", {}).is_success
    assert asked(app, "/metrics", "10.0.0.9", house.headers("admin")).is_success
    error(asked(app, "/metrics", "10.0.0.9", {}), 401)
    error(asked(app, "/metrics", "10.0.0.9", house.headers("acme")), 403)
    error(asked(app, "/metrics", "127.0.0.1", {"X-Forwarded-For": "10.0.0.9"}), 401)
    error(asked(house.app(AppSettings(metrics_on_loopback=False)), "/metrics", "::1", {}), 401)


def test_metrics_count_by_tenant_up_to_a_number_of_tenants(house, start):
    address = start(house.app(AppSettings(tenant_labels=1)))
    for who in ("acme", "globex", "globex"):
        url = f"http://{address}/v2/models/m/infer"
        assert httpx.post(url, json=INFER, headers=house.headers(who)).is_success
    for path in ("/v2/models/a", "/v2/x", "/somewhere"):
        httpx.get(f"http://{address}{path}")
    page = httpx.get(f"http://{address}/metrics").text
    for line in (
        'tessera_requests_total{route="infer",status="200",tenant="acme"} 1.0',
        'tessera_requests_total{route="infer",status="200",tenant="_other"} 2.0',
        'tessera_request_seconds_count{route="infer",tenant="_other"} 2.0',
        "tessera_requests_under_way 1.0",
    ):
        assert line in page.splitlines()
    assert "globex" not in page
    assert "somewhere" not in page


def test_openapi_describes_what_is_answered(web):
    said = web.get("/v1/openapi.json").json()
    statuses = {s for p in said["paths"].values() for o in p.values() for s in o["responses"]}
    assert "422" not in statuses
    assert {"401", "404", "409", "429", "503"} <= statuses
    upload = said["paths"]["/v1/tenants/{tenant}/deltas"]["post"]
    assert "multipart/form-data" in upload["requestBody"]["content"]

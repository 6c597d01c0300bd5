"""A line a request: what it says, that it says no secret, and one form for all that is logged."""

from __future__ import annotations

import io
import json
import logging
import re
import socket

import pytest
from starlette.testclient import TestClient

from tessera.errors import CheckpointError, InputError
from tessera.serve import logs
from tessera.serve.settings import AppSettings

X = [0.125, 7.0625, 3.0]
INFER = {"inputs": [{"name": "x", "shape": [3, 1], "datatype": "FP32", "data": X}]}


@pytest.fixture
def written():
    """`set_up` with a stream, whose lines this returns; afterwards all is as it was."""
    root, streams = logging.getLogger(), []
    names = ("", "tessera", "tessera.requests", "py.warnings")
    before = {name: logging.getLogger(name).level for name in names}
    handlers = root.handlers[:]

    def begin(form: str, **options):
        stream = io.StringIO()
        streams.append(stream)
        logs.set_up(form, stream=stream, **options)

        def read():
            lines = stream.getvalue().splitlines()
            return [json.loads(line) for line in lines] if form == "json" else lines

        return read

    yield begin
    root.handlers = handlers
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(False)


def test_the_line_of_an_answer(house, written):
    read, web = written("json"), TestClient(house.app())
    asked = {**house.headers("acme"), "X-Request-Id": "r-17"}
    answer = web.post("/v2/models/m/infer", json=INFER, headers=asked)
    (line,) = read()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert 0 < line.pop("ms") < 10_000
    assert line == {
        "level": "info",
        "logger": "tessera.requests",
        "message": "request",
        "request": "r-17",
        "method": "POST",
        "route": "infer",
        "status": 200,
        "tenant": "acme",
        "alias": "m",
        "delta": house.times(2).hash[:12],
        "rows": 3,
        "received": len(answer.request.content),
        "sent": len(answer.content),
    }


@pytest.mark.parametrize(
    ("method", "path", "who", "status", "told"),
    [
        ("GET", "/v1/tenants/acme/aliases/m", "acme", 200, ("acme", "m")),
        ("GET", "/v1/tenants/acme/aliases/m", "globex", 404, ("acme", "m")),
        ("GET", "/v1/tenants/..%2f..%2fetc/aliases/m", "admin", 404, (None, None)),
        ("GET", "/v1/keys", "admin", 200, (None, None)),
        ("GET", "/v2/models/none-such", "acme", 404, (None, None)),
        ("GET", "/metrics", "acme", 403, (None, None)),
        ("GET", "/nowhere", "acme", 404, (None, None)),
        ("DELETE", "/v2/models/m/infer", "acme", 405, (None, None)),
    ],
)
def test_each_request_has_its_line_and_its_id(house, written, method, path, who, status, told):
    read, web = written("json"), TestClient(house.app())
    answer = web.request(method, path, headers=house.headers(who))
    (line,) = read()
    assert (answer.status_code, line["status"]) == (status, status)
    assert line["request"] == answer.headers["x-request-id"]
    assert (line.get("tenant"), line.get("alias")) == told
    assert line["sent"] == len(answer.content)


def test_the_pattern_of_the_path_is_said_and_never_the_path(house, written):
    read, web = written("json"), TestClient(house.app())
    web.get("/v1/tenants/acme/deltas/tsr_secret", headers=house.headers("acme"))
    web.get("/tsr_secret?key=tsr_secret", headers=house.headers("acme"))
    web.get("/v2/models/tsr_secret", headers=house.headers("acme"))
    assert [line["route"] for line in read()] == [
        "/v1/tenants/{tenant}/deltas/{hash}",
        "management",
        "metadata",
    ]
    assert "tsr_secret" not in json.dumps(read())


def test_no_line_holds_a_key_or_an_input(house, written):
    read, web = written("text"), TestClient(house.app(), raise_server_exceptions=False)

    def fail() -> None:
        raise RuntimeError("out of order")

    for before in (lambda: None, fail):
        house.engine.before = before
        for secret in house.secrets.values():
            for headers in ({"Authorization": f"Bearer {secret}"}, {"X-API-Key": secret}):
                web.post("/v2/models/m/infer", json=INFER, headers=headers)
                web.get(f"/v1/tenants/acme/keys?key={secret}", headers=headers)
                body = {"scopes": ["infer"], secret: 1}
                web.post("/v1/tenants/acme/keys", json=body, headers=headers)
                made = web.post(
                    "/v1/tenants/acme/keys", json={"scopes": ["infer"]}, headers=headers
                )
                if made.status_code == 201:
                    assert made.json()["secret"] not in "\n".join(read())
    text = "\n".join(read())
    assert len(read()) > 40
    assert "out of order" in text
    assert not any(secret in text for secret in house.secrets.values())
    assert not any(str(number) in text for number in X[:2])


def test_what_failed_is_an_error_with_the_same_id_as_the_message_about_it(house, written):
    read, web = written("json"), TestClient(house.app())

    def fail() -> None:
        raise CheckpointError("the blob is damaged\nINFO request forged=1")

    house.engine.before = fail
    web.post("/v2/models/m/infer", json=INFER, headers=house.headers("acme"))
    message, line = read()
    assert (message["level"], line["level"], line["status"]) == ("warning", "error", 503)
    assert message["request"] == line["request"]
    assert message["logger"] == "tessera.serve"
    assert "damaged" in message["message"]


def test_a_message_stays_in_its_line(written):
    read = written("text")
    logging.getLogger("tessera.serve").info("from %s", "x\n2026 INFO request forged=1\x1b[2J")
    (line,) = read()
    assert line.endswith(r"INFO    from x\n2026 INFO request forged=1\x1b[2J")


def test_a_traceback_goes_along(written):
    read = written("json")
    try:
        raise RuntimeError("why")
    except RuntimeError as error:
        logging.getLogger("tessera.serve").error("it failed", exc_info=error)
    (line,) = read()
    assert line["trace"].startswith("Traceback")
    assert line["trace"].endswith("RuntimeError: why")


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_an_error_quotes_is_no_line_of_its_own(written, form):
    read = written(form)
    try:
        raise RuntimeError("no \ud800\n2026 INFO request forged=1\x1b[2J")
    except RuntimeError as error:
        logging.getLogger("tessera.serve").error("it failed: %s", error, exc_info=error)
    first, *others = read()
    if form == "json":
        assert not others
        assert r"no \ud800" in first["message"]
        assert r"no \ud800" in first["trace"]
    else:
        assert first.endswith(r"it failed: no \ud800\n2026 INFO request forged=1\x1b[2J")
        assert others[0] == "    Traceback (most recent call last):"
        assert all(line.startswith("    ") for line in others)
        assert others[-1] == r"    2026 INFO request forged=1\x1b[2J"


def test_what_other_libraries_say_comes_in_the_same_form(written):
    read = written("json")
    logging.getLogger("uvicorn.error").warning("Exceeded concurrency limit.")
    logging.getLogger("uvicorn.error").info("Started")
    assert [(line["logger"], line["level"]) for line in read()] == [("uvicorn.error", "warning")]


def test_the_lines_of_requests_can_be_left_out(house, written):
    read, web = written("json", requests=False), TestClient(house.app())
    assert web.get("/v2/health/live").is_success
    assert read() == []


def test_a_terminal_gets_text_and_all_else_json(written):  # which puts back what it finds
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, first in ((Terminal(), "2"), (io.StringIO(), "{")):
        logs.set_up(stream=stream)
        logging.getLogger("tessera").warning("here")
        assert stream.getvalue()[0] == first
    with pytest.raises(InputError, match="text or json"):
        logs.set_up("yaml")


def test_a_client_that_was_too_slow_has_its_line_too(house, start, written):
    read = written("json")
    where = start(house.app(AppSettings(body_timeout_s=0.2)))
    host, port = where.split(":")
    words = f"Authorization: Bearer {house.secrets['acme']}\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(f"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\n{words}[".encode())
        assert b" 408 " in slow.recv(1000).split(b"\r\n")[0]
    line = next(line for line in read() if line["message"] == "request")
    assert (line["status"], line["tenant"], line["alias"]) == (408, "acme", "m")


def test_without_being_asked_there_is_no_line_not_even_of_what_failed(house, caplog):
    def fail() -> None:
        raise RuntimeError("out of order")

    house.engine.before = fail
    web = TestClient(house.app(), raise_server_exceptions=False)
    assert web.post("/v2/models/m/infer", json=INFER, headers=house.headers("acme")).is_error
    assert {record.name for record in caplog.records} == {"tessera.serve"}

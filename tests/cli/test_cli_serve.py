"""`tessera serve`: what its options come to, and what it says of those that make no sense."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
from torch import nn

from tessera.cli import main

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from tessera.cli import serve, served
from tessera.serve import service as services

MODEL = ["--model", "torch.nn:Identity"]


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_to(parser.add_subparsers())
    return parser.parse_args(["serve", *MODEL, "--db", "d", "--blobs", "b", *words])


def test_without_options_the_settings_are_those_of_the_library():
    made = serve._settings(services, parsed())
    plain = services.ServiceSettings(db="d", blobs="b")
    for part in ("slots", "max_rows", "deadline_ms", "queue_rows", "keep"):
        assert getattr(made, part) == getattr(plain, part)
    for name in type(plain.fits).__dataclass_fields__:
        assert getattr(made.fits, name) == getattr(plain.fits, name), name
    for name in set(type(plain.app).__dataclass_fields__) - {"limits"}:
        assert getattr(made.app, name) == getattr(plain.app, name), name
    for name in type(plain.app.limits).__dataclass_fields__:
        assert getattr(made.app.limits, name) == getattr(plain.app.limits, name), name


def test_each_option_reaches_its_setting():
    fits = "--fits 2 --fit-waiting 3 --fit-rows 4 --fit-steps 5 --fit-ms 6.5"
    much = "--slots 7 --max-rows 8 --queue-rows 9 --deadline-ms 1.5 --keep hashes"
    asked = "--timeout-s 10 --body-mib 11 --upload-mib 12 --metrics-key"
    made = serve._settings(services, parsed(*f"{fits} {much} {asked}".split()))
    f, app = made.fits, made.app
    assert (f.workers, f.waiting, f.rows, f.steps, f.ms) == (2, 3, 4, 5, 6.5)
    assert (made.slots, made.max_rows, made.queue_rows) == (7, 8, 9)
    assert (made.deadline_ms, made.keep) == (1.5, "hashes")
    assert (app.infer_timeout_s, app.limits.body_bytes, app.upload_bytes) == (
        10,
        11 << 20,
        12 << 20,
    )
    assert not app.metrics_on_loopback


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fits", "0"], "at least 1, got 0"),
        (["--fit-ms", "inf"], "a finite number > 0, got inf"),
        (["--timeout-s", "nan"], "a finite number > 0, got nan"),
        (["--slots", "many"], "invalid _count value"),
        (["--port", "65536"], "0 to 65535"),
        (["--log", "yaml"], "invalid choice"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        main(["serve", *MODEL, *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {words[0]}" in error
    assert said in error


@pytest.fixture
def quiet():
    """The command sets up the logs of its process, which here is the tests'."""
    root, threads = logging.getLogger(), torch.get_num_threads()
    names = ("", "tessera", "tessera.requests")
    before = {name: logging.getLogger(name).level for name in names}
    handlers = root.handlers[:]
    yield
    root.handlers = handlers
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("device", ["cuda:99", "quantum", "meta"])
def test_a_device_that_is_not_there(quiet, capsys, tmp_path, device):
    assert main(["serve", *MODEL, "--data", str(tmp_path), "--device", device]) == 2
    assert "tessera doctor" in capsys.readouterr().err
    assert not (tmp_path / "registry.db").exists()


def test_a_port_that_is_taken(quiet, capsys, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["serve", *MODEL, "--data", str(tmp_path), "--port", port]) == 2
    assert "give another --host or --port" in capsys.readouterr().err


def test_it_starts_and_its_log_is_json(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*MODEL, "--data", str(tmp_path), "--port", str(port)]
    secret = "tsr_an-admin-key-for-the-tests"
    process = subprocess.Popen(
        [sys.executable, "-m", "tessera", "serve", *words, "--device", "cpu", "--metrics-key"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TESSERA_ADMIN_KEY": secret, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert f":{port}" in process.stdout.readline()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/metrics", headers={"X-API-Key": secret}
        )
        for _ in range(3):  # the port is open, uvicorn may not have begun yet: the kernel waits
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert answer.headers["x-request-id"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30)
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)
    lines = [json.loads(line) for line in said[1].splitlines()]
    assert [line["status"] for line in lines if line["message"] == "request"] == [200] * 3 + [401]
    assert secret not in "".join(said)


@pytest.mark.parametrize("command", ["serve", "replay"])
def test_the_model_goes_where_the_device_is_named(monkeypatch, quiet, tmp_path, command):
    moved = []

    class Model(nn.Module):
        def to(self, device):
            moved.append(device)
            raise KeyboardInterrupt  # that is all there is to see

    monkeypatch.setattr(served, "build", lambda *said: Model())
    with pytest.raises(KeyboardInterrupt):
        main([command, *MODEL, "--data", str(tmp_path), "--device", "cpu:0"])
    assert moved == [torch.device("cpu:0")]

"""Databases and object stores for tests: SQLite always, PostgreSQL and S3 where they are."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

import obstore
import psycopg
import pytest
from obstore.store import S3Store

_NUMBERS = count(1)


def _programs() -> Path | None:
    """The folder of initdb and postgres; Debian keeps them off the path."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("postgres")
    if found:
        places.insert(0, Path(os.path.realpath(found)).parent)
    return next((p for p in places if (p / "initdb").exists() and (p / "postgres").exists()), None)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a server on 127.0.0.1, without a database's name; skips where there is none."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="tessera-pg-"))
    user = {}
    if os.getuid() == 0:  # it refuses to run as root; Debian's package brings a user of its own
        shutil.chown(folder, "postgres", "postgres")
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    port = _free_port()
    data = str(folder / "data")
    make = [programs / "initdb", "-D", data, "-U", "tessera", "-A", "trust", "-E", "UTF8"]
    subprocess.run([*make, "--no-sync"], check=True, capture_output=True, cwd=folder, **user)
    run = [programs / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1"]
    run += ["-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]  # no power cuts here
    url = f"postgresql://tessera@127.0.0.1:{port}"
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(run, stdout=log, stderr=log, cwd=folder, **user)
        try:
            _wait(url, server, folder / "log")
            yield url
        finally:
            server.send_signal(signal.SIGINT)  # at once, whoever is still connected
            server.wait(30)
            shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(f"{url}/postgres").close()
            return
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/registry.db"
    server = request.getfixturevalue("postgresql")
    name = f"test_{next(_NUMBERS)}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{server}/{name}".replace("postgresql://", "postgresql+psycopg://")


class S3:
    """A process that speaks S3 over HTTP (moto), with one bucket; it can go away and come back."""

    BUCKET = "tessera-tests"

    def __init__(self) -> None:
        self._port = _free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # `close` closes it
        self._process: subprocess.Popen[bytes] | None = None
        self._kept: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self._port}"
        # Where the process lives no object outlives it: what it held is put back.
        self.store = S3Store(
            self.BUCKET,
            endpoint=self.url,
            access_key_id="tests",
            secret_access_key="tests",
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def start(self) -> None:
        """Start it, with what it held when it went away."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        for _ in range(600):
            assert self._process.poll() is None, self.log()
            with contextlib.suppress(OSError):
                make = urllib.request.Request(f"{self.url}/{self.BUCKET}", method="PUT")
                urllib.request.urlopen(make, timeout=30).close()
                break
            time.sleep(0.05)
        for key, content in self._kept.items():
            obstore.put(self.store, key, content)

    def stop(self) -> None:
        """Let it go away: connections are refused."""
        self._kept = {
            found["path"]: bytes(obstore.get(self.store, found["path"]).bytes())
            for found in chain.from_iterable(obstore.list(self.store))
        }
        self.kill()

    def kill(self) -> None:
        """End it, and what it held."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End it for good."""
        self.kill()
        self._log.close()

    def log(self) -> str:
        """What was asked of it, a line each."""
        self._log.seek(0)
        return self._log.read().decode()


@pytest.fixture(scope="session")
def _s3_process() -> Iterator[S3]:
    missing = [m for m in ("moto", "flask", "flask_cors") if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"no process here speaks S3: pip install 'moto[server]' ({missing[0]})")
    made = S3()
    made.start()
    yield made
    made.close()


@pytest.fixture
def s3(_s3_process: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A server that speaks S3, and the environment in which it is found."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_process.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return _s3_process


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch):
    """benchmarks/_served.py: the command `tessera serve` as a process."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("_served")
    sys.modules.pop("_served", None)

"""The real server killed at random moments under load: what it acknowledged is there, whole.

Eight kills; TESSERA_KILLS=50 for the full size.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tessera import peft
from tessera.errors import AccessError, TesseraError
from tessera.serve.client import Client

KILLS = int(os.environ.get("TESSERA_KILLS", "8"))
NAMES = ("acme", "globex")
ASKED = {"input": torch.linspace(-1.0, 1.0, 12).reshape(2, 6)}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("_served")
    sys.modules.pop("_served", None)


class Known:
    """What the server acknowledged."""

    def __init__(self) -> None:
        self.secrets: dict[str, str] = {}
        self.keys: dict[str, tuple[str, str]] = {}  # id -> (tenant, secret)
        self.revoked: set[str] = set()
        self.deltas: dict[str, list] = {name: [] for name in NAMES}
        self.aliases: list[tuple[str, int, str]] = []
        self.answers: list[list[tuple[str, str, int, str, float]]] = []
        self.begun_revoking: set[str] = set()
        self.number = 0


class Load:
    """Threads that swap, upload, make and revoke keys, and ask, until the server is gone."""

    def __init__(self, served, server, known: Known, trial: int, *, changes: bool = True) -> None:
        self._served, self._server, self._known, self._trial = served, server, known, trial
        self._base = served.net()
        self._failed: list[BaseException] = []
        acts = [self._ask(name, i) for name in NAMES for i in (0, 1)]
        acts += [*map(self._swap, NAMES), self._keys()] if changes else []
        self._begun = [threading.Event() for _ in acts]
        self._threads = [
            threading.Thread(target=self._until_gone, args=(act, begun))
            for act, begun in zip(acts, self._begun, strict=True)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        for begun in self._begun:
            assert begun.wait(30)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not self._failed, self._failed

    def _until_gone(self, act, begun) -> None:
        try:
            for _ in act:
                begun.set()
        except (OSError, http.client.HTTPException):
            pass
        except TesseraError as error:
            if "did not answer" not in str(error):
                self._failed.append(error)
        except BaseException as error:
            self._failed.append(error)
        finally:
            begun.set()

    def _ask(self, name: str, at: int):
        line, own = self._served.Line(self._server.port, self._known.secrets[name]), []
        self._known.answers.append(own)
        number = 0
        with contextlib.closing(line):
            while True:
                number += 1
                said = line.infer("clf", ASKED, f"{name}-{at}-{self._trial}-{number}")
                if said.status == 503:  # it drains
                    return
                assert said.status == 200, said.status
                own.append((said.request, name, said.generation, said.delta, time.time()))
                yield

    def _swap(self, name: str):
        with Client(self._server.url, self._known.secrets[name]) as client:
            generation = client.history("clf")[-1].generation
            while True:
                self._known.number += 1
                delta = self._served.drawn(self._base, "net", 2 * self._known.number)
                client.upload(delta)
                self._known.deltas[name].append(delta)
                for _ in range(3):
                    chosen = random.choice(self._known.deltas[name][-4:])
                    new = client.set_alias("clf", chosen.hash, generation=generation)
                    generation = new.generation
                    self._known.aliases.append((name, generation, new.delta))
                    yield

    def _keys(self):
        roots = {n: Client(self._server.url, self._served.ADMIN, tenant=n) for n in NAMES}
        with contextlib.ExitStack() as stack:
            for root in roots.values():
                stack.enter_context(root)
            while True:
                for name, root in roots.items():
                    key, secret = root.create_key(["infer"])
                    self._known.keys[key.id] = (name, secret)
                    yield
                    mine = [k for k, (n, _) in self._known.keys.items() if n == name]
                    live = [k for k in mine if k not in self._known.begun_revoking]
                    if len(live) > 4:
                        chosen = random.choice(live)
                        self._known.begun_revoking.add(chosen)
                        root.revoke_key(chosen)
                        self._known.revoked.add(chosen)


def check_there(server, known: Known) -> float:
    """All that was acknowledged; when the first answer was given whose record is lost."""
    registry = server.registry()
    registry.audit.verify()
    for name in NAMES:
        held = {record.hash for record in registry.deltas(name)}
        assert {delta.hash for delta in known.deltas[name]} <= held
        for hash in held:
            assert registry.load(hash, tenant=name).hash == hash
        history = registry.history(name, "clf")
        assert [a.generation for a in history] == list(range(1, len(history) + 1))
        assert registry.alias(name, "clf").delta == history[-1].delta
        assert history[-1].delta in held
        for _, generation, delta in (a for a in known.aliases if a[0] == name):
            assert history[generation - 1].delta == delta
    for id, (name, secret) in known.keys.items():
        if id in known.revoked:
            with pytest.raises(AccessError):
                registry.authenticate(secret)
        elif id not in known.begun_revoking:
            assert registry.authenticate(secret).tenant == name
    events = {}
    for event in registry.audit.read(kinds=["request"]):
        assert event.body["request"] not in events
        events[event.body["request"]] = event
    batches = {
        (e.body["boot"], e.body["batch"]): e.seq for e in registry.audit.read(kinds=["batch"])
    }
    for event in events.values():
        assert batches[event.body["boot"], event.body["batch"]] < event.seq
    oldest = time.time()
    for answers in known.answers:
        told = [request in events for request, *_ in answers]
        # The end of what one client was told may be missing, never something before it.
        assert told == sorted(told, reverse=True)
        for request, name, generation, delta, _ in answers[: sum(told)]:
            body = events[request].body
            assert (events[request].tenant, body["generation"], body["delta"]) == (
                name,
                generation,
                delta,
            )
        if sum(told) < len(answers):
            oldest = min(oldest, answers[sum(told)][-1])
        answers[sum(told) :] = []  # known to be lost
    registry.close()
    return oldest


def check_answers(served, server, known: Known) -> None:
    """What an alias points to answers."""
    base = served.net()
    for name in NAMES:
        line = served.Line(server.port, known.secrets[name])
        said = line.infer("clf", ASKED, f"{name}-after-{time.time_ns()}")
        line.close()
        assert said.status == 200
        delta = next(d for d in known.deltas[name] if d.hash == said.delta)
        with torch.no_grad():
            wanted = peft.apply(base, delta)(ASKED["input"])
        assert torch.allclose(said.outputs["output"], wanted, atol=1e-5)


@pytest.fixture
def server(served, tmp_path):
    made = served.Served(tmp_path, options=["--slots", "3"])
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.wait()


def prepare(served, server, known: Known) -> None:
    server.start()
    for name in NAMES:
        known.secrets[name] = server.tenant(name)
        delta = served.drawn(served.net(), "net", 1 + 2 * NAMES.index(name))
        with Client(server.url, known.secrets[name]) as client:
            client.upload(delta)
            client.set_alias("clf", delta.hash, generation=0)
        known.deltas[name].append(delta)
        known.aliases.append((name, 1, delta.hash))


@pytest.mark.slow
def test_killed_at_any_moment_what_was_acknowledged_is_there(served, server):
    random.seed(0)
    known = Known()
    prepare(served, server, known)
    for trial in range(KILLS):
        load = Load(served, server, known, trial)
        load.start()
        time.sleep(0.4 * random.random())
        server.end(signal.SIGKILL)
        ended, answered = time.time(), sum(map(len, known.answers))
        load.join()
        oldest = check_there(server, known)
        lost = answered - sum(map(len, known.answers))
        print(f"kill {trial}: {lost} records lost, the oldest {max(0.0, ended - oldest):.3f} s old")
        if trial % 4 == 3:  # once more, while it starts
            server.begin()
            time.sleep(3.0 * random.random())
            server.end(signal.SIGKILL)
        server.start()
        check_answers(served, server, known)
    assert len(known.aliases) > 5 * KILLS
    assert len(known.keys) > 2 * KILLS
    assert known.revoked
    server.end()
    check_there(server, known)
    done = server.replay()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "identical" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_loses_nothing(served, server, how):
    """As systemd and Docker tell it, or Ctrl-C: even the records of the last answers are there."""
    known = Known()
    prepare(served, server, known)
    load = Load(served, server, known, 0, changes=False)
    load.start()
    time.sleep(0.2)
    # The log cannot be written for a moment, as where another process is at it.
    path = server.data / "registry.db"
    with contextlib.closing(sqlite3.connect(path, check_same_thread=False)) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(1.0, other.execute, ("ROLLBACK",))
        release.start()
        status = server.end(how)
        release.join()
    load.join()
    told = sum(map(len, known.answers))
    check_there(server, known)
    assert (sum(map(len, known.answers)), status) == (told, 0)
    assert "Traceback" not in (server.folder / "log").read_text()

"""The server killed at random moments under load: what it acknowledged is there, whole.

Fifty moments: some of the command as a process of its own, with the process in which it fits; most
of a fork, which starts in a moment. TESSERA_KILLS multiplies them.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import torch

from tessera import peft
from tessera.errors import AccessError, ConflictError, TesseraError, UnknownNameError
from tessera.serve.client import Client
from tessera.serve.feedback import Said
from tessera.serve.fitting_values import FitSettings
from tessera.serve.rollout_values import Shots

TIMES = int(os.environ.get("TESSERA_KILLS", "1"))
KILLS, FORKED = 3 * TIMES, 47 * TIMES
NAMES = ("acme", "globex")
GONE = ("did not answer", "the process for fits ended")
ASKED = {"input": torch.linspace(-1.0, 1.0, 12).reshape(2, 6)}
SHOTS = {"input": torch.linspace(-2.0, 2.0, 48).reshape(8, 6)}
LABELS = [0, 1, 2, 0, 1, 2, 0, 1]


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
        self.feedback: list[tuple[str, str, bool]] = []
        self.fits: list[tuple[str, str, int]] = []
        self.gates: list[tuple[str, str]] = []
        self.begun: list[tuple[str, str]] = []
        self.ended: list[tuple[str, str]] = []
        self.loaded: set[str] = set()
        self.thorough = False
        self.number = 0


class Load:
    """Threads that ask and change things of all kinds, until the server is gone."""

    def __init__(self, served, server, known: Known, trial: int, *, changes: bool = True) -> None:
        self._served, self._server, self._known, self._trial = served, server, known, trial
        self._base = served.net()
        self._failed: list[BaseException] = []
        acts = [self._ask(name, i) for name in NAMES for i in (0, 1)]
        if changes:
            acts += [*map(self._swap, NAMES), self._keys(), self._judge("acme")]
            acts += [self._fit("acme"), self._compare("globex")]
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
            if not any(gone in str(error) for gone in GONE):
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

    def _judge(self, name: str):
        line = self._served.Line(self._server.port, self._known.secrets[name])
        number = 0
        client = Client(self._server.url, self._known.secrets[name])
        with client, contextlib.closing(line):
            while True:
                number += 1
                request, right = f"{name}-judged-{self._trial}-{number}", number % 3 > 0
                assert line.infer("clf", ASKED, request).status == 200
                while True:
                    with contextlib.suppress(UnknownNameError):  # the log is a moment behind
                        client.feedback(request, correct=[right, True])
                        break
                    time.sleep(0.01)
                self._known.feedback.append((name, request, right))
                yield

    def _fit(self, name: str):
        with Client(self._server.url, self._known.secrets[name]) as client:
            generation = next((a.generation for a in client.aliases() if a.name == "own"), 0)
            while True:
                yield  # a process for fits takes its time to start
                self._known.number += 1
                how = FitSettings(r=1, steps=2, seed=self._known.number)
                labels = torch.tensor(LABELS)
                found = client.fit(SHOTS, labels, how, alias="own", generation=generation)
                generation = int(found.alias["generation"])
                self._known.fits.append((name, found.hash, generation))

    def _compare(self, name: str):
        with Client(self._server.url, self._known.secrets[name]) as client:
            with contextlib.suppress(UnknownNameError, ConflictError):  # left by a kill
                client.end_experiment("ab")
            if not any(a.name == "ab" for a in client.aliases()):
                client.set_alias("ab", "", generation=0)
            while True:
                candidate = random.choice(self._known.deltas[name])
                begun = client.begin_experiment("ab", candidate.hash, share=0.5)
                self._known.begun.append((name, begun.id))
                yield
                gate = client.gate("ab", shots=Shots(inputs=SHOTS, labels=LABELS)).gate
                self._known.gates.append((name, gate.id))
                client.end_experiment("ab")
                self._known.ended.append((name, begun.id))


def check_rollouts(registry, known: Known) -> None:
    """The feedback, fits, experiments and gates that were acknowledged."""
    journal, gates = registry.rollouts.journal, registry.rollouts.gates
    for name, request, right in known.feedback:
        said = Said.parse({"request": request, "correct": [right, True]})
        found = journal.find(name, said)
        assert found is not None
        assert found.outcomes == f"{right:d}1"
        assert journal.answer(name, request).body["delta"] == found.delta
    told = {(e.tenant, e.body["delta"]) for e in registry.audit.read(kinds=["delta.fit"])}
    for name, hash, generation in known.fits:
        assert registry.history(name, "own")[generation - 1].delta == hash
        assert (name, hash) in told
    for name, id in known.gates:
        gate = gates.get(name, "ab", id)
        assert gates.evidence(gate)  # which is decided again
    begun = registry.audit.read(kinds=["experiment.started"])
    assert set(known.begun) <= {(e.tenant, e.body["id"]) for e in begun}
    ended = registry.audit.read(kinds=["experiment.ended"])
    assert set(known.ended) <= {(e.tenant, e.body["experiment"]) for e in ended}


def check_there(server, known: Known) -> float:
    """All that was acknowledged; when the first answer was given whose record is lost."""
    registry = server.registry()
    registry.audit.verify()
    for name in NAMES:
        held = {record.hash for record in registry.deltas(name)}
        assert {delta.hash for delta in known.deltas[name]} <= held
        for hash in held if known.thorough else held - known.loaded:
            assert registry.load(hash, tenant=name).hash == hash
        known.loaded |= held
        for alias in registry.aliases(name):
            assert not alias.delta or alias.delta in held
            assert registry.history(name, alias.name)[-1].delta == alias.delta
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
    check_rollouts(registry, known)
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


@pytest.fixture
def forked(served, tmp_path):
    made = served.Forked(tmp_path)
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.wait()


def kill(load: Load, server, known: Known, trial: int) -> None:
    """Now; then all that was acknowledged is looked for."""
    server.end(signal.SIGKILL)
    ended, answered = time.time(), sum(map(len, known.answers))
    load.join()
    oldest = check_there(server, known)
    lost = answered - sum(map(len, known.answers))
    print(f"kill {trial}: {lost} records lost, the oldest {max(0.0, ended - oldest):.3f} s old")


def check_enough(known: Known, kills: int) -> None:
    """Else nothing was tried."""
    assert len(known.aliases) > 5 * kills
    assert len(known.keys) > 2 * kills
    assert known.revoked
    for kind in ("feedback", "fits", "gates", "begun", "ended"):
        assert len(getattr(known, kind)) >= kills / 2, kind


@pytest.mark.slow
def test_killed_at_any_moment_what_was_acknowledged_is_there(served, forked):
    random.seed(0)
    known = Known()
    prepare(served, forked, known)
    for trial in range(FORKED):
        load = Load(served, forked, known, trial)
        load.start()
        time.sleep(0.4 * random.random())
        kill(load, forked, known, trial)
        if trial % 4 == 3:  # once more, while it starts
            forked.begin()
            time.sleep(0.5 * random.random())
            forked.end(signal.SIGKILL)
        forked.start()
        check_answers(served, forked, known)
    check_enough(known, FORKED)
    forked.end()
    known.thorough = True
    check_there(forked, known)
    done = forked.replay()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "identical" in done.stdout


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            found += map(int, (task / "children").read_text().split())
    return found


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="there is no /proc here")
def test_the_process_for_fits_goes_with_the_server_and_may_be_killed_itself(served, server):
    """And whichever of them it was, every fit that was acknowledged is there."""
    random.seed(1)
    known = Known()
    prepare(served, server, known)
    for trial in range(KILLS):
        own = children(server.process.pid)
        assert len(own) == 1
        before, load = len(known.fits), Load(served, server, known, trial)
        load.start()
        until = time.monotonic() + 60
        while len(known.fits) == before and time.monotonic() < until:
            time.sleep(0.01)
        assert len(known.fits) > before, (server.folder / "log").read_text()
        time.sleep(0.4 * random.random())
        if trial % 2:  # the one that fits alone: its fit is refused, another takes its place
            os.kill(own[0], signal.SIGKILL)
            with Client(server.url, known.secrets["globex"]) as client:
                for _ in range(60):
                    with contextlib.suppress(TesseraError):  # it is not up yet
                        fitted = client.fit(SHOTS, torch.tensor(LABELS), FitSettings(steps=2))
                        break
                    time.sleep(0.1)
            with contextlib.closing(server.registry()) as registry:
                assert registry.delta("globex", fitted.hash).parent == ""
            own = children(server.process.pid)
        kill(load, server, known, trial)
        until = time.monotonic() + 30
        while any(map(is_alive, own)):
            assert time.monotonic() < until, "the process for fits was left behind"
            time.sleep(0.01)
        server.start()
        check_answers(served, server, known)
    check_enough(known, KILLS)
    assert server.end() == 0
    known.thorough = True
    check_there(server, known)


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

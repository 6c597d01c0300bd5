"""Two real server processes on one PostgreSQL: what one is told the other does, and one may die.

How soon is measured by benchmarks/serve_pair.py; here it only has to happen.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count

import psycopg
import pytest
import torch

from tessera import peft
from tessera.errors import AccessError, ConflictError, UnknownNameError
from tessera.serve.client import Client
from tessera.serve.rollout_values import Policy

ASKED = {"input": torch.linspace(-1.0, 1.0, 12).reshape(2, 6)}
_NUMBERS = count(1)


@pytest.fixture
def both(served, postgresql: str, tmp_path) -> Iterator[tuple]:
    name = f"pair_{next(_NUMBERS)}"
    with psycopg.connect(f"{postgresql}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    pairs = importlib.import_module("serve_pair")
    db = f"{postgresql}/{name}".replace("postgresql://", "postgresql+psycopg://")
    with pairs.pair(tmp_path, db) as found:
        yield found
    for module in ("serve_pair", "_timing"):
        sys.modules.pop(module, None)


def comes(what: Callable[[], bool]) -> None:
    """Wait until it is so."""
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def refused(act: Callable[[], object], error: type[Exception]) -> bool:
    try:
        act()
    except error:
        return True
    return False


@pytest.mark.slow
def test_what_one_is_told_the_other_does_and_one_may_die(served, both):
    for name, tried in (("acme", told), ("globex", killed)):
        tried(served, *both, both[0].tenant(name))
    registry = both[0].registry()
    registry.audit.verify()
    assert len(list(registry.audit.read(kinds=["server.start"]))) == 3
    registry.close()


def told(served, one, other, secret: str) -> None:
    base, deltas = served.net(), [served.drawn(served.net(), "net", n) for n in range(3)]
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(Client(one.url, secret))
        there = stack.enter_context(Client(other.url, secret))
        line = stack.enter_context(contextlib.closing(served.Line(other.port, secret)))
        root = stack.enter_context(Client(one.url, served.ADMIN, tenant="acme"))

        def answers(alias: str, delta, generation: int) -> bool:
            said = line.infer(alias, ASKED, f"r-{time.perf_counter_ns()}")
            if said.status != 200 or said.generation != generation:
                return False
            with torch.no_grad():
                wanted = peft.apply(base, delta)(ASKED["input"])
            assert said.delta == delta.hash
            assert torch.allclose(said.outputs["output"], wanted, atol=1e-5)
            return True

        # Deltas and aliases, a swap, and back.
        comes(lambda: not refused(there.aliases, AccessError))  # the key is known to both
        for delta in deltas[:2]:
            here.upload(delta)
        here.set_alias("clf", deltas[0].hash, generation=0)
        comes(lambda: answers("clf", deltas[0], 1))
        here.set_alias("clf", deltas[1].hash, generation=1)
        comes(lambda: answers("clf", deltas[1], 2))
        with pytest.raises(ConflictError, match="generation 2"):
            there.set_alias("clf", deltas[0].hash, generation=1)
        here.rollback("clf")
        comes(lambda: answers("clf", deltas[0], 3))
        assert [a.generation for a in there.history("clf")] == [1, 2, 3]

        # A key.
        key, theirs = root.create_key(["infer"])
        with contextlib.closing(served.Line(other.port, theirs)) as own:
            comes(lambda: own.infer("clf", ASKED, "k").status == 200)
            root.revoke_key(key.id)
            comes(lambda: own.infer("clf", ASKED, "k").status == 401)

        # A session, from its beginning to its end.
        session = here.session(deltas[1].hash, ttl_s=600)
        name = getattr(session, "session", session).name
        id = getattr(session, "session", session).id
        comes(lambda: answers(name, deltas[1], 1))
        here.end_session(id)
        comes(lambda: line.infer(name, ASKED, "s").status == 404)

        # An experiment: all requests to the candidate, as the one that began it would send them.
        here.upload(deltas[2])
        here.begin_experiment("clf", deltas[2].hash, share=1.0)
        comes(
            lambda: line.infer("clf", ASKED, f"e-{time.perf_counter_ns()}").delta == deltas[2].hash
        )
        said = line.infer("clf", ASKED, "to-judge")
        comes(
            lambda: not refused(lambda: here.feedback("to-judge", correct=True), UnknownNameError)
        )
        assert there.feedback("to-judge", correct=True).delta == said.delta
        with pytest.raises(ConflictError):
            there.feedback("to-judge", correct=False)
        gate = there.gate("clf", Policy(), promote=False).gate
        assert not gate.passed
        assert here.gate_evidence("clf", gate.id) == there.gate_evidence("clf", gate.id)
        here.end_experiment("clf")
        comes(
            lambda: line.infer("clf", ASKED, f"e-{time.perf_counter_ns()}").delta == deltas[0].hash
        )


def killed(served, one, other, secret: str) -> None:
    base, deltas = served.net(), [served.drawn(served.net(), "net", n) for n in range(4, 8)]
    with Client(one.url, secret) as here, Client(other.url, secret) as there:
        comes(lambda: not refused(there.aliases, AccessError))  # the key is known to both
        generation = 0
        for delta in deltas:
            here.upload(delta)
            generation = here.set_alias("clf", delta.hash, generation=generation).generation
        one.end(signal.SIGKILL)
        assert there.set_alias("clf", deltas[0].hash, generation=generation).generation == 5
        with contextlib.closing(served.Line(other.port, secret)) as line:
            said = line.infer("clf", ASKED, "alone")
        with torch.no_grad():
            wanted = peft.apply(base, deltas[0])(ASKED["input"])
        assert (said.status, said.delta) == (200, deltas[0].hash)
        assert torch.allclose(said.outputs["output"], wanted, atol=1e-5)
        assert there.rollback("clf").delta == deltas[3].hash
    one.start()  # and joins again
    with contextlib.closing(served.Line(one.port, secret)) as line:
        said = line.infer("clf", ASKED, "back")
    assert (said.status, said.generation, said.delta) == (200, 6, deltas[3].hash)
    with pytest.raises(AccessError), Client(one.url, "tsr_nobody-has-this-secret") as stranger:
        stranger.aliases()
    assert (one.end(), other.end()) == (0, 0)

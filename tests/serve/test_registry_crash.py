"""kill -9 under writes: what was acknowledged is there, all of it or nothing of the rest."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.arch import Delta
from tessera.errors import AccessError, ConflictError
from tessera.serve.blobs import Blobs
from tessera.serve.records import SYSTEM
from tessera.serve.registry import Registry

Ack = tuple[Any, ...]
KILLS = {"sqlite": 30, "postgresql": 12}


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system has such a folder: a kill is survived by the page cache alone."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@contextlib.contextmanager
def child(body: Callable[[], None]) -> Iterator[int]:
    """A forked process that does `body`; afterwards it has ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        process = os.fork()
    if not process:
        try:
            body()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        yield process
    finally:
        _, status = os.waitpid(process, 0)
    assert status == signal.SIGKILL, "see the traceback of the child above"


def delta(number: int) -> Delta:
    return Delta(kind="prompt", tensors={"prompt": torch.full((2, 64), float(number))})


def act(registry: Registry, rng: random.Random, tell: Callable[..., None]) -> None:
    """One change of any kind; told of once it has returned."""
    match rng.choice(["delta", "alias", "alias", "rollback", "key", "revoke", "log"]):
        case "delta":
            tell("delta", registry.put_delta("one", delta(rng.randrange(10**6)), by=SYSTEM).hash)
        case "alias":
            name, held = f"a{rng.randrange(4)}", registry.deltas("one")
            known = registry.view().aliases.get(("one", name))
            chosen = rng.choice(held).hash if held else ""
            with contextlib.suppress(ConflictError):  # another thread was faster
                generation = known.generation if known else 0
                new = registry.set_alias("one", name, chosen, generation=generation, by=SYSTEM)
                tell("alias", new.name, new.generation, new.delta)
        case "rollback":
            with contextlib.suppress(ConflictError, LookupError):  # nothing before; no alias yet
                new = registry.rollback("one", f"a{rng.randrange(4)}", by=SYSTEM)
                tell("alias", new.name, new.generation, new.delta)
        case "key":
            with contextlib.suppress(RuntimeError):  # as many as it may have
                key, secret = registry.create_key("one", ["infer"], by=SYSTEM)
                tell("key", key.id, secret)
        case "revoke":
            keys = registry.keys("one")
            if len(keys) > 5:
                key = rng.choice(keys)
                registry.revoke_key(key.id, by=SYSTEM)
                tell("revoked", key.id)
        case "log":
            entries = [("request", "one", {"n": n}) for n in range(rng.randrange(1, 40))]
            last = registry.audit.extend(entries)[-1]
            tell("event", last.seq, last.hash)


def killed(make: Callable[[], Registry], seed: int) -> list[Ack]:
    """Three threads of a child change things until it is killed; what it acknowledged."""
    read, write = os.pipe()
    rng = random.Random(seed)

    def body() -> None:
        registry = make()

        def tell(*ack: object) -> None:
            os.write(write, json.dumps(ack).encode() + b"\n")

        def work(own: random.Random) -> None:
            try:
                while True:
                    act(registry, own, tell)
            except BaseException:
                traceback.print_exc()
                os._exit(1)

        threads = [
            threading.Thread(target=work, args=(random.Random(f"{seed} {n}"),)) for n in range(3)
        ]
        for thread in threads:
            thread.start()
        threads[0].join()

    with child(body) as process:
        os.close(write)
        said = os.read(read, 1 << 16)  # it has begun
        end = time.perf_counter() + rng.random() * 0.25
        while time.perf_counter() < end:
            pass
        os.kill(process, signal.SIGKILL)
    while more := os.read(read, 1 << 16):
        said += more
    os.close(read)
    return [tuple(json.loads(line)) for line in said.splitlines()]


def check_whole(registry: Registry) -> None:
    """Everything that is there belongs together."""
    kinds = Counter(event.kind for event in registry.audit.read())
    registry.audit.verify()
    held = registry.deltas("one")
    assert kinds["delta.put"] == len(held)
    for record in held:
        assert registry.load(record.hash).hash == record.hash
    changes = 0
    for alias in registry.aliases("one"):
        history = registry.history("one", alias.name)
        assert [h.generation for h in history] == list(range(1, alias.generation + 1))
        assert history[-1].delta == alias.delta
        assert not alias.delta or registry.load(alias.delta).hash == alias.delta
        assert registry.view().aliases["one", alias.name].generation == alias.generation
        changes += len(history)
    assert kinds["alias.set"] + kinds["alias.rolled_back"] == changes
    in_force = len(registry.keys("one")) + len(registry.keys(None))
    assert kinds["key.created"] - kinds["key.revoked"] == in_force == len(registry.view().keys)
    assert registry.view().revision == sum(kinds.values()) - kinds["request"]


def check_there(registry: Registry, acks: list[Ack]) -> None:
    """All that was acknowledged."""
    revoked = {event.body["key"] for event in registry.audit.read(kinds=["key.revoked"])}
    held = {record.hash for record in registry.deltas("one")}
    events = {event.seq: event.hash for event in registry.audit.read()}
    for ack in acks:
        match ack:
            case ("delta", hash):
                assert hash in held
            case ("alias", name, generation, target):
                assert registry.history("one", name)[generation - 1].delta == target
            case ("key", id, secret) if id in revoked:
                with pytest.raises(AccessError):
                    registry.authenticate(secret)
            case ("key", id, secret):
                assert registry.authenticate(secret).id == id
            case ("revoked", id):
                assert id in revoked
            case ("event", seq, hash):
                assert events[seq] == hash


@pytest.mark.slow
def test_killed_anywhere_all_that_was_acknowledged_is_there(url: str, tmp_path: Path) -> None:
    def make() -> Registry:
        return Registry(url, Blobs(tmp_path / "blobs"), base_hash="")

    registry = make()
    registry.create_tenant("one", by=SYSTEM, max_deltas=10**6)
    registry.first_admin_key("an-operators-own-secret")
    registry.close()
    known: list[Ack] = []
    for trial in range(KILLS[url.partition(":")[0].partition("+")[0]]):
        new = killed(make, trial)
        registry = make()
        check_whole(registry)
        check_there(registry, new)
        known += new
        registry.close()
    registry = make()
    check_there(registry, known)
    kinds = Counter(ack[0] for ack in known)
    assert all(kinds[kind] > 10 for kind in ("delta", "alias", "key", "event")), kinds
    registry.close()

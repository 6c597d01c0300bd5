"""What the registry holds, in pages: each once, in order, as the whole lists have it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tessera import random
from tessera.arch import Delta
from tessera.errors import ConflictError, InputError, UnknownNameError
from tessera.serve.blobs import Blobs
from tessera.serve.records import Key
from tessera.serve.registry import Registry

BASE = "0" * 64


def prompt(k: float) -> Delta:
    return Delta(kind="prompt", tensors={"prompt": torch.full((1, 4), k)}, base_hash=BASE)


@pytest.fixture
def registry(url: str, tmp_path: Path) -> Iterator[Registry]:
    now = iter(range(1, 10_000))
    made = Registry(url, Blobs(tmp_path / "blobs"), base_hash=BASE, clock=lambda: float(next(now)))
    made.first_admin_key("an-admin-key-for-the-tests-only")
    yield made
    made.close()


@pytest.fixture
def by(registry: Registry) -> Key:
    return registry.authenticate("an-admin-key-for-the-tests-only")


def test_tenants_come_once_each_and_by_name(registry: Registry, by: Key) -> None:
    names = [f"t-{n}" for n in (3, 1, 4, 15, 92)]
    for name in names:
        registry.create_tenant(name, by=by)
    found, after = [], ""
    while page := registry.listing.tenants(after=after, limit=2):
        assert len(page) <= 2
        found += [t.name for t in page]
        after = found[-1]
    assert found == [t.name for t in registry.tenants()] == sorted(names)
    assert [t.name for t in registry.listing.tenants(part="-1", limit=9)] == ["t-1", "t-15"]
    assert registry.listing.tenants(part="_", limit=9) == []
    assert registry.listing.tenants(part="%", limit=9) == []
    assert registry.listing.totals() == (5, 0)


def test_deltas_come_once_each_the_newest_first(registry: Registry, by: Key) -> None:
    for name in ("acme", "globex", "none"):
        registry.create_tenant(name, by=by)
    hashes = [registry.put_delta("acme", prompt(float(k)), by=by).hash for k in range(7)]
    registry.put_delta("globex", prompt(0.0), by=by)
    pages = [registry.listing.deltas("acme", skip=skip, limit=3) for skip in (0, 3, 6, 9)]
    assert [len(page) for page in pages] == [3, 3, 1, 0]
    assert [d.hash for page in pages for d in page] == hashes[::-1]
    assert registry.listing.held(["acme", "globex", "none"]) == {"acme": 7, "globex": 1, "none": 0}
    assert registry.listing.held([]) == {}
    assert registry.listing.totals() == (3, 8)
    kinds = registry.listing.kinds("globex", {hashes[0], hashes[1]})
    assert kinds == {hashes[0]: "prompt"}  # the other is somebody else's
    with pytest.raises(UnknownNameError):
        registry.listing.deltas("nobody", limit=1)


def test_aliases_come_once_each_and_by_name(registry: Registry, by: Key) -> None:
    registry.create_tenant("acme", by=by)
    hash = registry.put_delta("acme", prompt(1.0), by=by).hash
    for number in range(5):
        delta = hash if number % 2 else ""
        registry.set_alias("acme", f"a{number}", delta, generation=0, by=by)
    page, many = registry.listing.aliases("acme", limit=3)
    rest, _ = registry.listing.aliases("acme", after=page[-1].name, limit=3)
    assert ([a.name for a in page + rest], many) == ([f"a{n}" for n in range(5)], 5)
    assert [a.name for a in registry.listing.pointing("acme", [hash], limit=9)] == ["a1", "a3"]
    assert registry.listing.pointing("acme", [], limit=9) == []


def test_before_is_where_a_rollback_goes(registry: Registry, by: Key) -> None:
    registry.create_tenant("acme", by=by)
    hashes = [registry.put_delta("acme", prompt(float(k)), by=by).hash for k in range(4)]
    draw = random.generator(0, "tests.listing")
    assert registry.listing.before("acme", "m") is None
    generation, told = 0, ""
    for step in range(30):
        if generation and torch.rand((), generator=draw) < 0.5:
            before = registry.listing.before("acme", "m")
            if before is None:
                with pytest.raises(ConflictError):
                    registry.rollback("acme", "m", by=by)
                continue
            reason = "because" if step % 2 else ""
            now = registry.rollback("acme", "m", by=by, reason=reason)
            told = f"rollback to generation {before.generation}" + (": because" if reason else "")
            assert (now.delta, now.reason) == (before.delta, told)
        else:
            delta = hashes[int(torch.randint(4, (), generator=draw))]
            registry.set_alias("acme", "m", delta, generation=generation, by=by)
        generation += 1
    assert told  # else nothing was tried
    whole = registry.history("acme", "m")
    page = registry.listing.history("acme", "m", limit=10)
    rest = registry.listing.history("acme", "m", before=page[-1].generation, limit=100)
    assert [a.generation for a in page + rest] == [a.generation for a in whole[::-1]]
    assert [a.reason for a in page + rest] == [a.reason for a in whole[::-1]]


@pytest.mark.parametrize("reason", ["two\nlines", "r" * 501])
def test_a_reason_that_is_no_line_moves_nothing(registry: Registry, by: Key, reason: str) -> None:
    registry.create_tenant("acme", by=by)
    hashes = [registry.put_delta("acme", prompt(float(k)), by=by).hash for k in range(2)]
    for generation, hash in enumerate(hashes):
        registry.set_alias("acme", "m", hash, generation=generation, by=by)
    registry.rollouts.experiments.start("acme", "m", hashes[0], share=0.5, by=by)
    with pytest.raises(InputError, match="a reason is one line"):
        registry.rollback("acme", "m", by=by, reason=reason)
    with pytest.raises(InputError, match="a reason is one line"):
        registry.rollouts.experiments.end("acme", "m", by=by, reason=reason)
    assert registry.alias("acme", "m").generation == 2
    assert registry.rollouts.experiments.get("acme", "m").candidate == hashes[0]


def test_events_are_found_by_what_they_are_about(registry: Registry, by: Key) -> None:
    registry.create_tenant("acme", by=by)
    audit, listing = registry.audit, registry.listing
    wanted = [audit.append("gate.passed", "acme", {"alias": 'a"%_\\é'}).seq]
    audit.append("gate.passed", "acme", {"alias": "b", "in": {"alias": 'a"%_\\é'}})
    wanted.append(audit.append("gate", "acme", {"alias": 'a"%_\\é', "n": 2}).seq)
    audit.append("gated", "acme", {"alias": 'a"%_\\é'})
    audit.append("gate.passed", None, {"alias": 'a"%_\\é'})
    page = listing.events(tenant="acme", alias='a"%_\\é', kind="gate")
    assert [e.seq for e in page.events] == wanted[::-1]
    assert page.events[0].body == {"alias": 'a"%_\\é', "n": 2}
    but = listing.events(but=("gate.passed", "gate"))
    assert {e.kind for e in but.events}.isdisjoint({"gate.passed", "gate"})
    assert (but.last, but.more) == (audit.head()[0], False)
    found, before = [], None
    while True:
        page = listing.events(before=before, limit=2)
        found += [e.seq for e in page.events]
        if not page.more:
            break
        before = page.first
    assert found == list(range(audit.head()[0], 0, -1))

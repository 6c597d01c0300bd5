"""Sessions end when they should: whatever the clock says, after a restart, on every process."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.arch import Delta
from tessera.errors import (
    AccessError,
    BusyError,
    CheckpointError,
    InputError,
    UnknownNameError,
)
from tessera.serve import sessions
from tessera.serve.blobs import Blobs
from tessera.serve.registry import Registry
from tessera.serve.sessions import Ticks, machine_ticks, session_length

BASE = "0" * 64
DAY = 86_400.0


@dataclass
class World:
    """A machine: its time of day, the time since its start, and a disk."""

    url: str
    folder: str
    wall: float = 1.8e9
    ticks: float = 100.0
    boot: str = "boot-1"
    open: list[Registry] = field(default_factory=list)

    def registry(self, *, boot: str | None = None) -> Registry:
        found = Registry(
            self.url,
            Blobs(self.folder),
            base_hash=BASE,
            clock=lambda: self.wall,
            ticks=Ticks(now=lambda: self.ticks, boot=boot or self.boot),
        )
        self.open.append(found)
        return found

    def wait(self, seconds: float) -> None:
        self.wall += seconds
        self.ticks += seconds

    def restart(self) -> None:
        """The machine's: its count begins anew."""
        self.boot, self.ticks = self.boot + "+", 0.0


@pytest.fixture
def world(url, tmp_path):
    made = World(url, str(tmp_path / "blobs"))
    yield made
    for registry in made.open:
        registry.close()


def peopled(world):
    """A registry with two tenants, and an admin's key."""
    registry = world.registry()
    admin = registry.authenticate(registry.first_admin_key(None))
    for name in ("acme", "globex"):
        registry.create_tenant(name, by=admin)
    return registry, admin


def delta(k):
    return Delta(kind="prompt", tensors={"prompt": torch.full((1, 4), float(k))}, base_hash=BASE)


def kinds(registry):
    return [e.kind for e in registry.audit.read() if e.kind.startswith("session.")]


def test_a_session_is_a_name_of_its_tenant_alone(world):
    registry, admin = peopled(world)
    made = registry.sessions.start("acme", delta(1), ttl_s=60, by=admin)
    assert made.name == f"session:{made.id}"
    assert made.expires_s == world.wall + 60
    found = registry.sessions.find("acme", made.name)
    assert (found.tenant, found.name, found.generation) == ("acme", made.name, 1)
    assert found.delta == delta(1).hash
    assert registry.sessions.find("globex", made.name) is None
    assert registry.sessions.find("acme", made.id) is None
    assert registry.sessions.all("globex") == []
    assert registry.sessions.all("acme") == [made]
    with pytest.raises(UnknownNameError, match="globex has no session"):
        registry.sessions.end("globex", made.id, by=admin)
    with pytest.raises(UnknownNameError, match="globex has no session"):
        registry.sessions.get("globex", made.id)
    _, secret = registry.create_key("globex", {"manage"}, by=admin)
    with pytest.raises(UnknownNameError, match="no tenant 'acme'"):
        registry.sessions.end("acme", made.id, by=registry.authenticate(secret))
    _, secret = registry.create_key("acme", {"infer"}, by=admin)
    with pytest.raises(AccessError, match="scope manage"):
        registry.sessions.start("acme", delta(1), ttl_s=60, by=registry.authenticate(secret))
    assert registry.sessions.find("acme", made.name) is not None


def test_setting_the_clock_changes_nothing(world):
    registry, admin = peopled(world)
    made = registry.sessions.start("acme", delta(1), ttl_s=60, by=admin)
    world.wall += DAY
    assert registry.sessions.sweep() == 0
    assert registry.sessions.find("acme", made.name) is not None
    world.wall -= 30 * DAY
    world.ticks += 59.9
    assert registry.sessions.sweep() == 0
    assert registry.sessions.find("acme", made.name) is not None
    world.ticks += 0.1
    assert registry.sessions.find("acme", made.name) is None  # on time, swept or not
    assert registry.sessions.all("acme") == []
    assert registry.sessions.sweep() == 1
    assert registry.sessions.sweep() == 0
    assert kinds(registry) == ["session.start", "session.end"]
    (ended,) = registry.audit.read(kinds=["session.end"])
    assert ended.tenant == "acme"
    assert ended.body == {
        "session": made.id,
        "delta": delta(1).hash,
        "why": "expired",
        "by": "system",
    }
    assert registry.audit.verify() > 0


def test_a_process_that_starts_anew_goes_on_with_the_same_count(world):
    registry, admin = peopled(world)
    made = registry.sessions.start("acme", delta(1), ttl_s=60, by=admin)
    registry.close()
    world.ticks += 50
    world.wall -= DAY  # set while nobody ran
    again = world.registry()
    assert again.sessions.find("acme", made.name).delta == delta(1).hash
    assert again.load(delta(1).hash).hash == delta(1).hash
    world.ticks += 10
    assert again.sessions.find("acme", made.name) is None
    again.close()
    late = world.registry()
    assert late.sessions.find("acme", made.name) is None
    assert late.sessions.sweep() == 1
    assert kinds(late) == ["session.start", "session.end"]


@pytest.mark.parametrize(("passed", "left"), [(10.0, 50.0), (60.0, 0.0), (DAY, 0.0), (-DAY, 60.0)])
def test_after_a_new_start_of_the_machine_the_time_of_day_counts(world, passed, left):
    registry, admin = peopled(world)
    made = registry.sessions.start("acme", delta(1), ttl_s=60, by=admin)
    registry.close()
    world.restart()
    world.wall += passed
    again = world.registry()
    for turn in range(4):  # looking again prolongs nothing
        again.create_tenant(f"t{turn}", by=admin)
        again.refresh()
        assert (again.sessions.find("acme", made.name) is not None) == (left > 0)
        world.ticks += left / 4
    assert again.sessions.find("acme", made.name) is None


def test_processes_see_each_others_sessions_and_end_each_once(world):
    one, admin = peopled(world)
    two = world.registry()
    other = world.registry(boot="another-machine")
    made = one.sessions.start("acme", delta(1), ttl_s=60, by=admin)
    brief = one.sessions.start("acme", delta(2), ttl_s=10, by=admin)
    for registry in (two, other):
        assert registry.sessions.find("acme", made.name) is None
        registry.refresh()
        assert registry.sessions.find("acme", made.name) is not None
        assert [s.id for s in registry.sessions.all("acme")] == [brief.id, made.id]
    two.sessions.end("acme", made.id, by=admin)
    with pytest.raises(UnknownNameError, match="or it has ended"):
        two.sessions.end("acme", made.id, by=admin)
    one.refresh()
    other.refresh()
    assert one.sessions.find("acme", made.name) is None
    assert other.sessions.find("acme", made.name) is None
    world.wait(10)
    for registry in (one, two, other):
        assert registry.sessions.find("acme", brief.name) is None
        registry.sessions.sweep()
    assert kinds(one) == ["session.start"] * 2 + ["session.end"] * 2


def test_a_sessions_own_delta_is_not_the_tenants(world):
    registry, admin = peopled(world)
    freed = []
    registry.sessions.after_end = freed.append
    registry.create_tenant("full", by=admin, max_deltas=0)
    registry.sessions.start("full", delta(3), ttl_s=60, by=admin)
    own = registry.sessions.start("acme", delta(1), ttl_s=60, by=admin)
    assert registry.deltas("acme") == []
    with pytest.raises(UnknownNameError, match="has no delta"):
        registry.set_alias("acme", "m", own.delta, generation=0, by=admin)
    with pytest.raises(UnknownNameError, match="has no delta"):
        registry.sessions.start("acme", own.delta, ttl_s=60, by=admin)
    with pytest.raises(UnknownNameError, match="acme has no delta"):
        registry.load(own.delta, tenant="acme")
    # What it holds itself besides stays when the session goes.
    registry.put_delta("acme", delta(2), by=admin)
    over = registry.sessions.start("acme", delta(2).hash, ttl_s=60, by=admin)
    registry.sessions.end("acme", over.id, by=admin)
    assert freed == []
    registry.sessions.end("acme", own.id, by=admin)
    assert freed == [own.delta]
    assert [d.hash for d in registry.deltas("acme")] == [delta(2).hash]
    with pytest.raises(UnknownNameError):
        registry.sessions.start("globex", delta(2).hash, ttl_s=60, by=admin)


def test_the_log_keeps_what_it_needs_and_else_nothing_is_left(world):
    registry, admin = peopled(world)
    made = registry.sessions.start("acme", delta(1), ttl_s=60, by=admin)
    world.wait(3 * 3600.0)
    registry.sessions.sweep()
    assert registry.load(made.delta).hash == made.delta  # an answer can be computed again
    registry.sessions.keep = False
    registry.sessions.sweep()
    assert registry.load(made.delta).hash == made.delta  # others may not have noticed its end yet
    world.wait(3601.0)
    registry.sessions.sweep()
    with pytest.raises(UnknownNameError, match="has no delta"):
        registry.load(made.delta)
    assert kinds(registry) == ["session.start", "session.end"]


def test_a_tenant_has_so_many_sessions_at_a_time(world, monkeypatch):
    monkeypatch.setattr(sessions, "_MOST", 2)
    registry, admin = peopled(world)
    registry.sessions.start("acme", delta(1), ttl_s=50, by=admin)
    registry.sessions.start("acme", delta(2), ttl_s=40, by=admin)
    with pytest.raises(BusyError, match="acme has 2 sessions") as caught:
        registry.sessions.start("acme", delta(3), ttl_s=60, by=admin)
    assert caught.value.retry_after_s == pytest.approx(40)
    registry.sessions.start("globex", delta(3), ttl_s=60, by=admin)  # another's is no matter
    world.wait(40)
    registry.sessions.start("acme", delta(3), ttl_s=60, by=admin)
    assert len(registry.sessions.all("acme")) == 2


def test_nothing_is_left_of_a_session_that_could_not_begin(world):
    registry, admin = peopled(world)
    before = registry.audit.verify()
    broken = delta(1)
    broken.tensors["prompt"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        registry.sessions.start("acme", broken, ttl_s=60, by=admin)
    with pytest.raises(UnknownNameError, match="no tenant 'nobody'"):
        registry.sessions.start("nobody", delta(1), ttl_s=60, by=admin)
    with pytest.raises(InputError, match="content hash"):
        registry.sessions.start("acme", "sha", ttl_s=60, by=admin)
    assert registry.audit.verify() == before
    assert registry.sessions.all("acme") == []


def test_a_damaged_file_is_said_to_be(world, tmp_path):
    registry, admin = peopled(world)
    made = registry.sessions.start("acme", delta(1), ttl_s=60, by=admin)
    (stored,) = [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()]
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.chmod(0o600)
    stored.write_bytes(content)
    with pytest.raises(CheckpointError):
        registry.load(made.delta)


@pytest.mark.parametrize(
    "wrong", [0, 0.5, -1, 86_401, float("nan"), float("inf"), True, "60", None]
)
def test_a_length_that_is_none(wrong):
    with pytest.raises(InputError, match=r"ttl_s, how long a session lasts, is 1 to 86400 seconds"):
        session_length(wrong)


def test_the_machines_ticks_go_on():
    one, two = machine_ticks(), machine_ticks()
    assert one.now() <= two.now() <= one.now()
    assert one.boot == two.boot or len(one.boot) == 32  # of a machine without a name for its start


STEPS = st.lists(
    st.tuples(st.floats(0, 40), st.floats(-DAY, DAY), st.booleans()), min_size=1, max_size=8
)


@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_it_is_there_exactly_while_its_time_runs(tmp_path_factory, steps):
    """Whatever the clock is set to and however often the process starts anew."""
    place = tmp_path_factory.mktemp("law")
    world = World(f"sqlite:///{place}/r.db", str(place / "blobs"))
    registry, admin = peopled(world)
    begun = world.ticks
    made = registry.sessions.start("acme", delta(1), ttl_s=60, by=admin)
    for passed, jump, anew in steps:
        world.ticks += passed
        world.wall += passed + jump
        if anew:
            registry.close()
            registry = world.registry()
        registry.refresh()
        registry.sessions.sweep()
        there = registry.sessions.find("acme", made.name) is not None
        assert there == (world.ticks < begun + 60)
    assert len(kinds(registry)) == (1 if world.ticks < begun + 60 else 2)
    registry.close()

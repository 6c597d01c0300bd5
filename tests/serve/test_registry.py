"""The registry: by hand, by law against a model, two processes, faults, messages."""

from __future__ import annotations

import hashlib
import stat
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from tessera.arch import Delta
from tessera.errors import (
    AccessError,
    BusyError,
    CheckpointError,
    ConflictError,
    DeltaError,
    InputError,
    MissingDataError,
    TesseraError,
    UnknownNameError,
)
from tessera.serve import schema
from tessera.serve.blobs import Blobs
from tessera.serve.records import SYSTEM, Key
from tessera.serve.registry import Registry

BASE, OTHER_BASE = "ab" * 32, "cd" * 32


def prompt(value: float, *, base_hash: str = "", info: dict[str, object] | None = None) -> Delta:
    tensors = {"prompt": torch.full((2, 4), value)}
    return Delta(kind="prompt", tensors=tensors, base_hash=base_hash, info=info or {})


Opener = Callable[..., Registry]


@pytest.fixture
def opened(url: str, tmp_path: Path) -> Iterator[Opener]:
    """Each call is another process, as far as database and blobs can tell."""
    made: list[Registry] = []
    ticks = count(1000)

    def make(base_hash: str = BASE) -> Registry:
        blobs = Blobs(tmp_path / "blobs")
        made.append(Registry(url, blobs, base_hash=base_hash, clock=lambda: float(next(ticks))))
        return made[-1]

    yield make
    for registry in made:
        registry.close()


@pytest.fixture
def registry(opened: Opener) -> Registry:
    return opened()


@pytest.fixture
def admin(registry: Registry) -> Key:
    """The first admin; there are the tenants one and two."""
    secret = registry.first_admin_key(None)
    assert secret is not None
    key = registry.authenticate(secret)
    registry.create_tenant("one", by=key, max_deltas=3)
    registry.create_tenant("two", by=key)
    return key


def picture(registry: Registry) -> dict[str, object]:
    """All that is there, to compare."""
    with registry._ledger.read() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(sa.select(table))]
            for table in schema.metadata.sorted_tables
        }


# --- the way through -------------------------------------------------------------------------


def test_from_a_tenant_to_a_rollback(registry: Registry, admin: Key) -> None:
    key, secret = registry.create_key("one", ["infer", "manage"], by=admin)
    assert (key.tenant, key.scopes) == ("one", {"infer", "manage"})
    assert (
        registry.authenticate(secret)
        is registry.view().keys[hashlib.sha256(secret.encode()).digest()]
    )

    a = registry.put_delta("one", prompt(1.0), by=key)
    b = registry.put_delta("one", prompt(2.0, base_hash=BASE), by=key, parent=a.hash)
    assert a.hash == prompt(1.0).hash
    assert (a.tenant, a.kind, a.base_hash, a.parent) == ("one", "prompt", BASE, "")
    assert (b.parent, [d.hash for d in registry.deltas("one")]) == (a.hash, [a.hash, b.hash])
    assert registry.delta("one", b.hash).created_s == b.created_s
    loaded = registry.load(b.hash)
    assert (loaded.hash, loaded.base_hash, loaded.parameters()) == (b.hash, BASE, [])

    first = registry.set_alias("one", "mini", a.hash, generation=0, by=key, reason="start")
    second = registry.set_alias("one", "mini", b.hash, generation=1, by=key)
    assert (first.generation, second.generation, second.delta) == (1, 2, b.hash)
    assert registry.view().aliases["one", "mini"].generation == 2
    back = registry.rollback("one", "mini", by=key)
    assert (back.generation, back.delta, back.reason) == (3, a.hash, "rollback to generation 1")
    assert registry.alias("one", "mini").generation == 3
    assert [h.delta for h in registry.history("one", "mini")] == [a.hash, b.hash, a.hash]
    assert [h.reason for h in registry.history("one", "mini")][:2] == ["start", ""]
    base = registry.set_alias("one", "mini", "", generation=3, by=key)
    assert (base.delta, [x.name for x in registry.aliases("one")]) == ("", ["mini"])
    assert registry.aliases("two") == []

    kinds = [e.kind for e in registry.audit.read()]
    assert kinds == [
        *["key.created", "tenant.created", "tenant.created", "key.created"],
        *["delta.put", "delta.put", "alias.set", "alias.set", "alias.rolled_back", "alias.set"],
    ]
    event = next(registry.audit.read(kinds=["alias.rolled_back"]))
    assert event.tenant == "one"
    assert event.body == {
        "alias": "mini",
        "generation": 3,
        "delta": a.hash,
        "before": b.hash,
        "reason": "rollback to generation 1",
        "restored": 1,
        "by": key.id,
    }
    assert registry.audit.verify() == 10
    assert registry.view().revision == 10


def test_a_rollback_goes_one_further_back_each_time(registry: Registry, admin: Key) -> None:
    a, b, c = (registry.put_delta("one", prompt(v), by=admin).hash for v in (1.0, 2.0, 3.0))
    for generation, delta in enumerate([a, b, c]):
        registry.set_alias("one", "m", delta, generation=generation, by=admin)
    assert registry.rollback("one", "m", by=admin).delta == b
    with pytest.raises(ConflictError, match=r"at generation 4, .*3 was expected"):
        registry.rollback("one", "m", by=admin, generation=3)
    assert registry.rollback("one", "m", by=admin, generation=4).delta == a
    with pytest.raises(ConflictError, match="nothing before"):
        registry.rollback("one", "m", by=admin)
    # Forward again, from a: what was before is a, not what had been rolled back from.
    registry.set_alias("one", "m", c, generation=5, by=admin)
    assert registry.rollback("one", "m", by=admin).delta == a
    with pytest.raises(ConflictError, match="nothing before"):
        registry.rollback("one", "m", by=admin)
    assert [h.delta for h in registry.history("one", "m")] == [a, b, c, b, a, c, a]


def test_compare_and_swap(registry: Registry, admin: Key) -> None:
    with pytest.raises(ConflictError, match="no alias 'm' yet, and generation 1"):
        registry.set_alias("one", "m", "", generation=1, by=admin)
    registry.set_alias("one", "m", "", generation=0, by=admin, reason="first")
    with pytest.raises(ConflictError, match=r"generation 1, delta none \(first\); 0 was expected"):
        registry.set_alias("one", "m", "", generation=0, by=admin)
    assert registry.alias("one", "m").generation == 1


def test_of_many_swaps_of_one_generation_one_wins(
    opened: Opener, registry: Registry, admin: Key
) -> None:
    others = [registry, opened()]
    won, lost, failed = [], [], []

    def swap(who: int) -> None:
        for generation in range(10):
            try:
                won.append(
                    others[who % 2].set_alias(
                        "one", "m", "", generation=generation, by=admin, reason=str(who)
                    )
                )
            except ConflictError:
                lost.append(who)
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=swap, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(won) + len(lost) == 40
    history = registry.history("one", "m")
    assert sorted(a.generation for a in won) == [a.generation for a in history]
    assert {a.generation: a.reason for a in won} == {a.generation: a.reason for a in history}
    assert [a.generation for a in history] == list(range(1, len(history) + 1))
    for other in others:
        assert other.refresh().aliases["one", "m"].generation == len(history)
    assert registry.audit.verify() == 3 + len(history)


# --- deltas ----------------------------------------------------------------------------------


def test_the_same_content_again_is_the_same_record(registry: Registry, admin: Key) -> None:
    live = prompt(1.0).trainable()
    record = registry.put_delta("one", live, by=admin)
    before = picture(registry)
    again = registry.put_delta("one", prompt(1.0, info={"note": "other"}), by=admin)
    assert (again.created_s, picture(registry)) == (record.created_s, before)
    with torch.no_grad():
        live.tensors["prompt"].add_(1)  # what is kept is a snapshot
    assert torch.equal(registry.load(record.hash).tensors["prompt"], torch.ones(2, 4))
    # Of another tenant it is another record, with a file of its own.
    registry.put_delta("two", prompt(1.0, info={"note": "two's"}), by=admin)
    assert dict(registry.load(record.hash, tenant="two").info) == {"note": "two's"}
    assert dict(registry.load(record.hash, tenant="one").info) == {}


def test_a_lost_or_damaged_file_says_so_and_is_mended(
    registry: Registry, admin: Key, tmp_path: Path
) -> None:
    record = registry.put_delta("one", prompt(1.0), by=admin)
    (file,) = [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\x00")
    with pytest.raises(CheckpointError, match="is damaged"):
        registry.load(record.hash)
    file.unlink()
    with pytest.raises(MissingDataError, match="there is no blob"):
        registry.load(record.hash)
    assert registry.put_delta("one", prompt(1.0), by=admin).created_s == record.created_s
    assert file.read_bytes() == whole
    file.unlink()  # the same delta in another file
    mended = registry.put_delta("one", prompt(1.0, info={"note": 1}), by=admin)
    assert mended.created_s == record.created_s
    assert dict(registry.load(record.hash).info) == {"note": 1}
    assert [e.kind for e in registry.audit.read()][-2:] == ["delta.put", "delta.replaced"]


def test_a_record_that_leads_to_another_file_is_refused(registry: Registry, admin: Key) -> None:
    a, b = (registry.put_delta("one", prompt(v), by=admin).hash for v in (1.0, 2.0))
    d = schema.deltas
    with registry._ledger.write() as change:
        blob = change.connection.execute(sa.select(d.c.blob).where(d.c.hash == b)).scalar_one()
        change.connection.execute(sa.update(d).where(d.c.hash == a).values(blob=blob))
    with pytest.raises(CheckpointError, match=f"of the delta {b}, not {a}"):
        registry.load(a)


def test_what_a_tenant_may_not_hold(registry: Registry, admin: Key) -> None:
    before = picture(registry)
    for delta, message in [
        (prompt(1.0, base_hash=OTHER_BASE), f"made for the base {OTHER_BASE}"),
        (prompt(float("nan")), "'prompt' is not finite"),
    ]:
        with pytest.raises(DeltaError, match=message):
            registry.put_delta("one", delta, by=admin)
    with pytest.raises(UnknownNameError, match="one has no delta 0000"):
        registry.put_delta("one", prompt(1.0), by=admin, parent="0" * 64)
    assert picture(registry) == before
    for value in (1.0, 2.0, 3.0):
        registry.put_delta("one", prompt(value), by=admin)
    with pytest.raises(BusyError, match="one holds 3 deltas, and may hold no more") as caught:
        registry.put_delta("one", prompt(4.0), by=admin)
    assert caught.value.retry_after_s > 0
    registry.put_delta("one", prompt(3.0), by=admin)  # it holds that one
    registry.put_delta("two", prompt(4.0), by=admin)
    with pytest.raises(UnknownNameError, match="one has no delta"):
        registry.set_alias("one", "m", prompt(4.0).hash, generation=0, by=admin)


def test_another_base_keeps_tenants_and_keys_and_refuses_the_old_deltas(
    opened: Opener, registry: Registry, admin: Key
) -> None:
    old = registry.put_delta("one", prompt(1.0), by=admin).hash
    kept = registry.put_delta("one", prompt(2.0), by=admin).hash
    registry.set_alias("one", "m", old, generation=0, by=admin)
    later = opened(OTHER_BASE)
    assert later.view().aliases["one", "m"].delta == old
    for act in (
        lambda: later.load(old),
        lambda: later.set_alias("one", "n", old, generation=0, by=admin),
        lambda: later.put_delta("one", prompt(1.0, base_hash=BASE), by=admin),
    ):
        with pytest.raises(DeltaError, match=f"base {BASE}, and this server's is {OTHER_BASE}"):
            act()
    later.set_alias("one", "m", "", generation=1, by=admin)
    with pytest.raises(DeltaError, match="was made for the base"):
        later.rollback("one", "m", by=admin)
    # Said to fit the new one: the same record, from now on for that.
    assert later.put_delta("one", prompt(2.0), by=admin).base_hash == OTHER_BASE
    assert later.load(kept).base_hash == OTHER_BASE
    assert len(later.deltas("one")) == 2
    with pytest.raises(DeltaError):
        registry.load(kept)


# --- keys ------------------------------------------------------------------------------------


def test_secrets_are_kept_nowhere(registry: Registry, admin: Key, url: str, tmp_path: Path) -> None:
    key, secret = registry.create_key("one", ["infer"], by=admin)
    assert secret.startswith("tsr_")
    assert len(secret) == 47
    assert hashlib.sha256(secret.encode()).hexdigest() in str(picture(registry))
    assert secret[4:] not in str(picture(registry))
    assert secret[4:] not in str([e.body for e in registry.audit.read()])
    assert len({registry.create_key("one", ["infer"], by=admin)[1] for _ in range(20)}) == 20
    if url.startswith("sqlite"):
        for file in tmp_path.glob("registry.db*"):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert secret[4:].encode() not in file.read_bytes()
    assert key.id in [k.id for k in registry.keys("one")]
    assert [k.id for k in registry.keys(None)] == [admin.id]


def test_a_revoked_key_is_out_at_once_here_and_after_a_refresh_elsewhere(
    opened: Opener, registry: Registry, admin: Key
) -> None:
    other = opened()
    key, secret = registry.create_key("one", ["manage"], by=admin)
    with pytest.raises(AccessError, match="unknown or revoked"):
        other.authenticate(secret)
    other.refresh()
    assert other.authenticate(secret).id == key.id
    registry.revoke_key(key.id, by=admin)
    registry.revoke_key(key.id, by=admin)  # again is no harm
    with pytest.raises(AccessError, match="unknown or revoked"):
        registry.authenticate(secret)
    # The other process has not looked yet, but a change asks the database.
    with pytest.raises(AccessError, match=f"the key {key.id} is unknown or revoked"):
        other.put_delta("one", prompt(1.0), by=other.authenticate(secret))
    other.refresh()
    with pytest.raises(AccessError):
        other.authenticate(secret)
    assert registry.keys("one") == []
    assert len(list(registry.audit.read(kinds=["key.revoked"]))) == 1


def test_the_first_admin(opened: Opener) -> None:
    registry = opened()
    secret = registry.first_admin_key(None)
    assert secret is not None
    key = registry.authenticate(secret)
    assert (key.is_admin, key.tenant) == (True, None)
    assert registry.first_admin_key(None) is None
    with pytest.raises(ConflictError, match="last admin's key"):
        registry.revoke_key(key.id, by=key)
    spare, _ = registry.create_key(None, ["admin"], by=key)
    registry.revoke_key(key.id, by=spare)
    with pytest.raises(AccessError):
        registry.authenticate(secret)


def test_the_operators_own_admin_key_and_its_successor(opened: Opener) -> None:
    registry = opened()
    old, new = "an-operators-own-secret", "another-one-of-the-operators"
    assert registry.first_admin_key(old) is None
    assert registry.first_admin_key(old) is None
    assert registry.authenticate(old).is_admin
    assert registry.first_admin_key(None) is None
    made, _ = registry.create_key(None, ["admin"], by=registry.authenticate(old))
    registry.first_admin_key(new)
    assert registry.authenticate(new).is_admin
    with pytest.raises(AccessError):
        registry.authenticate(old)
    with pytest.raises(AccessError, match=r"which was revoked\. Choose a new one"):
        registry.first_admin_key(old)
    assert made.id in [k.id for k in registry.keys(None)]  # not one that was given
    registry.create_tenant("one", by=made)
    _, secret = registry.create_key("one", ["infer"], by=made)
    with pytest.raises(AccessError, match="is one of one"):
        registry.first_admin_key(secret)
    for bad in (
        "short",
        "x" * 257,
        "with blanks in it, long enough",
        "caf\u00e9" * 8,
        "a" * 30 + "\n",
    ):
        with pytest.raises(InputError, match="20 to 256 printable") as caught:
            registry.first_admin_key(bad)
        assert bad not in str(caught.value)
    assert registry.authenticate(new).is_admin


def test_a_secret_that_is_none(registry: Registry, admin: Key) -> None:
    for secret in ("", "tsr_", "tsr_" + "A" * 43, "x" * 10_000_000, "\ud800", admin.id):
        with pytest.raises(AccessError, match="Authorization: Bearer"):
            registry.authenticate(secret)


def test_who_may_what(registry: Registry, admin: Key) -> None:
    manage, _ = registry.create_key("one", ["manage"], by=admin)
    infer, _ = registry.create_key("one", ["infer"], by=admin)
    foreign, _ = registry.create_key("two", ["manage", "infer"], by=admin)
    forged = Key(id="forged", tenant=None, scopes=frozenset({"admin"}))
    spare, _ = registry.create_key(None, ["admin"], by=admin)
    registry.set_alias("one", "m", "", generation=0, by=admin)
    acts: dict[str, Callable[[Key], object]] = {
        "put": lambda by: registry.put_delta("one", prompt(1.0), by=by),
        "set": lambda by: registry.set_alias("one", "m", "", generation=1, by=by),
        "rollback": lambda by: registry.rollback("one", "m", by=by),
        "key": lambda by: registry.create_key("one", ["infer"], by=by),
        "revoke": lambda by: registry.revoke_key(infer.id, by=by),
        "tenant": lambda by: registry.create_tenant("three", by=by),
        "admin": lambda by: registry.create_key(None, ["admin"], by=by),
        "revoke admin": lambda by: registry.revoke_key(spare.id, by=by),
    }
    before = picture(registry)
    expected: dict[str, tuple[type[TesseraError] | None, ...]] = {
        # by a key of one that only infers, by one of two, by a forged admin's
        "put": (AccessError, UnknownNameError, AccessError),
        "set": (AccessError, UnknownNameError, AccessError),
        "rollback": (AccessError, UnknownNameError, AccessError),
        "key": (AccessError, UnknownNameError, AccessError),
        "revoke": (AccessError, UnknownNameError, AccessError),
        "tenant": (AccessError, AccessError, AccessError),
        "admin": (AccessError, AccessError, AccessError),
        "revoke admin": (UnknownNameError, UnknownNameError, AccessError),
    }
    for name, errors in expected.items():
        for key, error in zip((infer, foreign, forged), errors, strict=True):
            with pytest.raises(error):
                acts[name](key)
    assert picture(registry) == before
    for name in ("tenant", "admin"):
        with pytest.raises(AccessError, match="needs an admin's key"):
            acts[name](manage)
    with pytest.raises(UnknownNameError):
        acts["revoke admin"](manage)
    for name in ("put", "set", "key", "revoke"):
        acts[name](manage)
    for name in ("tenant", "admin", "revoke admin"):
        acts[name](admin)
    registry.create_tenant("four", by=SYSTEM)


def test_another_tenants_names_are_as_if_they_were_not(registry: Registry, admin: Key) -> None:
    foreign, _ = registry.create_key("two", ["manage"], by=admin)
    key, _ = registry.create_key("one", ["infer"], by=admin)
    messages = set()
    for tenant in ("one", "none"):
        with pytest.raises(UnknownNameError) as caught:
            registry.set_alias(tenant, "m", "", generation=0, by=foreign)
        messages.add(str(caught.value).replace(tenant, "X"))
    for id in (key.id, admin.id, "none"):
        with pytest.raises(UnknownNameError) as caught:
            registry.revoke_key(id, by=foreign)
        messages.add(str(caught.value).replace(id, "X"))
    assert messages == {"there is no tenant 'X'", "there is no key 'X'"}


def test_scopes_that_no_key_has(registry: Registry, admin: Key) -> None:
    for tenant, scopes in [
        (None, ["infer"]),
        (None, []),
        ("one", []),
        ("one", ["admin"]),
        ("one", ["infer", "root"]),
        ("one", "infer"),
        ("one", [1]),
    ]:
        with pytest.raises(InputError, match="scopes"):
            registry.create_key(tenant, scopes, by=admin)


def test_keys_and_aliases_have_a_bound(
    registry: Registry, admin: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.serve.tenancy._MOST_KEYS", 2)
    monkeypatch.setattr("tessera.serve.pointers._MOST_ALIASES", 2)
    key, _ = registry.create_key("one", ["infer"], by=admin)
    registry.create_key("one", ["infer"], by=admin)
    with pytest.raises(BusyError, match="one has 2 keys"):
        registry.create_key("one", ["infer"], by=admin)
    registry.revoke_key(key.id, by=admin)
    registry.create_key("one", ["infer"], by=admin)
    for name in ("a", "b"):
        registry.set_alias("one", name, "", generation=0, by=admin)
    with pytest.raises(BusyError, match="one has 2 aliases"):
        registry.set_alias("one", "c", "", generation=0, by=admin)
    registry.set_alias("one", "b", "", generation=1, by=admin)


# --- names -----------------------------------------------------------------------------------

BAD = ["", ".", "..", "a/b", "../a", "a\\b", "a\n", "a\0", "-a", "caf\u00e9", "a b", "%2e", "a:b"]


def test_names_that_no_tenant_has(registry: Registry, admin: Key) -> None:
    for name in (*BAD, "a" * 64, "A", "a_b", "a.b", None, 7):
        for act in (
            lambda name=name: registry.create_tenant(name, by=admin),
            lambda name=name: registry.tenant(name),
            lambda name=name: registry.deltas(name),
            lambda name=name: registry.keys(name or "."),
            lambda name=name: registry.put_delta(name, prompt(1.0), by=admin),
            lambda name=name: registry.set_alias(name, "m", "", generation=0, by=admin),
        ):
            with pytest.raises(InputError, match="a tenant's name is 1 to 63"):
                act()


def test_names_that_no_alias_has(registry: Registry, admin: Key) -> None:
    for name in (*BAD, ".hidden", "a" * 129, None, 7):
        for act in (
            lambda name=name: registry.set_alias("one", name, "", generation=0, by=admin),
            lambda name=name: registry.alias("one", name),
            lambda name=name: registry.history("one", name),
            lambda name=name: registry.rollback("one", name, by=admin),
        ):
            with pytest.raises(InputError, match="an alias's name is 1 to 128"):
                act()


def test_what_else_is_refused(registry: Registry, admin: Key) -> None:
    for generation in (-1, True, 1.0, "0", None):
        with pytest.raises(InputError, match="generation="):
            registry.set_alias("one", "m", "", generation=generation, by=admin)
    for reason in ("a\nb", "\ud800", "a\0", "x" * 501, None):
        with pytest.raises(InputError, match="a reason is one line"):
            registry.set_alias("one", "m", "", generation=0, by=admin, reason=reason)
    for hash in ("../x", "0" * 63, None):
        with pytest.raises(InputError, match="content hash is 64"):
            registry.set_alias("one", "m", hash, generation=0, by=admin)
        with pytest.raises(InputError, match="content hash is 64"):
            registry.load(hash)
    for most in (-1, True, 1.5, 10**10):
        with pytest.raises(InputError, match="max_deltas"):
            registry.create_tenant("three", by=admin, max_deltas=most)
    with pytest.raises(ConflictError, match="there is a tenant 'one' already"):
        registry.create_tenant("one", by=admin)
    for act in (
        lambda: registry.tenant("none"),
        lambda: registry.deltas("none"),
        lambda: registry.keys("none"),
        lambda: registry.aliases("none"),
        lambda: registry.alias("one", "none"),
        lambda: registry.history("one", "none"),
        lambda: registry.rollback("one", "none", by=admin),
        lambda: registry.delta("one", "0" * 64),
        lambda: registry.load("0" * 64),
        lambda: registry.revoke_key("none", by=admin),
        lambda: registry.revoke_key("\0", by=admin),
    ):
        with pytest.raises(UnknownNameError):
            act()
    assert [t.name for t in registry.tenants()] == ["one", "two"]
    assert registry.tenant("one").max_deltas == 3

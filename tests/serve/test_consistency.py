"""A row that somebody changed past the log is found, whichever table it is in."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch

from tessera.arch import Delta
from tessera.serve import learning_schema, rollout_schema, schema
from tessera.serve.blobs import Blobs
from tessera.serve.consistency import differences
from tessera.serve.database import Database
from tessera.serve.delta_files import DeltaFile, delta_files, problem_of
from tessera.serve.feedback import Said
from tessera.serve.gates import Policy
from tessera.serve.learning_values import LearningPolicy
from tessera.serve.records import Key
from tessera.serve.registry import Registry
from tessera.serve.rollout_values import Watch

SECRET = "an-admin-key-for-the-tests-only"


def prompt(value: float) -> Delta:
    return Delta(kind="prompt", tensors={"prompt": torch.full((1, 4), value)})


@dataclass
class Past:
    """A registry that was closed, in which everything has happened."""

    url: str
    blobs: Blobs
    deltas: list[str]


def gate(registry: Registry, by: Key, candidate: str, right: int, watch: Watch | None) -> Any:
    alias, look = registry.rollouts.gates.prepare("acme", "m", candidate, by=by)
    evidence = {
        "version": 1, "tenant": "acme", "alias": "m", "generation": alias.generation,
        "incumbent": alias.delta, "candidate": candidate, "look": look, "paired": True,
        "policy": Policy(min_n=20).json(),
        "examples": [[f"{i}", {}, 0, right] for i in range(40)],
    }  # fmt: skip
    return registry.rollouts.gates.record(evidence, watch=watch, by=by)


def live(registry: Registry, by: Key) -> list[str]:
    """Everything that leaves a row; the deltas' hashes."""
    for name in ("acme", "globex"):
        registry.create_tenant(name, by=by, max_deltas=9)
    registry.create_key("acme", {"infer", "manage"}, by=by)
    revoked, _ = registry.create_key("acme", {"infer"}, by=by)
    registry.revoke_key(revoked.id, by=by)
    hashes = [registry.put_delta("acme", prompt(v), by=by).hash for v in (1.0, 2.0, 3.0)]
    registry.put_delta("globex", prompt(1.0), by=by)
    for generation, hash in enumerate(hashes[:2]):
        registry.set_alias("acme", "m", hash, generation=generation, by=by, reason="better")
    registry.rollback("acme", "m", by=by)
    registry.sessions.start("acme", prompt(9.0), ttl_s=60, by=by)
    over = registry.sessions.start("acme", hashes[0], ttl_s=60, by=by)
    registry.sessions.end("acme", over.id, by=by)
    experiments = registry.rollouts.experiments
    experiments.start("acme", "m", hashes[1], share=0.1, by=by)
    experiments.start("acme", "m", hashes[1], share=0.25, by=by)
    registry.set_alias("globex", "m", "", generation=0, by=by)
    experiments.start("globex", "m", prompt(1.0).hash, share=0.5, by=by)
    experiments.end("globex", "m", by=by)
    for i in range(3):
        told = {"request": f"r{i}", "alias": "m", "generation": 3, "delta": hashes[0]}
        answer = registry.audit.append("request", "acme", told)
        said = Said.parse({"request": f"r{i}", "correct": i > 0})
        registry.rollouts.journal.add("acme", said, said.outcomes(), answer, by=by)
    gate(registry, by, hashes[2], 0, None)
    passed = gate(registry, by, hashes[1], 1, Watch(min_n=8))
    registry.rollouts.gates.promote(passed, by=by)
    for alias in ("m", "n"):
        registry.set_alias("globex", alias, "", generation=int(alias == "m"), by=by)
        registry.learning.set(LearningPolicy(tenant="globex", alias=alias), by=by)
    registry.learning.end("globex", "n", by=by)
    registry.learning.budgets.set("acme", ms=50.0, joules=None, window_s=60.0, by=by)
    return hashes


@pytest.fixture
def past(url: str, tmp_path: Path) -> Past:
    blobs = Blobs(tmp_path / "blobs")
    registry = Registry(url, blobs, base_hash="")
    by = registry.authenticate(registry.first_admin_key(None) or "")
    hashes = live(registry, by)
    registry.close()
    return Past(url, blobs, hashes)


T, F, R, L = schema, "f" * 64, rollout_schema, learning_schema
# What is changed -> the table, which row (None: it is gone), to what, and what is said of it.
CHANGES: dict[str, tuple[sa.Table, Any, dict[str, Any] | None, str]] = {
    "a quota": (T.tenants, T.tenants.c.name == "acme", {"max_deltas": 10**9}, "max_deltas"),
    "a key's secret": (T.keys, T.keys.c.scopes == "infer manage", {"digest": F}, "has check"),
    "a key's scopes": (T.keys, T.keys.c.tenant.is_(None), {"scopes": "infer"}, "scopes 'infer'"),
    "a key put in force again": (
        T.keys, T.keys.c.revoked_s.isnot(None), {"revoked_s": None}, "has revoked_s None",
    ),
    "whose a key is": (T.keys, T.keys.c.scopes == "infer", {"tenant": "globex"}, "tenant 'globex'"),
    "a delta's file": (T.deltas, T.deltas.c.tenant == "globex", {"blob": F}, "has blob"),
    "a delta's parent": (T.deltas, T.deltas.c.tenant == "globex", {"parent": F}, "has parent"),
    "a delta that is gone": (T.deltas, T.deltas.c.tenant == "globex", None, "is gone"),
    "an alias": (
        T.aliases, sa.and_(T.aliases.c.tenant == "acme", T.aliases.c.name == "m"), {"delta": F},
        "the alias m of acme has delta 'ffff",
    ),
    "an alias's generation": (
        T.aliases, T.aliases.c.tenant == "acme", {"generation": 9}, "generation 9, the log says 4",
    ),
    "why an alias moved": (
        T.alias_history, T.alias_history.c.generation == 2, {"reason": "x"}, "generation 2 of the",
    ),
    "when an alias moved": (
        T.alias_history, T.alias_history.c.restored != 0, {"changed_s": 5.0}, "has changed_s 5.0",
    ),
    "a session's end": (
        T.sessions, T.sessions.c.blob != "", {"ends_s": 1e12}, "has ends_s 1000000000000.0",
    ),
    "a session that goes on": (
        T.sessions, T.sessions.c.blob == "", {"ended_s": None}, "has ended_s None",
    ),
    "a session that is gone": (T.sessions, T.sessions.c.blob != "", None, "is gone"),
    "an experiment's share": (
        R.experiments, R.experiments.c.tenant == "acme", {"share": 9000}, "has share 9000",
    ),
    "an experiment begun again": (
        R.experiments, R.experiments.c.tenant == "globex", {"ended_s": None}, "has ended_s None",
    ),
    "feedback": (R.feedback, R.feedback.c.request == "r0", {"outcomes": "1"}, "outcomes '1', the"),
    "feedback that is gone": (R.feedback, R.feedback.c.request == "r1", None, "on r1 of acme is"),
    "feedback's place": (R.feedback, R.feedback.c.request == "r2", {"seq": 1}, "is not in the log"),
    "where an answer is": (
        R.answers, R.answers.c.request == "r1", {"request": "r9"}, "request 'r9', the log says",
    ),
    "an answer that is gone": (R.answers, R.answers.c.request == "r2", None, "to r2 of acme is go"),
    "a gate's decision": (
        R.gates, R.gates.c.passed == 0, {"decision": '{"passed":true}'}, "has decision",
    ),
    "a gate": (R.gates, R.gates.c.passed == 0, {"passed": 1}, "has passed 1, the log says 0"),
    "a watch": (R.watches, R.watches.c.alias == "m", {"margin": 0.9}, "has margin 0.9"),
    "a policy": (L.learning, L.learning.c.alias == "m", {"policy": "{}"}, "has policy '{}'"),
    "a policy that is gone": (L.learning, L.learning.c.alias == "m", None, "is gone"),
    "a budget": (L.budgets, L.budgets.c.tenant == "acme", {"cap_ms": 1e9}, "has cap_ms 1000000000"),
    "a step of learning": (L.steps, L.steps.c.alias == "m", {"alias": "x"}, "alias 'x', the log"),
}  # fmt: skip


def test_a_registry_that_nobody_touched_is_what_its_log_says(past: Past) -> None:
    database = Database(past.url)
    assert list(differences(database)) == []
    database.close()


def put_back(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    """Rows refer to each other, so that a table cannot be emptied and filled."""

    def at(row: Any) -> Any:
        return sa.and_(*(c == row[c.name] for c in table.primary_key))

    for row in connection.execute(sa.select(table)).mappings().all():
        if not any(all(row[c.name] == r[c.name] for c in table.primary_key) for r in rows):
            connection.execute(sa.delete(table).where(at(row)))
    for row in rows:
        if not connection.execute(sa.update(table).where(at(row)).values(row)).rowcount:
            connection.execute(sa.insert(table).values(row))


def test_each_row_that_was_changed_is_found(past: Past) -> None:
    database = Database(past.url)
    for what, (table, where, values, said) in CHANGES.items():
        with database.write() as change:
            rows = [dict(r._mapping) for r in change.connection.execute(sa.select(table))]
            spoil = sa.delete(table) if values is None else sa.update(table).values(values)
            assert change.connection.execute(spoil.where(where)).rowcount >= 1, what
        found = list(differences(database))
        assert found, what
        assert any(said in line for line in found), (what, found)
        with database.write() as change:
            put_back(change.connection, table, rows)
    assert list(differences(database)) == []
    database.close()


def test_a_row_that_the_log_does_not_know_is_found(past: Past) -> None:
    database = Database(past.url)
    with database.write() as change:
        row = change.connection.execute(sa.select(schema.keys)).first()
        assert row is not None
        forged = {**row._mapping, "id": "mine", "digest": F}
        change.connection.execute(sa.insert(schema.keys).values(forged))
        held = {"tenant": "globex", "hash": past.deltas[1], "blob": F, "kind": "lora"}
        held |= {"base_hash": "", "bytes": 1, "created_s": 0.0, "parent": ""}
        change.connection.execute(sa.insert(schema.deltas).values(held))
    assert list(differences(database)) == [
        "the key mine is not in the log",
        f"the delta {past.deltas[1]} of globex is not in the log",
    ]
    database.close()


def test_it_is_a_picture_of_one_moment_while_others_write(past: Past) -> None:
    registry, database = Registry(past.url, past.blobs, base_hash=""), Database(past.url)
    by = registry.authenticate(registry.first_admin_key(SECRET) or SECRET)

    def write() -> None:
        for i in range(40):
            told = {"request": f"w{i}", "alias": "w", "generation": i, "delta": ""}
            answer = registry.audit.append("request", "acme", told)
            said = Said.parse({"request": f"w{i}", "correct": True})
            registry.rollouts.journal.add("acme", said, "1", answer, by=by)
            registry.set_alias("acme", "w", "", generation=i, by=by)

    writer, looks = threading.Thread(target=write), 0
    writer.start()
    while writer.is_alive() or not looks:
        assert list(differences(database)) == []
        looks += 1
    writer.join()
    assert registry.alias("acme", "w").generation == 40
    registry.close()
    database.close()


def test_sessions_that_were_cleared_away_are_no_difference(past: Past) -> None:
    database = Database(past.url)
    t = schema.sessions
    with database.write() as change:
        change.connection.execute(sa.delete(t).where(t.c.ended_s.isnot(None)))
    assert list(differences(database)) == []
    database.close()


def test_each_file_of_a_delta_is_looked_at(past: Past) -> None:
    database = Database(past.url)
    files = delta_files(database)
    assert [f.what.split(" of ")[-1] for f in files] == ["acme"] * 3 + ["globex", "acme"]
    assert [f.hash for f in files[:3]] == past.deltas
    assert len(delta_files(database, "globex")) == 1
    assert [problem_of(f, past.blobs) for f in files] == [""] * 5
    for file, spoil, said in (
        (files[1], lambda p: p.write_bytes(p.read_bytes()[:-1] + b"x"), "is damaged"),
        (files[-1], Path.unlink, "there is no blob"),
    ):
        place = Path(past.blobs.place) / "sha256" / file.blob[:2] / file.blob
        place.chmod(0o600)
        spoil(place)
        assert problem_of(file, past.blobs).startswith(file.what)
        assert said in problem_of(file, past.blobs)
    other = DeltaFile(what="a delta", hash=F, blob=files[0].blob)
    assert problem_of(other, past.blobs)
    database.close()

"""The doctor says what is there, and how to mend what is not."""

from __future__ import annotations

import re
import shutil
import sqlite3

import pytest

from tessera.cli import main
from tessera.cli.doctor import findings

pytest.importorskip("sqlalchemy", reason="the extra serve is not installed")
from tessera.serve.blobs import Blobs
from tessera.serve.records import SYSTEM
from tessera.serve.registry import Registry


def test_this_machine_is_well(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "ok      torch" in said
    assert "BROKEN" not in said


def test_what_is_missing_has_its_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = {f.what: f for f in findings()}
    assert found["extra faiss"].state == "none"
    assert "pip install 'tessera-lifelong[faiss]'" in found["extra faiss"].detail
    assert found["compiler"].detail.endswith("apt-get install gcc")


def test_a_torch_that_is_too_old_is_broken(monkeypatch, capsys):
    monkeypatch.setattr("torch.__version__", "2.4.1")
    assert main(["doctor"]) == 1
    assert "BROKEN  torch                  2.4.1; pip install 'torch>=2.13,<3'" in (
        capsys.readouterr().out
    )


def words(tmp_path) -> list[str]:
    return ["doctor", "--db", f"sqlite:///{tmp_path}/r.db", "--blobs", str(tmp_path / "blobs")]


def report(capsys) -> dict[str, tuple[str, str]]:
    """What was looked at -> (state, detail)."""
    lines = [line for line in capsys.readouterr().out.splitlines() if "  " in line]
    return {line[8:30].strip(): (line[:8].strip(), line[31:]) for line in lines}


@pytest.fixture
def served(tmp_path) -> Registry:
    """The registry of a server that was started once, closed."""
    found = Registry(f"sqlite:///{tmp_path}/r.db", Blobs(tmp_path / "blobs"), base_hash="")
    found.first_admin_key("an-admin-key-for-the-tests-only")
    found.create_tenant("acme", by=SYSTEM)
    found.close()
    return found


def test_a_servers_things(served, tmp_path, capsys):
    assert main(words(tmp_path)) == 0
    said = report(capsys)
    assert said["database"] == ("ok", "can be read and written")
    assert said["audit log"][0] == "ok"
    assert re.search("2 events, whole; .* 2 [0-9a-f]{64}$", said["audit log"][1])
    assert said["tables"] == ("ok", "what the audit log says")
    assert said["clock"] == ("ok", "no event lies in the future")
    assert said["keys"] == ("ok", "1 of admins, 0 of tenants in force")
    assert said["blobs"][0] == "ok"
    assert "GiB free" in said["database's disk"][1]
    assert "GiB free" in said["blobs' disk"][1]
    assert not any((tmp_path / "blobs").rglob("[0-9a-f]" * 64))  # what it wrote is gone


def test_where_there_is_no_database_none_is_made(tmp_path, capsys):
    assert main(words(tmp_path)) == 0
    assert report(capsys)["database"][0] == "none"
    assert not (tmp_path / "r.db").exists()


def test_a_file_that_is_no_database(tmp_path, capsys):
    (tmp_path / "r.db").write_bytes(b"this is no database" * 100)
    assert main(words(tmp_path)) == 1
    assert report(capsys)["database"][0] == "BROKEN"


def test_tables_of_another_version_are_named_and_left_alone(served, tmp_path, capsys):
    with sqlite3.connect(tmp_path / "r.db") as file:
        for step, mend in (("0001", "make a backup"), ("9999", "pip install -U")):
            file.execute("UPDATE alembic_version SET version_num = ?", (step,))
            file.commit()
            assert main(words(tmp_path)) == 1
            state, detail = report(capsys)["database"]
            assert state == "BROKEN"
            assert step in detail
            assert mend in detail
            assert file.execute("SELECT version_num FROM alembic_version").fetchone() == (step,)


def test_each_fault_has_its_line(served, tmp_path, capsys, monkeypatch):
    with sqlite3.connect(tmp_path / "r.db") as file:
        file.execute("UPDATE keys SET revoked_s = 1")
        file.execute("UPDATE audit SET time_s = time_s + 3600 WHERE seq = 2")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=5 << 20))
    assert main(words(tmp_path)) == 1
    said = report(capsys)
    assert said["database"][0] == "ok"
    assert said["tables"] == ("none", "not compared with a log that is not whole")
    for what, mend in {
        "audit log": "broken at event 2",
        "clock": "set-ntp true",
        "keys": "TESSERA_ADMIN_KEY",
        "database's disk": "5 MiB free",
        "blobs' disk": "5 MiB free",
    }.items():
        assert said[what][0] == "BROKEN"
        assert mend in said[what][1]


def test_a_row_that_was_changed_is_named(served, tmp_path, capsys):
    statements = ["UPDATE tenants SET max_deltas = 7", "UPDATE keys SET revoked_s = 1"]
    for at, statement in enumerate(statements):
        with sqlite3.connect(tmp_path / "r.db") as file:
            file.execute(statement)
        file.close()
        assert main(words(tmp_path)) == 1
        state, detail = report(capsys)["tables"]
        assert state == "BROKEN"
        assert "the tenant acme has max_deltas 7, the log says 1000 (event 2)" in detail
        assert ("the first of 2 differences" in detail) == (at == 1)
        assert "tessera replay" in detail
    # What refers to blobs cannot be relied on.
    assert main([*words(tmp_path), "--sweep"]) == 1
    assert "not before these are well: tables" in report(capsys)["sweep"][1]


def test_a_database_that_others_may_read_is_broken(served, tmp_path, capsys):
    (tmp_path / "r.db").chmod(0o644)
    assert main(words(tmp_path)) == 1
    assert report(capsys)["keys"][1].endswith(f"chmod 600 {tmp_path}/r.db")


def test_many_admins_are_said_to_be_many(served, tmp_path, capsys):
    registry = Registry(f"sqlite:///{tmp_path}/r.db", Blobs(tmp_path / "blobs"), base_hash="")
    for _ in range(5):
        registry.create_key(None, ["admin"], by=SYSTEM)
    registry.close()
    assert main(words(tmp_path)) == 0
    state, detail = report(capsys)["keys"]
    assert state == "none"
    assert detail.startswith("6 of admins")
    assert "/v1/keys" in detail


def test_a_store_that_writes_over_is_broken(tmp_path, capsys, monkeypatch):
    def careless(self, key, data, *, replace):
        path = tmp_path / "blobs" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return True

    monkeypatch.setattr("tessera.serve.stores.Folder.write", careless)
    assert main(["doctor", "--blobs", str(tmp_path / "blobs")]) == 1
    assert "If-None-Match" in report(capsys)["blobs"][1]


def test_a_database_that_is_away(capsys):
    assert main(["doctor", "--db", "postgresql://u:secret@127.0.0.1:1/x"]) == 1
    state, detail = report(capsys)["database"]
    assert state == "BROKEN"
    assert "Is its server running" in detail
    assert "secret" not in detail

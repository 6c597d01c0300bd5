"""The doctor says what is there, and how to mend what is not."""

from __future__ import annotations

import pytest

from tessera.cli import main
from tessera.cli.doctor import findings


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


def test_a_servers_things(tmp_path, capsys):
    pytest.importorskip("sqlalchemy", reason="the extra serve is not installed")
    words = ["doctor", "--db", f"sqlite:///{tmp_path}/r.db", "--blobs", str(tmp_path / "blobs")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "0 tenants; 0 events, whole" in said
    (tmp_path / "r.db").write_bytes(b"this is no database" * 100)
    assert main(words) == 1
    assert "BROKEN  database" in capsys.readouterr().out

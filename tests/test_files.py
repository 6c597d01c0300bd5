"""`write_whole`: the old file or the new one, never a part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from tessera.errors import StorageError
from tessera.files import write_whole


def test_bytes_and_functions_are_written_and_parents_made(tmp_path: Path) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(b"....tail")
        file.seek(0)
        file.write(b"head")

    write_whole(tmp_path / "a" / "b" / "one", b"bytes")
    write_whole(tmp_path / "a" / "b" / "two", fill)
    assert (tmp_path / "a" / "b" / "one").read_bytes() == b"bytes"
    assert (tmp_path / "a" / "b" / "two").read_bytes() == b"headtail"


def test_a_link_is_followed_and_the_mode_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert real.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("where", ["fill", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    if where != "fill":
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(StorageError, match=r"f: No space left on device.*unchanged\. Eat less"):
        write_whole(path, fail if where == "fill" else b"new", advice="Eat less")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_full_disk_is_an_error_that_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    code = f"""
import resource, signal
from tessera.errors import StorageError
from tessera.files import write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole({str(path)!r}, bytes(10_000))
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_what_a_killed_process_left_is_swept_and_the_living_spared(tmp_path: Path) -> None:
    write_whole(tmp_path / "f", b"1")
    made: list[str] = []

    def look(file: BinaryIO) -> None:
        made.append(os.path.basename(file.name))
        file.write(b"2")

    write_whole(tmp_path / "f", look)
    prefix = made[0][: made[0].rindex("-") + 1]
    old, young = tmp_path / f"{prefix}dead.tmp", tmp_path / f"{prefix}alive.tmp"
    for leftover in (old, young):
        leftover.write_bytes(b"?")
    os.utime(old, (0, 0))
    write_whole(tmp_path / "f", b"3")
    assert sorted(os.listdir(tmp_path)) == sorted(["f", young.name])

"""Sweeping: nothing that is needed goes, whatever happens beside it, and a kill does no harm."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from tessera.arch import Delta
from tessera.cli import main
from tessera.errors import InputError, StorageError
from tessera.serve import schema
from tessera.serve.blobs import Blobs
from tessera.serve.database import Database
from tessera.serve.records import SYSTEM
from tessera.serve.registry import Registry
from tessera.serve.sweep import Swept, sweep

HOUR, DAY = 3600.0, 86_400.0


def delta(number: int) -> Delta:
    return Delta(kind="prompt", tensors={"prompt": torch.full((2, 4), float(number))})


def after(days: float) -> Callable[[], float]:
    """The clock of so many days from now."""
    then = time.time() + days * DAY
    return lambda: then


class Place:
    """A registry, its blobs, and days that pass at will."""

    def __init__(self, url: str, blobs: str) -> None:
        self.url, self.blobs = url, Blobs(blobs)
        self.registry = Registry(url, self.blobs, base_hash="")
        self.registry.create_tenant("one", by=SYSTEM, max_deltas=10**6)

    def sweep(self, days: float, *, dry: bool = False, grace_s: float = DAY) -> Swept:
        """As if it were so many days later than now."""
        database = Database(self.url)
        try:
            return sweep(database, self.blobs, grace_s=grace_s, dry=dry, clock=after(days))
        finally:
            database.close()

    def where(self) -> dict[str, bool]:
        return {one.name: one.aside for one in self.blobs.stored()}


@pytest.fixture
def place(url: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """SQLite with a folder, and PostgreSQL with S3."""
    where = str(tmp_path / "blobs")
    if url.startswith("postgresql"):
        where = f"s3://{request.getfixturevalue('s3').BUCKET}/{tmp_path.name}"
    made = Place(url, where)
    yield made
    made.registry.close()


def test_what_nothing_refers_to_goes_in_two_steps(place: Place) -> None:
    kept = place.registry.put_delta("one", delta(1), by=SYSTEM)
    with place.registry._ledger.read() as connection:
        file = connection.execute(sa.select(schema.deltas.c.blob)).scalar_one()
    logged = place.blobs.put(b"inputs of a request")
    place.registry.audit.append("request", "one", {"deep": [{"blob": logged}]})
    inside = place.blobs.put(b"its hash is a part of a longer word")
    place.registry.audit.append("note", None, {"word": f"0{inside}"})
    nobodys = place.blobs.put(b"nobody's")
    every = {file, logged, inside, nobodys}
    gone = {inside, nobodys}
    assert place.where() == dict.fromkeys(every, False)

    assert place.sweep(0.9).aside == 0  # too young
    dry = place.sweep(1.1, dry=True)
    assert (dry.blobs, dry.aside, dry.restored, dry.deleted) == (4, 2, 0, 0)
    assert dry.aside_bytes == len(b"nobody's") + len(b"its hash is a part of a longer word")
    assert place.where() == dict.fromkeys(every, False)  # it only said so

    assert place.sweep(1.1).aside == 2
    assert place.where() == {name: name in gone for name in every}
    assert place.sweep(0.9).deleted == 0  # set aside just now
    assert place.blobs.get(nobodys) == b"nobody's"

    done = place.sweep(1.1)
    assert (done.aside, done.deleted, done.deleted_bytes) == (0, 2, dry.aside_bytes)
    assert place.where() == dict.fromkeys({file, logged}, False)
    assert place.registry.load(kept.hash).hash == kept.hash
    assert place.sweep(9.0).deleted == 0


def test_what_is_referred_to_after_all_comes_back(place: Place) -> None:
    """A writer that found its blob there already, and writes its record late."""
    place.registry.put_delta("one", delta(1), by=SYSTEM)
    late = place.blobs.put(b"late")
    place.sweep(1.1)
    assert place.where()[late]
    place.registry.audit.append("request", "one", {"blob": late})
    assert place.blobs.get(late) == b"late"  # at once
    done = place.sweep(5.0)
    assert (done.restored, done.deleted) == (1, 0)
    assert not place.where()[late]
    assert place.blobs.get(late) == b"late"


def test_what_was_put_again_meanwhile_is_as_if_it_had_not_been_set_aside(place: Place) -> None:
    place.registry.put_delta("one", delta(1), by=SYSTEM)
    needed, nobodys = place.blobs.put(b"needed again"), place.blobs.put(b"nobody's again")
    place.sweep(1.1)
    assert [place.blobs.put(b"needed again"), place.blobs.put(b"nobody's again")] == [
        needed,
        nobodys,
    ]
    place.registry.audit.append("request", "one", {"blob": needed})

    def lie(name: str) -> list[bool]:
        return sorted(one.aside for one in place.blobs.stored() if one.name == name)

    assert lie(needed) == lie(nobodys) == [False, True]
    done = place.sweep(1.1)
    assert (done.aside, done.restored, done.deleted) == (1, 0, 0)
    assert (lie(needed), lie(nobodys)) == ([False, True], [True])
    assert place.sweep(1.1).deleted == 1
    assert (lie(needed), lie(nobodys)) == ([False, True], [])
    assert place.blobs.get(needed) == b"needed again"


def test_another_registrys_blobs_are_not_touched(place: Place, tmp_path: Path) -> None:
    place.registry.put_delta("one", delta(1), by=SYSTEM)
    before = place.where()
    for days in (2.0, 4.0):
        empty = Database(f"sqlite:///{tmp_path}/mistyped.db")
        with pytest.raises(InputError, match="refers to none of the blobs in"):
            sweep(empty, place.blobs, dry=False, clock=after(days))
        empty.close()
    assert place.where() == before


@pytest.mark.parametrize("grace_s", [0.0, -1.0, HOUR - 1, float("nan")])
def test_a_grace_too_short_is_refused(place: Place, grace_s: float) -> None:
    with pytest.raises(InputError, match="3600 s or more"):
        place.sweep(0.0, grace_s=grace_s)


def test_where_the_database_is_away_nothing_goes(place: Place, monkeypatch) -> None:
    place.registry.put_delta("one", delta(1), by=SYSTEM)
    nobodys = place.blobs.put(b"nobody's")

    def fail(*_: object) -> None:
        raise sa.exc.OperationalError("x", {}, Exception("pulled the plug"))

    with monkeypatch.context() as patch:
        patch.setattr(sa.MetaData, "reflect", fail)
        with pytest.raises(StorageError, match="pulled the plug"):
            place.sweep(5.0)
    assert not place.where()[nobodys]


def test_the_rest_of_a_killed_write_goes(tmp_path: Path) -> None:
    place = Place(f"sqlite:///{tmp_path}/registry.db", str(tmp_path / "blobs"))
    place.registry.put_delta("one", delta(1), by=SYSTEM)
    folder = next((tmp_path / "blobs" / "sha256").iterdir())
    rest = folder / ".tessera-0a1b2c3d-00ff.tmp"
    rest.write_bytes(b"half a blob")
    other = folder / "not-ours"
    other.touch()
    assert place.sweep(0.5).deleted == 0
    assert (place.sweep(1.1).deleted, rest.exists(), other.exists()) == (1, False, True)
    place.registry.close()


# --- killed -------------------------------------------------------------------------------------


@contextlib.contextmanager
def sweeping(place: Place) -> Iterator[None]:
    """A process that sweeps on and on, the clock two days ahead; in the end it is killed."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        process = os.fork()
    if not process:
        try:
            os.write(write, b".")
            while True:
                place.sweep(2.0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        assert os.read(read, 1) == b"."
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        os.close(read)
        os.close(write)
    assert status == signal.SIGKILL, "see the traceback of the child above"


def test_killed_while_it_sweeps_nothing_needed_is_lost(tmp_path: Path) -> None:
    """Two sweeps at once over a place that is written to: every record's blob is always there.

    Their clock is two days ahead, so that what one sets aside the next deletes: nothing but its
    record keeps a blob.
    """
    place = Place(f"sqlite:///{tmp_path}/registry.db", str(tmp_path / "blobs"))
    draw = random.Random(0)
    needed: dict[str, bytes] = {}
    for number in range(20):
        content = f"needed {number}".encode()
        needed[place.blobs.put(content)] = content
    place.registry.audit.append("kept", None, {"blobs": sorted(needed)})
    for trial in range(6):
        for number in range(30):
            place.blobs.put(f"not needed {trial} {number}".encode())
        for name in draw.sample(sorted(needed), 5):  # as a sweep that was killed may leave it
            place.blobs.set_aside(name)
        with sweeping(place), sweeping(place):
            until = time.monotonic() + 0.1 * draw.random()
            while time.monotonic() < until:
                for name in draw.sample(sorted(needed), 3):
                    assert place.blobs.get(name) == needed[name]
        for name, content in needed.items():
            assert place.blobs.get(name) == content
    place.sweep(2.0)
    place.sweep(4.0)
    assert place.where() == dict.fromkeys(needed, False)
    place.registry.close()


# --- the command --------------------------------------------------------------------------------


def test_the_command_says_first_and_does_when_told(tmp_path: Path, capsys) -> None:
    place = Place(f"sqlite:///{tmp_path}/registry.db", str(tmp_path / "blobs"))
    place.registry.put_delta("one", delta(1), by=SYSTEM)
    place.registry.first_admin_key("an-operators-own-secret")  # else something is broken
    nobodys = place.blobs.put(b"nobody's")
    file = tmp_path / "blobs" / "sha256" / nobodys[:2] / nobodys
    os.utime(file, (time.time() - 2 * DAY,) * 2)
    said = ["doctor", "--db", place.url, "--blobs", place.blobs.place, "--sweep"]

    def run(*more: str) -> str:
        assert main([*said, *more]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if " sweep " in line]
        return line

    assert "would have set aside 1 (8 bytes)" in run()
    assert file.exists()
    assert "set aside 1 (8 bytes), brought back 0, deleted 0 (0 bytes)" in run("--yes")
    assert not file.exists()
    assert place.blobs.get(nobodys) == b"nobody's"
    nowhere = f"sqlite:///{tmp_path}/mistyped.db"
    assert main(["doctor", "--db", nowhere, *said[3:], "--yes"]) == 1
    unwell = "not before these are well: database, audit log, tables, clock\n"
    assert unwell in capsys.readouterr().out
    assert not (tmp_path / "mistyped.db").exists()
    for words in (["--sweep"], ["--yes"], ["--db", place.url, "--blobs", "x", "--yes"]):
        assert main(["doctor", *words]) == 2
        assert "--sweep needs --db and --blobs" in capsys.readouterr().err
    place.registry.close()

"""Files of records: each record is whole or not there, and damage is never passed over."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessera.data import records
from tessera.data.lock import Lock
from tessera.data.records import RecordReader, RecordWriter
from tessera.errors import CheckpointError, InputError, StorageError

PREFIX = 24  # bytes before the first record
HEADER = 40  # bytes of a record before its head


def written(path: Path, count: int = 4) -> list[int]:
    """A file of records, and where each ends."""
    writer, stops = RecordWriter(path), []
    for i in range(count):
        writer.append({"i": i, "text": "ab" * i}, {"x": np.arange(i * 3), "y": np.float32([[i]])})
        stops.append(writer.bytes)
    writer.close()
    return stops


def put(path: Path, content: bytes) -> None:
    """Change a file in place: some file systems wait for the disk when one is emptied first."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def numbers(path: Path) -> list[int]:
    return [record.head["i"] for record in RecordReader(path)]


def test_records_come_back_as_they_were_given(tmp_path):
    path = tmp_path / "a.rec"
    rng = np.random.default_rng(0)
    given: list[tuple[dict[str, Any], dict[str, np.ndarray]]] = [
        ({}, {}),
        ({"deep": [1, {"a": None}], "text": "äß\n\0"}, {"empty": np.empty((0, 3))}),
        ({"f": 0.1 + 0.2, "big": 1 << 80}, {"scalar": np.array(7, np.uint16)}),
        *(
            ({"k": kind}, {"a": rng.integers(0, 100, (3, 5)).astype(kind), "b": np.arange(size)})
            for size, kind in enumerate(("i1", "u1", "i2", "u8", "f2", "f4", "f8", ">i4", ">f8"))
        ),
        ({}, {"strided": np.arange(20).reshape(4, 5)[:, ::2]}),
        ({}, {f"n{i}": np.arange(i) for i in range(700)}),  # more parts than one system call takes
    ]
    writer = RecordWriter(path)
    for head, arrays in given:
        writer.append(head, arrays)
    writer.sync()
    got = list(RecordReader(path))
    assert [record.sequence for record in got] == list(range(len(given)))
    assert writer.count == 14
    for (head, arrays), record in zip(given, got, strict=True):
        assert record.head == head
        assert list(record.arrays) == list(arrays)
        for name, array in arrays.items():
            assert np.array_equal(record.arrays[name], array)
            assert record.arrays[name].shape == array.shape
            assert record.starts[name] % 8 == 0
            start = record.starts[name]
            raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
            assert path.read_bytes()[start : start + array.nbytes] == raw
            with pytest.raises(ValueError, match="read-only"):
                record.arrays[name][...] = 0
    assert got[-1].stop == writer.bytes == path.stat().st_size
    writer.close()


def test_a_reader_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "a.rec"
    writer = RecordWriter(path)
    reader = RecordReader(path)
    assert list(reader) == []
    seen = []
    for i in range(5):
        writer.append({"i": i}, {"x": np.arange(i)})
        if i % 2:
            seen.append([record.head["i"] for record in reader])
    assert seen == [[0, 1], [2, 3]]
    first = next(iter(reader))
    assert first.head["i"] == 4
    assert list(reader) == []
    assert reader.count == 5
    assert reader.torn_bytes == 0
    assert reader.stop == writer.bytes
    writer.close()


def test_a_writer_goes_on_behind_what_is_whole(tmp_path):
    path = tmp_path / "a.rec"
    stops = written(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"half a record")
    writer = RecordWriter(path)
    assert (writer.count, writer.bytes) == (4, stops[-1])
    writer.append({"i": 4}, {})
    writer.close()
    assert path.read_bytes()[: len(whole)] == whole
    assert numbers(path) == [0, 1, 2, 3, 4]


def test_cut_anywhere_a_file_has_the_records_that_are_whole(tmp_path):
    path = tmp_path / "a.rec"
    stops = written(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        put(path, whole[:length])
        kept = sum(stop <= length for stop in stops)
        if length < PREFIX:  # its writer was killed before it was one
            with pytest.raises(CheckpointError):
                RecordReader(path)
        else:
            reader = RecordReader(path)
            assert [record.head["i"] for record in reader] == list(range(kept))
            assert reader.torn_bytes == length - reader.stop
        if length % 3 == 0:
            writer = RecordWriter(path)
            assert writer.count == kept
            writer.append({"i": kept}, {})
            writer.close()
            assert numbers(path) == [*range(kept + 1)]


def test_a_changed_bit_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "a.rec"
    stops = written(path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            put(path, bytes(damaged))
            if at >= stops[-2]:  # it cannot be told from one that was not finished
                assert numbers(path) == [0, 1, 2]
            else:
                with pytest.raises(CheckpointError, match=r"a\.rec"):
                    numbers(path)
                with pytest.raises(CheckpointError, match=r"a\.rec"):
                    RecordWriter(path)
                assert path.read_bytes() == bytes(damaged), "it was refused, and changed"


def test_a_record_left_out_or_twice_is_found(tmp_path):
    path = tmp_path / "a.rec"
    stops = [PREFIX, *written(path)]
    whole = path.read_bytes()
    parts = [whole[a:b] for a, b in itertools.pairwise(stops)]
    for order in ([0, 2, 3], [1, 2], [0, 0, 1], [0, 1, 1], [0, 2, 1, 3]):
        path.write_bytes(whole[:PREFIX] + b"".join(parts[i] for i in order))
        with pytest.raises(CheckpointError, match="stands where record"):
            numbers(path)


def test_data_that_looks_like_a_record_is_data(tmp_path):
    """A row may hold a whole file of records; torn, it still hides nothing."""
    other, path = tmp_path / "other.rec", tmp_path / "a.rec"
    written(other)
    writer = RecordWriter(path)
    writer.append({"i": 0}, {})
    stop = writer.bytes
    writer.append({"i": 1}, {"x": np.frombuffer(other.read_bytes(), np.uint8)})
    writer.close()
    path.write_bytes(path.read_bytes()[:-8])
    assert numbers(path) == [0]
    other.write_bytes(other.read_bytes()[:PREFIX] + path.read_bytes()[PREFIX:stop])
    assert numbers(other) == []  # a record of another file is none of this


@pytest.mark.parametrize("content", [b"x", b"TESSREX\x01", b"PK\x03\x04" * 20, b"\0" * 100])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "a.rec"
    path.write_bytes(content)
    for opener in (RecordReader, RecordWriter):
        with pytest.raises(CheckpointError, match="no file of Tessera records"):
            opener(path)
    assert path.read_bytes() == content


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.rec cannot be read: No such file"):
        RecordReader(tmp_path / "gone.rec")
    with pytest.raises(StorageError, match="could not open"):
        RecordWriter(tmp_path / "no" / "folder.rec")
    with pytest.raises(StorageError, match="could not open"):
        RecordWriter(tmp_path)


def test_a_reader_notices_a_file_that_became_shorter(tmp_path):
    path = tmp_path / "a.rec"
    written(path)
    reader = RecordReader(path)
    assert len(list(reader)) == 4
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="has 100 bytes, and had"):
        list(reader)


# --- what `append` refuses -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "arrays", "message"),
    [
        ({"x": float("nan")}, {}, "plain JSON"),
        ({"x": object()}, {}, "plain JSON"),
        ({"arrays": 1}, {}, "rename yours"),
        ({}, {"x": np.array(["a"])}, "arrays of numbers, x is <U1"),
        ({}, {"x": np.array([1j])}, "arrays of numbers"),
        ({}, {"x": np.array([True])}, "arrays of numbers"),
        ({"x": "a" * (1 << 24)}, {}, "the head of a record has"),
    ],
)
def test_what_is_no_record_is_refused_and_nothing_written(tmp_path, head, arrays, message):
    path = tmp_path / "a.rec"
    writer = RecordWriter(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        writer.append(head, arrays)
    assert path.read_bytes() == before
    writer.append({"i": 0}, {})
    writer.close()
    assert numbers(path) == [0]


# --- when writing fails ----------------------------------------------------------------------


def test_a_full_disk_loses_nothing_and_needs_no_reopening(tmp_path):
    path = tmp_path / "a.rec"
    stops = written(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = RecordWriter(path)
    try:
        for room in (0, 1, 40, 200, 999):
            resource.setrlimit(resource.RLIMIT_FSIZE, (stops[-1] + room, hard))
            with pytest.raises(StorageError, match=r"could not write to .*a\.rec: File too large"):
                writer.append({"i": 4}, {"x": np.arange(1000)})
            assert path.stat().st_size == stops[-1] == writer.bytes
            assert writer.count == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.append({"i": 4}, {"x": np.arange(1000)})
    writer.close()
    assert numbers(path) == [0, 1, 2, 3, 4]


def test_what_could_not_even_be_cut_off_is_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "a.rec"
    written(path)
    writer = RecordWriter(path)
    real_write, real_cut = os.pwritev, os.ftruncate

    def some_then_full(file: int, views: list[memoryview], at: int) -> int:
        if sum(map(len, views)) < 2000:
            raise OSError(28, "No space left on device")
        return real_write(file, [views[0][:100]], at)

    def broken(file: int, size: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwritev", some_then_full)
    monkeypatch.setattr(os, "ftruncate", broken)
    big = {"x": np.zeros(240)}
    for _ in range(2):
        with pytest.raises(StorageError, match="could not write"):
            writer.append({"i": 4}, big)
    assert path.stat().st_size > writer.bytes
    monkeypatch.setattr(os, "ftruncate", real_cut)
    monkeypatch.setattr(os, "pwritev", real_write)
    writer.append({"i": 4}, {})
    writer.close()
    assert numbers(path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("after", [True, False])
def test_an_interrupt_leaves_a_record_whole_or_away(tmp_path, monkeypatch, after):
    path = tmp_path / "a.rec"
    written(path)
    writer, real = RecordWriter(path), os.pwritev

    def interrupted(file: int, views: list[memoryview], at: int) -> int:
        real(file, views if after else [views[0][:50]], at)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwritev", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.append({"i": 4}, {"x": np.arange(100)})
    monkeypatch.setattr(os, "pwritev", real)
    assert numbers(path) == [0, 1, 2, 3, 4][: 4 + after]
    writer.append({"i": writer.count}, {})
    writer.close()
    assert numbers(path) == [*range(5 + after)]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    path, real = tmp_path / "a.rec", os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda f, views, at: real(f, [views[0][:37]], at))
    written(path)
    assert numbers(path) == [0, 1, 2, 3]


def test_a_failed_flush_is_not_forgotten(tmp_path, monkeypatch):
    """The system drops what it failed to write, and the next fsync says that all is well."""
    writer = RecordWriter(tmp_path / "a.rec")

    def broken(file: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(StorageError, match=r"could not flush .*: Input/output error"):
            writer.sync()
    with pytest.raises(StorageError, match="an earlier flush failed"):
        writer.sync()
    writer.append({"i": 0}, {})
    writer.close()


# --- a writer and its readers ----------------------------------------------------------------


def test_readers_beside_a_writer_see_whole_records_only(tmp_path):
    path = tmp_path / "a.rec"
    writer = RecordWriter(path)
    stop, problems = threading.Event(), []

    def read() -> None:
        reader, expected = RecordReader(path), 0
        try:
            while True:
                last = stop.is_set()
                for record in reader:
                    assert record.head["i"] == expected
                    assert (record.arrays["x"] == expected).all()
                    expected += 1
                if last:
                    assert expected == 400
                    return
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(400):
        writer.append({"i": i}, {"x": np.full(i * 7 % 3000, i)})
    stop.set()
    for thread in threads:
        thread.join()
    writer.close()
    assert not problems


# --- files made to do harm -------------------------------------------------------------------


def forged(path: Path, text: bytes, body: bytes, claims: Mapping[str, int] | None = None) -> None:
    """A record with true checksums around what it likes; `claims` are false lengths."""
    path.unlink(missing_ok=True)
    RecordWriter(path).close()
    prefix = path.read_bytes()
    sizes = {"body": len(body), "head": len(text), **(claims or {})}
    fixed = records._HEADER.pack(
        prefix[8:16], 0, sizes["body"], sizes["head"], zlib.crc32(text + body)
    )
    path.write_bytes(prefix + fixed + records._checked(fixed) + text + body)


def padded(text: str) -> bytes:
    raw = text.encode()
    return raw + b" " * (-len(raw) % 8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "1",
        "null",
        "{}",
        '{"arrays": {}, ',
        '{"arrays": 3}',
        '{"arrays": [1]}',
        '{"arrays": [["x", "i8"]]}',
        '{"arrays": [["x", "O8", [1]]]}',
        '{"arrays": [["x", ["i8"], [1]]]}',
        '{"arrays": [["x", "i8", 1]]}',
        '{"arrays": [["x", "i8", [-1]]]}',
        '{"arrays": [["x", "i8", [-1, -1]]]}',
        '{"arrays": [["x", "i8", [true]]]}',
        '{"arrays": [["x", "i8", [1.0]]]}',
        '{"arrays": [["x", "i8", [2]]]}',
        '{"arrays": [["x", "i8", [0, 4611686018427387904, 4]]]}',
        '{"arrays": [["x", "i8", [99999999999999999999]]]}',
        '{"arrays": [["x", "i1", [4294967296, 4294967296, 4294967296]]]}',
        '{"arrays": [[3, "i8", [1]]]}',
        '{"arrays": [["x", "i4", [1]], ["x", "i4", [1]]]}',
        '{"arrays": [["x", "i8", [' + ",".join(["1"] * 70) + "]]]}",
        '{"arrays": [["x", "i8", [' + "9" * 5000 + "]]]}",
        '{"arrays": []}',  # and a body that no array names
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"arrays": ' + "[" * 50_000,
    ],
)
def test_a_forged_record_is_refused(tmp_path, text):
    path = tmp_path / "a.rec"
    forged(path, padded(text), bytes(8))
    with pytest.raises(CheckpointError, match="record 0 has its checksum and is no record"):
        list(RecordReader(path))


@pytest.mark.parametrize("field", ["head", "body"])
@pytest.mark.parametrize("length", [1 << 20, 1 << 31, (1 << 32) - 1])
def test_a_length_is_no_promise(tmp_path, field, length):
    """A record longer than its file was not finished; nothing is set aside for it."""
    path = tmp_path / "a.rec"
    forged(path, padded('{"arrays": []}'), b"", {field: length})
    tracemalloc.start()
    assert list(RecordReader(path)) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    forged(path, padded('{"arrays": []}'), b"", {"body": (1 << 64) - 8})
    assert list(RecordReader(path)) == []


def test_a_head_out_of_line_is_refused(tmp_path):
    path = tmp_path / "a.rec"
    forged(path, b'{"arrays": []}', b"")
    with pytest.raises(CheckpointError, match="not aligned"):
        list(RecordReader(path))


def test_reading_takes_no_memory_for_the_rows(tmp_path):
    path = tmp_path / "a.rec"
    writer = RecordWriter(path)
    for i in range(4):
        writer.append({"i": i}, {"x": np.full(1 << 20, i)})  # 8 MiB
    writer.close()
    tracemalloc.start()
    assert sum(int(record.arrays["x"][-1]) for record in RecordReader(path)) == 6
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_refused_or_read_as_unfinished(tmp_path, seed):
    """Random bytes over a file: what is read is always a beginning of what was written."""
    path = tmp_path / "a.rec"
    stops = written(path)
    rng = np.random.default_rng(seed)
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    for _ in range(20):
        damaged = content.copy()
        at = int(rng.integers(len(content)))
        damaged[at : at + int(rng.integers(1, 200))] = rng.integers(0, 256)
        put(path, damaged.tobytes())
        if (damaged == content).all():
            continue
        first = int(np.flatnonzero(damaged != content)[0])
        whole = sum(stop <= first for stop in stops)
        try:
            assert numbers(path) == [*range(whole)]
            assert first >= PREFIX
        except CheckpointError:
            assert first < stops[-2]


# --- the lock --------------------------------------------------------------------------------


def test_a_folder_has_one_writer(tmp_path):
    lock = Lock(tmp_path, "the thing")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"the thing .* has a writer already; close\(\)"):
            Lock(tmp_path, "the thing")
    lock.close()
    lock.close()
    again = Lock(tmp_path, "the thing")
    del again  # one that nobody holds is free
    Lock(tmp_path, "the thing").close()
    with pytest.raises(StorageError, match="could not lock the thing"):
        Lock(tmp_path / "missing", "the thing")


def test_another_process_is_refused_and_death_frees_the_lock(tmp_path):
    script = (
        "import sys; from pathlib import Path; from tessera.data.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1]), 'x'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="has a writer already"):
            Lock(tmp_path, "x")
        other.kill()
        other.wait()
        Lock(tmp_path, "x").close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """A worker that outlives the writer must not lock its folder."""
    lock = Lock(tmp_path, "x")
    begun, begin = os.pipe()
    ended, end = os.pipe()
    child = os.fork()
    if not child:
        os.close(end)
        os.write(begin, b"!")
        os.read(ended, 1)  # until the parent has seen what it wants
        os._exit(0)
    os.read(begun, 1)
    try:
        with pytest.raises(StorageError):  # that the child let go has not freed the parent's
            Lock(tmp_path, "x")
        lock.close()
        Lock(tmp_path, "x").close()
    finally:
        for file in (begun, begin, ended, end):
            os.close(file)
        os.waitpid(child, 0)

"""The journal: what append returned from is there, in order, and damage is never passed over."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data import journal as journal_module
from tessera.data import stream as stream_module
from tessera.data.batch import Batch
from tessera.data.journal import Journal
from tessera.data.records import RecordWriter
from tessera.data.segments import JournalShard, segment_paths
from tessera.data.stream import Stream
from tessera.errors import CheckpointError, InputError, MissingDataError, StorageError


def rows(start: int, stop: int) -> Batch:
    numbers = torch.arange(start, stop)
    return Batch(torch.stack([numbers.float(), -numbers.float()], 1), numbers)


def fill(folder: Path, counts: list[int], *, segment_bytes: int = 1 << 28) -> None:
    with Journal(folder, segment_bytes=segment_bytes) as journal:
        for count in counts:
            journal.append(*rows(journal.rows, journal.rows + count), time=journal.rows)


def held(folder: Path) -> list[int]:
    """The labels, after a check that the inputs are theirs."""
    shard = JournalShard(folder)
    batch = shard.read(0, len(shard)) if len(shard) else rows(0, 0)
    assert torch.equal(batch.x, torch.stack([batch.y.float(), -batch.y.float()], 1))
    return batch.y.tolist()


@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.sampled_from([1, 300, 1 << 20]),
       st.data())  # fmt: skip
@settings(max_examples=40)
def test_any_rows_can_be_read_however_they_were_written(tmp_path_factory, counts, size, data):
    folder = tmp_path_factory.mktemp("journal")
    fill(folder, counts, segment_bytes=size)
    total = sum(counts)
    files = len(segment_paths(folder))
    assert files == len(counts) if size == 1 else files <= len(counts)
    shard = JournalShard(folder)
    assert len(shard) == total
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    batch, expected = shard.read(start, stop), rows(start, stop)
    assert torch.equal(batch.x, expected.x)
    assert torch.equal(batch.y, expected.y)
    assert held(folder) == list(range(total))
    assert [r.row for r in shard.records()] == [0, *itertools.accumulate(counts)][:-1]


@pytest.mark.parametrize(
    "dtype",
    [*(torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int32),
     torch.float8_e4m3fn],
)  # fmt: skip
def test_dtypes_come_back_as_they_were(dtype, tmp_path):
    x = torch.arange(6).reshape(3, 2).to(dtype)
    with Journal(tmp_path) as journal:
        journal.append(x, np.array([1, 2, 3], np.int16))
        journal.append(x[:1].numpy() if dtype is torch.int32 else x[:1], torch.tensor([4]))
    batch = JournalShard(tmp_path).read(0, 4)
    assert batch.x.dtype == dtype
    assert torch.equal(batch.x.view(torch.uint8), torch.cat([x, x[:1]]).view(torch.uint8))
    assert batch.y.tolist() == [1, 2, 3, 4]


def test_times_never_go_back_and_say_when_they_were_held(tmp_path, monkeypatch):
    clock = iter([100, 90, 100, 120, 50])
    monkeypatch.setattr(journal_module.clock, "time_ns", lambda: next(clock))
    with Journal(tmp_path, segment_bytes=1) as journal:
        for i in range(4):
            journal.append(*rows(i, i + 1), tags={"user": f"u{i}", "ok": True})
    with Journal(tmp_path, segment_bytes=1) as journal:
        journal.append(*rows(4, 5))  # the last time was kept in a file
        journal.append(*rows(5, 6), time=121)
    records = list(JournalShard(tmp_path).records())
    assert [(r.row, r.time_ns, r.held) for r in records] == [
        (0, 100, False), (1, 100, True), (2, 100, False), (3, 120, False), (4, 120, True),
        (5, 121, False),
    ]  # fmt: skip
    assert [r.tags for r in records[2:5]] == [
        {"user": "u2", "ok": True}, {"user": "u3", "ok": True}, {}
    ]  # fmt: skip
    assert held(tmp_path) == list(range(6))


def test_a_journal_goes_on_where_it_was(tmp_path):
    with Journal(tmp_path / "new" / "j") as journal:
        assert (journal.rows, journal.append(*rows(0, 3))) == (0, 0)
        assert journal.append(*rows(3, 3)) == 3  # no rows: nothing to write
        before = journal.path.stat().st_mtime_ns, held(journal.path)
        assert before[1] == [0, 1, 2]
    with Journal(tmp_path / "new" / "j") as journal:
        assert (journal.append(*rows(3, 4)), journal.rows) == (3, 4)
        journal.flush()
    journal.close()
    assert held(journal.path) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("x", "y", "more", "words"),
    [
        (torch.zeros(1, 3), torch.zeros(1).long(), {}, r"x of float32, rows \[3\].*rows \[2\]"),
        (torch.zeros(1, 2).double(), torch.zeros(1).long(), {}, "x of float64"),
        (torch.zeros(1, 2), torch.zeros(1), {}, "y of float32"),
        (torch.zeros(2, 2), torch.zeros(1).long(), {}, "differ in rows"),
        (torch.tensor([[1.0, float("nan")]]), torch.zeros(1).long(), {}, "keep x: it has NaN"),
        (torch.zeros(()), torch.zeros(1), {}, "dense rows"),
        (torch.zeros(1, 2), torch.zeros(1).long(), {"time": 1.5}, "whole nanoseconds"),
        (torch.zeros(1, 2), torch.zeros(1).long(), {"time": -1}, "whole nanoseconds"),
        (torch.zeros(1, 2), torch.zeros(1).long(), {"tags": {"a": object()}}, "plain JSON"),
        (torch.zeros(1, 2), torch.zeros(1).long(), {"tags": {"a": float("nan")}}, "plain JSON"),
    ],
)
def test_what_is_refused_was_not_written(x, y, more, words, tmp_path):
    with Journal(tmp_path) as journal:
        journal.append(*rows(0, 2), time=7)
        (path,) = segment_paths(tmp_path)
        before = path.read_bytes()
        with pytest.raises(InputError, match=words):
            journal.append(x, y, **more)
        assert path.read_bytes() == before
        assert journal.append(*rows(2, 3), time=8) == 2
    with Journal(tmp_path, segment_bytes=1) as journal, pytest.raises(InputError):
        journal.append(x, y, **more)
    assert held(tmp_path) == [0, 1, 2]
    assert [r.time_ns for r in JournalShard(tmp_path).records()] == [7, 8]


def test_a_first_append_that_is_refused_leaves_the_schema_open(tmp_path):
    with Journal(tmp_path) as journal:
        with pytest.raises(InputError):
            journal.append(*rows(0, 1), tags={"a": object()})
        assert journal.append(torch.zeros(1, 5), torch.tensor([1])) == 0
    assert JournalShard(tmp_path).read(0, 1).x.shape == (1, 5)


def test_settings_and_places_are_checked(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Journal(tmp_path / "file")
    with pytest.raises(InputError, match="segment_bytes >= 1, got 0"):
        Journal(tmp_path / "j", segment_bytes=0)
    with pytest.raises(MissingDataError, match=r"data.Journal\(path\) begins one"):
        JournalShard(tmp_path / "nowhere")
    with pytest.raises(InputError, match="a row >= 0 or a datetime, got -1"):
        JournalShard(tmp_path, since=-1)
    with pytest.raises(InputError, match="no time zone"):
        JournalShard(tmp_path, since=datetime.datetime(2026, 1, 1))
    (tmp_path / "journal-x.rec").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no segment of a journal"):
        len(JournalShard(tmp_path))
    (tmp_path / "journal-x.rec").unlink()
    writer = RecordWriter(tmp_path / f"journal-{0:016d}.rec")
    writer.append({"else": 1}, {})
    writer.close()
    for opens in (Journal, lambda p: len(JournalShard(p))):
        with pytest.raises(CheckpointError, match="record 0 is not one of a journal"):
            opens(tmp_path)


def test_one_writer_at_a_time_and_none_after_close(tmp_path):
    with Journal(tmp_path) as journal:
        with pytest.raises(StorageError, match=r"the journal .* has a writer already"):
            Journal(tmp_path)
        journal.append(*rows(0, 1))
    with pytest.raises(InputError, match="not open for writing"):
        journal.append(*rows(1, 2))
    Journal(tmp_path).close()


def test_threads_may_append(tmp_path):
    with Journal(tmp_path, segment_bytes=2000) as journal:

        def work(label: int) -> None:
            for _ in range(50):
                journal.append(torch.full((2, 2), float(label)), torch.full((2,), label))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    shard = JournalShard(tmp_path)
    batch = shard.read(0, len(shard))
    assert torch.equal(batch.x[:, 0].long(), batch.y)
    assert torch.bincount(batch.y).tolist() == [100] * 4
    assert torch.equal(batch.y[::2], batch.y[1::2])  # a call's rows stay together


# --- crashes and damage --------------------------------------------------------------------------


def test_a_file_cut_anywhere_in_its_last_record_loses_that_record_only(tmp_path):
    fill(tmp_path / "whole", [2, 3, 1])
    (path,) = segment_paths(tmp_path / "whole")
    raw = path.read_bytes()
    fill(tmp_path / "less", [2, 3])
    start = segment_paths(tmp_path / "less")[0].stat().st_size
    for size in range(start, len(raw)):
        folder = tmp_path / f"cut{size}"
        folder.mkdir()
        (folder / path.name).write_bytes(raw[:size])
        assert held(folder) == [0, 1, 2, 3, 4]
        with Journal(folder) as journal:
            assert journal.append(*rows(5, 7), time=9) == 5
        assert held(folder) == list(range(7))
        shutil.rmtree(folder)


def test_a_writer_killed_as_it_began_a_file_leaves_one_that_can_be_used(tmp_path):
    fill(tmp_path / "whole", [2, 3], segment_bytes=1)
    first, second = segment_paths(tmp_path / "whole")
    raw = second.read_bytes()
    for size in (0, 1, 23, 24, 25, 60, len(raw) - 1):
        folder = tmp_path / f"cut{size}"
        folder.mkdir()
        shutil.copy(first, folder)
        (folder / second.name).write_bytes(raw[:size])
        assert held(folder) == [0, 1]
        with Journal(folder) as journal:
            with pytest.raises(InputError, match=r"rows \[3\]"):
                journal.append(torch.zeros(1, 3), torch.tensor([0]))
            assert journal.append(*rows(2, 4), time=0) == 2
        assert held(folder) == [0, 1, 2, 3]
        assert [r.time_ns for r in JournalShard(folder).records()] == [0, 0]


def test_a_flipped_bit_is_refused_or_cut_and_never_read(tmp_path):
    fill(tmp_path, [2, 1, 1], segment_bytes=1 << 20)
    (path,) = segment_paths(tmp_path)
    raw = path.read_bytes()
    refused = 0
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        try:
            found = held(tmp_path)
        except CheckpointError:
            refused += 1
            with pytest.raises(CheckpointError):
                Journal(tmp_path)
        else:
            assert found == list(range(len(found))), at
            # Only the padding is nobody's; else the last record is as a killed writer leaves it.
            assert len(found) in (3, 4), at
    assert refused > len(raw) / 2


def test_a_short_or_missing_file_in_the_middle_is_refused(tmp_path):
    fill(tmp_path, [2, 3, 1], segment_bytes=1)
    first, middle, _ = segment_paths(tmp_path)
    raw = middle.read_bytes()
    middle.write_bytes(raw[:-1])
    shard = JournalShard(tmp_path)
    assert shard.read(5, 6).y.tolist() == [5]
    with pytest.raises(CheckpointError, match=r"it is damaged\. Restore"):
        shard.read(1, 4)
    middle.unlink()
    with pytest.raises(CheckpointError, match=r"it is damaged\. Restore"):
        held(tmp_path)
    middle.write_bytes(raw)
    first.unlink()
    with pytest.raises(CheckpointError, match="has no row 0: a file is missing"):
        held(tmp_path)


def test_files_that_were_renamed_are_refused(tmp_path):
    fill(tmp_path, [2, 3], segment_bytes=1)
    second = segment_paths(tmp_path)[1]
    second.rename(second.with_name(f"journal-{1:016d}.rec"))
    for opens in (Journal, held):
        with pytest.raises(CheckpointError, match="row 2 where row 1 belongs"):
            opens(tmp_path)


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Start `work(pipe)` in a forked process; its id, and the end of the pipe to read from."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(out)
            work(into)
        finally:
            os._exit(0)
    os.close(into)
    return pid, out


def test_what_was_acknowledged_survives_kill_9(tmp_path):
    rng = np.random.default_rng(0)
    payload = torch.zeros(50, 64)
    acknowledged = 0

    def work(pipe: int) -> None:
        journal = Journal(tmp_path, segment_bytes=100_000)
        while True:
            n = journal.rows
            x = payload[: 1 + n % 50].clone()
            labels = torch.arange(n, n + len(x))
            x[:, 0] = labels
            journal.append(x, labels)
            os.write(pipe, journal.rows.to_bytes(8, "little"))

    for _ in range(50):
        pid, out = in_child(work)
        at_least = int(rng.integers(1, 40))
        got = b""
        while len(got) < 8 * at_least:
            got += os.read(out, 8)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while more := os.read(out, 1 << 16):
            got += more
        os.close(out)
        acknowledged = int.from_bytes(got[len(got) // 8 * 8 - 8 : len(got) // 8 * 8], "little")
        count = len(JournalShard(tmp_path))
        assert count >= acknowledged
    shard = JournalShard(tmp_path)
    batch = shard.read(0, len(shard))
    assert torch.equal(batch.y, torch.arange(len(shard)))
    assert torch.equal(batch.x[:, 0].long(), batch.y)
    assert len(segment_paths(tmp_path)) > 3


def test_a_forked_child_cannot_write(tmp_path):
    journal = Journal(tmp_path)
    journal.append(*rows(0, 1))

    def work(pipe: int) -> None:
        try:
            journal.append(*rows(1, 2))
        except InputError as error:
            os.write(pipe, str(error).encode())

    pid, out = in_child(work)
    os.waitpid(pid, 0)
    assert b"not open for writing here" in os.read(out, 1 << 12)
    os.close(out)
    journal.append(*rows(1, 2))
    journal.close()
    assert held(tmp_path) == [0, 1]


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    with Journal(tmp_path) as journal:
        journal.append(*rows(0, 2))

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", full)
            with pytest.raises(StorageError, match="No space left"):
                journal.append(*rows(2, 4))
        assert journal.rows == 2
        assert journal.append(*rows(2, 3)) == 2
    assert held(tmp_path) == [0, 1, 2]


# --- read back as a stream -----------------------------------------------------------------------


def test_a_stream_reads_a_journal_back(tmp_path):
    fill(tmp_path, [2, 5, 1, 7, 4], segment_bytes=400)
    expected = [b.y.tolist() for b in Stream(rows(0, 19), 6, batch_size=4, seed=2)]
    stream = Stream.from_journal(tmp_path, 6, batch_size=4, seed=2)
    assert [b.y.tolist() for b in stream] == expected
    assert [b.y.tolist() for b in Stream(tmp_path, 6, batch_size=4, seed=2)] == expected
    part = Stream.from_journal(tmp_path, 1, batch_size=100, since=5)
    assert next(part).y.tolist() == list(range(5, 19))
    assert list(Stream.from_journal(tmp_path, 1, batch_size=4, since=19)) == []


def test_since_may_be_a_time(tmp_path):
    def at(s: float) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(s, datetime.UTC)

    with Journal(tmp_path, segment_bytes=300) as journal:
        for i in range(10):
            journal.append(*rows(2 * i, 2 * i + 2), time=i * 10**9)
    assert len(segment_paths(tmp_path)) > 2
    for seconds, first in ((0, 0), (0.5, 2), (1, 2), (4.000001, 10), (9, 18), (9.5, 20)):
        stream = Stream.from_journal(tmp_path, 1, batch_size=100, since=at(seconds))
        assert [y for b in stream for y in b.y.tolist()] == list(range(first, 20)), seconds


def test_a_time_after_the_last_row_is_the_end_of_a_file_just_begun(tmp_path):
    fill(tmp_path / "a", [2, 3], segment_bytes=1)
    fill(tmp_path / "b", [2, 3, 1], segment_bytes=1)
    with_schema = segment_paths(tmp_path / "b")[2]
    start = with_schema.read_bytes()
    (tmp_path / "a" / with_schema.name).write_bytes(start[:-1])
    shard = JournalShard(tmp_path / "a")
    assert (shard.row_at(99), shard.row_at(2), shard.row_at(1), shard.row_at(0)) == (5, 2, 2, 0)


def test_a_resumed_stream_goes_on_in_a_journal_that_has_grown(tmp_path):
    fill(tmp_path, [4, 4], segment_bytes=200)
    stream = Stream.from_journal(tmp_path, 3, batch_size=2, follow=0.001)
    start = [next(stream).y.tolist() for _ in range(2)]
    state = json.loads(json.dumps(stream.state_dict()))
    fill(tmp_path, [4, 4], segment_bytes=200)
    expected = [b.y.tolist() for b in Stream(rows(0, 16), 3, batch_size=2)]
    for follow in (False, 0.001):
        again = Stream.from_journal(tmp_path, 3, batch_size=2, follow=follow)
        again.load_state_dict(state)
        assert start + [b.y.tolist() for b in again] == expected
    assert start + [b.y.tolist() for b in stream] == expected
    other = Stream.from_journal(tmp_path, 3, batch_size=2, since=1)
    with pytest.raises(CheckpointError, match="fingerprint"):
        other.load_state_dict(state)
    shutil.rmtree(tmp_path)
    fill(tmp_path, [4, 4])
    with pytest.raises(CheckpointError, match="fingerprint"):
        Stream.from_journal(tmp_path, 3, batch_size=2).load_state_dict(state)


def test_a_follower_reads_what_is_written_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "_POLL_S", 0.001)
    with Journal(tmp_path, segment_bytes=1000) as journal:
        stream = Stream.from_journal(tmp_path, 5, batch_size=3, follow=True)
        got: list[int] = []

        def read() -> None:
            for batch in stream:
                got.extend(batch.y.tolist())
                if stream.position == 90:
                    stream.stop()

        reader = threading.Thread(target=read)
        reader.start()
        for i in range(0, 100, 2):
            journal.append(*rows(i, i + 2))
        reader.join(60)
        assert not reader.is_alive()
    expected = [y for b in Stream(rows(0, 100), 5, batch_size=3) for y in b.y.tolist()]
    assert got == expected[:90]
    again = Stream.from_journal(tmp_path, 5, batch_size=3)
    again.load_state_dict(stream.state_dict())
    assert got + [y for b in again for y in b.y.tolist()] == expected


def test_a_stop_ends_a_wait(tmp_path):
    Journal(tmp_path).close()
    stream = Stream.from_journal(tmp_path, 1, batch_size=1, follow=True)
    begin = time.monotonic()
    timer = threading.Timer(0.01, stream.stop)
    timer.start()
    assert list(stream) == []
    timer.join()
    assert time.monotonic() > begin

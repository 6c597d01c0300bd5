"""A stream: each row once, in an order of (seed, shards, window) alone, resumed at the very row."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from river import drift
from safetensors.torch import save_file

from tessera import random
from tessera.data import cursor as cursor_module
from tessera.data import stream as stream_module
from tessera.data.batch import Batch
from tessera.data.drift import ADWIN, PageHinkley
from tessera.data.shards import IterableShard
from tessera.data.stream import Stream
from tessera.data.window import Window
from tessera.errors import CheckpointError, InputError, MissingDataError


def rows(start: int, stop: int) -> Batch:
    """Rows that say their own number."""
    numbers = torch.arange(start, stop)
    return Batch(torch.stack([numbers.float(), -numbers.float()], 1), numbers)


def cut(sizes: list[int]) -> list[Batch]:
    stops = np.cumsum([0, *sizes]).tolist()
    return [rows(a, b) for a, b in itertools.pairwise(stops)]


def labels(stream: Iterator[Batch]) -> list[int]:
    found = []
    for batch in stream:
        assert (batch.x == torch.stack([batch.y.float(), -batch.y.float()], 1)).all()
        found += batch.y.tolist()
    return found


def by_definition(count: int, window: int, seed: int) -> list[int]:
    """The order as the docstring of Window puts it, row by row."""
    words = random.bits(random.key(seed, "stream", "order"), 0, count).tolist()
    held, coming, given_ = [], list(range(count)), []
    for word in words:
        while len(held) < window and coming:
            held.append(coming.pop(0))
        i = word % len(held)
        given_.append(held[i])
        held[i] = held[-1]
        held.pop()
    return given_


sizes = st.lists(st.integers(0, 12), max_size=5)


@given(sizes, st.integers(1, 40), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=150)
def test_the_order_is_that_of_the_definition(sizes, window, batch_size, seed):
    stream = Stream(cut(sizes), window, batch_size=batch_size, seed=seed)
    batches = list(stream)
    assert labels(iter(batches)) == by_definition(sum(sizes), window, seed)
    assert [len(b.y) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert stream.position == sum(sizes)
    assert list(stream) == []


@given(sizes, st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(0, 30))
@settings(max_examples=150)
def test_a_resumed_stream_gives_what_was_left(sizes, window, batch_size, other, stop):
    whole = labels(Stream(cut(sizes), window, batch_size=1))
    stream = Stream(cut(sizes), window, batch_size=batch_size)
    given_ = []
    for _, batch in zip(range(stop), stream, strict=False):
        given_ += batch.y.tolist()
    state = json.loads(json.dumps(stream.state_dict()))
    again = Stream(cut(sizes), window, batch_size=other)
    again.load_state_dict(state)
    assert again.state_dict() == stream.state_dict()
    assert given_ + labels(again) == whole
    assert given_ + labels(stream) == whole  # saving has changed nothing


@given(st.integers(1, 30), st.lists(st.integers(0, 60), max_size=4), st.integers(1, 7))
@settings(max_examples=50)
def test_small_reads_change_nothing(window, sizes, batch_size):
    expected = labels(Stream(cut(sizes), window, batch_size=batch_size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cursor_module, "_LEAST_ROWS", 1)
        patch.setattr(cursor_module, "_MOST_ROWS", 3)
        stream = Stream(cut(sizes), window, batch_size=batch_size)
        assert labels(stream) == expected
        half = Stream(cut(sizes), window, batch_size=batch_size)
        start = [y for _, b in zip(range(3), half, strict=False) for y in b.y.tolist()]
        again = Stream(cut(sizes), window, batch_size=batch_size)
        again.load_state_dict(half.state_dict())
        assert start + labels(again) == expected


def test_a_window_mixes_evenly_and_no_further():
    # Row r cannot be given before r - window + 1; over seeds, which of a full window is first is
    # uniform: 2000 draws of 10, chi-square with 9 degrees of freedom, 27.9 at p = 0.001.
    firsts = np.zeros(10)
    for seed in range(2000):
        window = Window(10, seed=seed)
        window.enter(range(30))
        order = window.draw(30)
        assert all(t >= row - 9 for t, row in enumerate(order))
        firsts[order[0]] += 1
    assert ((firsts - 200) ** 2 / 200).sum() < 27.9


def test_seeds_and_windows_give_other_orders():
    orders = {tuple(labels(Stream(rows(0, 50), w, batch_size=8, seed=s)))
              for w in (2, 10, 50) for s in range(3)}  # fmt: skip
    assert len(orders) == 9


def test_batches_are_copies():
    whole = rows(0, 8)
    for window in (1, 4):
        for batch in Stream(whole, window, batch_size=4):
            batch.x.zero_()
    assert (whole.x[:, 0] == torch.arange(8)).all()


def test_long_windows_are_saved_small_and_exact():
    stream = Stream(rows(0, 30_000), 20_000, batch_size=100)
    first = [y for _, b in zip(range(5), stream, strict=False) for y in b.y.tolist()]
    text = json.dumps(stream.state_dict())
    assert len(text) < 60_000
    again = Stream(rows(0, 30_000), 20_000, batch_size=100)
    again.load_state_dict(json.loads(text))
    assert sorted(first + labels(again)) == list(range(30_000))


def test_another_process_goes_on_bit_for_bit(tmp_path):
    for i in range(3):
        b = rows(10 * i, 10 * i + 10)
        save_file({"x": b.x, "y": b.y}, tmp_path / f"part-{i}.safetensors")
    stream = Stream(tmp_path, 7, batch_size=4, seed=3)
    for _ in range(3):
        next(stream)
    state = json.dumps(stream.state_dict())
    code = (
        "import json, sys\n"
        "from tessera.data.stream import Stream\n"
        "stream = Stream(sys.argv[1], 7, batch_size=4, seed=3)\n"
        "stream.load_state_dict(json.loads(sys.argv[2]))\n"
        "print(json.dumps([[b.x.tolist(), b.y.tolist()] for b in stream]))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), state],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert json.loads(out) == [[b.x.tolist(), b.y.tolist()] for b in stream]


# --- iterables ---------------------------------------------------------------------------------


def numbered(count: int | None = None) -> Iterator[tuple[Any, Any]]:
    i = 0
    while count is None or i < count:
        yield torch.tensor([float(i), -float(i)]), i
        i += 1


@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 7), st.integers(0, 6))
@settings(max_examples=60)
def test_an_iterable_is_a_shard_and_resumes_by_counting(count, window, batch_size, stop):
    expected = labels(Stream(rows(0, count), window, batch_size=batch_size))
    stream = Stream([IterableShard(lambda: numbered(count))], window, batch_size=batch_size)
    start = [y for _, b in zip(range(stop), stream, strict=False) for y in b.y.tolist()]
    again = Stream([IterableShard(lambda: numbered(count))], window, batch_size=batch_size)
    again.load_state_dict(stream.state_dict())
    assert start + labels(again) == expected
    assert start + labels(stream) == expected


def test_an_endless_iterable_is_drawn_no_further_than_needed():
    drawn = []

    def watched() -> Iterator[tuple[Any, Any]]:
        for row in numbered():
            drawn.append(row[1])
            yield row

    stream = Stream([IterableShard(watched)], 5, batch_size=4)
    assert len(next(stream).y) == 4
    assert len(drawn) == 8  # four draws from a window of five
    next(stream)
    assert len(drawn) == 12


def test_a_lone_iterator_cannot_be_read_twice():
    shard = IterableShard(numbered(20))
    stream = Stream([shard], 4, batch_size=4)
    next(stream)
    state = stream.state_dict()
    with pytest.raises(InputError, match="a generator function"):
        Stream([shard], 4, batch_size=4).load_state_dict(state)
    again = Stream([IterableShard(numbered(20))], 4, batch_size=4)
    again.load_state_dict(state)
    assert labels(again) == labels(stream)


def test_rows_of_an_iterable_must_fit_together():
    bad = [([1.0, 2.0], 0), ([1.0], 1)]
    with pytest.raises(InputError, match=r"pairs \(x, y\) of numbers, all of one shape"):
        next(Stream([IterableShard(bad)], 1, batch_size=2))
    with pytest.raises(InputError, match="pairs"):
        next(Stream([IterableShard([1, 2])], 1, batch_size=2))


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "window", "batch_size", "words"),
    [
        (rows(0, 3), 0, 1, "window >= 1, got 0"),
        (rows(0, 3), 1, 0, "batch_size >= 1, got 0"),
        (rows(0, 3), 2.0, 1, "window >= 1, got 2.0"),
        (numbered(3), 1, 1, r"IterableShard\(rows\)"),
        (7, 1, 1, "got int"),
        ([7], 1, 1, "shard 0 of a Stream is int"),
        ((torch.zeros(2, 1), torch.zeros(3)), 1, 1, "differ in rows"),
        ([(torch.zeros(()), torch.zeros(3))], 1, 1, "dense rows"),
        ((np.array(["a"]), np.zeros(1)), 1, 1, "rows must be numbers"),
    ],
)
def test_what_is_no_stream_is_refused(shards, window, batch_size, words):
    with pytest.raises(InputError, match=words):
        Stream(shards, window, batch_size=batch_size)


def test_a_detector_and_follow_are_checked():
    with pytest.raises(InputError, match=r"got object; data.ADWIN\(\) is one"):
        Stream(rows(0, 2), 1, object(), batch_size=1)
    for follow in (-1.0, float("nan"), "yes"):
        with pytest.raises(InputError, match="follow=True"):
            Stream(rows(0, 2), 1, batch_size=1, follow=follow)


class Faulty:
    """A shard that can break and be repaired."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.answer = batch, batch

    def __len__(self) -> int:
        return len(self.batch.y)

    def read(self, start: int, stop: int) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return Batch(*(t[start:stop] for t in self.answer)) if self.answer else None

    def fingerprint(self) -> str:
        return "faulty"


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (InputError("file b is damaged"), InputError, "file b is damaged"),
        (None, InputError, "must read a Batch, got NoneType"),
        (rows(8, 12), InputError, r"asked for 8 rows and gave x torch.float32 \[4, 2\]"),
        (Batch(rows(8, 16).x.double(), rows(8, 16).y), InputError,
         r"rows x of float64 \[2\], the stream's are float32 \[2\]"),
        (Batch(rows(8, 16).x[:, :1], rows(8, 16).y), InputError, r"float32 \[1\]"),
        (Batch(rows(8, 16).x, rows(8, 16).y.float()), InputError, "rows y of float32"),
    ],
)  # fmt: skip
def test_a_bad_shard_stops_at_the_last_good_batch_and_can_be_repaired(window, answer, error, words):
    shard = Faulty(rows(8, 16))
    shard.answer = answer
    stream = Stream([rows(0, 8), shard], window, batch_size=3)
    got: list[int] = []
    with pytest.raises(error, match=words):
        got.extend(y for batch in stream for y in batch.y.tolist())
    assert len(got) == 6 if window == 1 else len(got) >= 3
    state = stream.state_dict()
    assert state["position"] == len(got)
    with pytest.raises(error, match=words):
        next(stream)
    assert stream.state_dict() == state
    shard.answer = shard.batch
    assert got + labels(stream) == labels(Stream(rows(0, 16), window, batch_size=3))


def test_states_of_other_settings_are_refused():
    stream = Stream(rows(0, 20), 4, batch_size=3, seed=1)
    next(stream)
    state = stream.state_dict()
    for name, other, words in (
        ("window", Stream(rows(0, 20), 5, batch_size=3, seed=1), "window=4.*window=5"),
        ("seed", Stream(rows(0, 20), 4, batch_size=3, seed=2), "seed=1.*seed=2"),
    ):
        before = other.state_dict()
        with pytest.raises(CheckpointError, match=words):
            other.load_state_dict(state)
        assert other.state_dict() == before, name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 9}, "version=9"),
        ({"position": -1}, "position"),
        ({"position": 5}, "rows in its window"),
        ({"held": [1, 1, 2]}, "rows in its window"),
        ({"held": [1, 2, 99]}, "rows in its window"),
        ({"held": "no base 64!"}, "held"),
        ({"held": {"a": 1}}, "held"),
        ({"shards": []}, "too few rows"),
        ({"shards": [["a", "b"]]}, "too few rows"),
        ({"schema": [1]}, "schema"),
        ({"drifts": [0.5]}, "drifts"),
        ({"of": 2}, "2 shards"),
        ({"extra": 1}, "entries"),
    ],
)
def test_damaged_states_are_refused_and_change_nothing(change, words):
    stream = Stream(rows(0, 20), 4, batch_size=3)
    next(stream)
    state = stream.state_dict()
    fresh = Stream(rows(0, 20), 4, batch_size=3)
    before = fresh.state_dict()
    with pytest.raises(CheckpointError, match=words):
        fresh.load_state_dict({**state, **change})
    assert fresh.state_dict() == before
    with pytest.raises(CheckpointError, match="entries"):
        fresh.load_state_dict([])
    fresh.load_state_dict(state)
    assert labels(fresh) == labels(stream)


def test_other_data_is_refused():
    stream = Stream([rows(0, 10), rows(10, 20)], 4, batch_size=6)
    next(stream), next(stream)
    state = stream.state_dict()
    with pytest.raises(CheckpointError, match="'0: rows in memory' is not what it was"):
        Stream([rows(1, 11), rows(10, 20)], 4, batch_size=6).load_state_dict(state)
    with pytest.raises(CheckpointError, match="not what it was"):
        Stream([rows(0, 10), rows(10, 19)], 4, batch_size=6).load_state_dict(state)
    with pytest.raises(MissingDataError, match="'1: rows in memory', which is not there"):
        Stream([rows(0, 10)], 4, batch_size=6).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"of 2 shards.*has 3; follow=True takes new ones"):
        Stream(cut([10, 10, 10]), 4, batch_size=6).load_state_dict(state)


def test_an_earlier_shard_with_more_rows_is_refused_by_count():
    stream = Stream([Faulty(rows(0, 8)), rows(8, 16)], 6, batch_size=5)
    next(stream)
    state = stream.state_dict()
    assert len(state["shards"]) == 2
    for count in (7, 9):
        other = Stream([Faulty(rows(0, count)), rows(8, 16)], 6, batch_size=5)
        with pytest.raises(CheckpointError, match=f"has {count} rows, and had 8"):
            other.load_state_dict(state)


# --- drift -------------------------------------------------------------------------------------


def test_drifts_are_marked_saved_and_resumed():
    losses = [0.1] * 150 + [0.9] * 150

    def run(stop: int, stream: Stream) -> list[int]:
        return [
            stream.position
            for _, t in zip(range(stop), iter(lambda: stream.position, -1), strict=False)
            if next(stream) and stream.observe(torch.tensor(losses[t]))
        ]

    def fresh() -> Stream:
        return Stream(rows(0, 300), 10, ADWIN(), batch_size=1)

    whole = fresh()
    expected = run(300, whole)
    assert expected == whole.drifts != []
    half = fresh()
    run(160, half)
    again = fresh()
    again.load_state_dict(json.loads(json.dumps(half.state_dict())))
    run(140, again)
    assert again.drifts == expected
    assert again.state_dict() == whole.state_dict()


def test_what_cannot_be_observed_changes_nothing():
    stream = Stream(rows(0, 4), 1, PageHinkley(), batch_size=1)
    before = stream.state_dict()
    for bad in (float("nan"), torch.tensor(float("inf")), torch.zeros(2)):
        with pytest.raises(InputError, match="observe"):
            stream.observe(bad)
    assert stream.state_dict() == before
    with pytest.raises(InputError, match=r"data.ADWIN\(\)"):
        Stream(rows(0, 4), 1, batch_size=1).observe(0.5)


def test_a_state_with_a_detector_wants_one():
    stream = Stream(rows(0, 4), 1, PageHinkley(), batch_size=1)
    stream.observe(0.5)
    state = stream.state_dict()
    other = Stream(rows(0, 4), 1, ADWIN(), batch_size=1)
    with pytest.raises(CheckpointError, match="no state of ADWIN"):
        other.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"PageHinkley.*has none"):
        Stream(rows(0, 4), 1, batch_size=1).load_state_dict(state)


def test_detectors_of_river_work_and_say_that_they_cannot_be_saved():
    stream = Stream(rows(0, 4), 1, drift.ADWIN(), batch_size=1)
    ours = ADWIN()
    stream.state_dict()  # not used yet: nothing is lost
    rng = np.random.default_rng(0)
    values = [*rng.random(200), *(rng.random(200) + 1)]
    assert [stream.observe(v) for v in values] == [ours.update(v) for v in values]
    assert len(stream.drifts) >= 1
    with pytest.raises(CheckpointError, match="detector ADWIN has no state_dict"):
        stream.state_dict()


# --- files that come later -----------------------------------------------------------------------


def put(folder: Path, name: str, batch: Batch) -> None:
    save_file({"x": batch.x, "y": batch.y}, folder / f".{name}.tmp")
    os.rename(folder / f".{name}.tmp", folder / name)


def test_a_follower_takes_files_when_they_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "_POLL_S", 0.001)
    put(tmp_path, "a.safetensors", rows(0, 5))
    (tmp_path / "z.safetensors.tmp").write_bytes(b"half")
    (tmp_path / ".z.safetensors").write_bytes(b"half")
    stream = Stream(tmp_path, 3, batch_size=2, follow=True)
    got: list[int] = []
    done = threading.Thread(target=lambda: got.extend(labels(stream)))
    done.start()
    put(tmp_path, "b.safetensors", rows(5, 9))
    put(tmp_path, "c.safetensors", rows(9, 13))
    while stream.position < 10:  # of 13 rows two stay in the window, one waits for its batch
        assert done.is_alive()
    stream.stop()
    done.join()
    expected = labels(Stream(rows(0, 13), 3, batch_size=2))
    assert got == expected[:10]
    again = Stream(tmp_path, 3, batch_size=2, follow=0.01)
    again.load_state_dict(stream.state_dict())
    assert got + labels(again) == expected


def test_a_resumed_follower_takes_what_was_added(tmp_path):
    put(tmp_path, "a.safetensors", rows(0, 6))
    stream = Stream(tmp_path, 2, batch_size=2)
    start = next(stream).y.tolist()
    state = stream.state_dict()
    put(tmp_path, "b.safetensors", rows(6, 9))
    with pytest.raises(CheckpointError, match="follow=True"):
        Stream(tmp_path, 2, batch_size=2).load_state_dict(state)
    again = Stream(tmp_path, 2, batch_size=2, follow=0.01)
    again.load_state_dict(state)
    assert start + labels(again) == labels(Stream(rows(0, 9), 2, batch_size=2))


def test_a_file_that_comes_too_late_is_an_error(tmp_path):
    put(tmp_path, "b.safetensors", rows(0, 4))
    stream = Stream(tmp_path, 1, batch_size=3, follow=0.01)
    next(stream)
    put(tmp_path, "a.safetensors", rows(4, 8))
    with pytest.raises(InputError, match=r"'a.safetensors' sorts before 'b.safetensors'"):
        next(stream)
    os.rename(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert labels(stream) == [3, 4, 5, 6, 7]


def test_an_empty_folder_may_be_followed(tmp_path):
    with pytest.raises(MissingDataError, match="holds nothing"):
        Stream(tmp_path, 1, batch_size=2)
    stream = Stream(tmp_path, 1, batch_size=2, follow=0.01)
    assert labels(stream) == []
    put(tmp_path, "a.safetensors", rows(0, 3))
    assert labels(stream) == [0, 1, 2]


def test_a_damaged_file_can_be_replaced_and_read_on(tmp_path):
    put(tmp_path, "a.safetensors", rows(0, 4))
    put(tmp_path, "b.safetensors", rows(4, 8))
    whole = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(whole[:-9])
    stream = Stream(tmp_path, 1, batch_size=2)
    got: list[int] = []
    with pytest.raises(InputError, match=r"b\.safetensors is no readable"):
        got.extend(y for batch in stream for y in batch.y.tolist())
    assert got == [0, 1, 2, 3]
    os.remove(tmp_path / "b.safetensors")
    with pytest.raises(MissingDataError, match=r"b\.safetensors is not there"):
        next(stream)
    (tmp_path / "b.safetensors").write_bytes(whole)
    assert labels(stream) == [4, 5, 6, 7]


def test_a_shard_that_is_repaired_with_fewer_rows_is_refused():
    shard = Faulty(rows(0, 600))
    stream = Stream([shard], 1, batch_size=250)
    next(stream), next(stream)
    shard.answer = InputError("broken")
    with pytest.raises(InputError, match="broken"):
        next(stream)
    shard.batch = shard.answer = rows(0, 300)
    with pytest.raises(CheckpointError, match="has 300 rows, and had 512"):
        next(stream)
    shard.batch = shard.answer = rows(0, 600)
    assert labels(stream) == list(range(500, 600))


def test_a_stopped_stream_keeps_its_window():
    stream = Stream(rows(0, 20), 8, batch_size=4)
    got = next(stream).y.tolist()
    stream.stop()
    assert list(stream) == []
    again = Stream(rows(0, 20), 8, batch_size=4)
    again.load_state_dict(stream.state_dict())
    assert got + labels(again) == labels(Stream(rows(0, 20), 8, batch_size=4))


def test_changed_and_missing_files_are_named_on_resume(tmp_path):
    put(tmp_path, "a.safetensors", rows(0, 4))
    put(tmp_path, "b.safetensors", rows(4, 8))
    stream = Stream(tmp_path, 3, batch_size=3)
    next(stream), next(stream)
    state = stream.state_dict()
    put(tmp_path, "a.safetensors", rows(0, 3))
    with pytest.raises(CheckpointError, match=r"'a.safetensors' is not what it was"):
        Stream(tmp_path, 3, batch_size=3).load_state_dict(state)
    os.remove(tmp_path / "a.safetensors")
    with pytest.raises(MissingDataError, match=r"'a.safetensors', which is not there"):
        Stream(tmp_path, 3, batch_size=3).load_state_dict(state)

"""The durable store: after a kill what was acknowledged is there, and goes on bit for bit."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import random
import resource
import signal
import struct
import tempfile
import threading
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera.data import ReplayBuffer, durable
from tessera.data.generations import read_manifest, write_manifest
from tessera.data.records import RecordReader, RecordWriter
from tessera.data.replay_reader import ReplayReader
from tessera.errors import CheckpointError, InputError, StorageError

POLICIES = ("reservoir", "ring", "class_balanced", "prioritized")
CAPACITY, BATCH, STEPS = 60, 7, 40


def rows(start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Row i is recognisable: x[i] is constant, y[i] a label that follows from it."""
    t = torch.arange(start, stop)
    return t.float()[:, None].repeat(1, 5), t * 7 % 5


def whole(x: Tensor, y: Tensor) -> bool:
    t = x[:, 0].long()
    return bool((x == x[:, :1]).all() and (y == t * 7 % 5).all())


def built(policy: str, path: Path | None = None, *, capacity: int = CAPACITY) -> ReplayBuffer:
    return ReplayBuffer(capacity, policy, seed=3, path=path)


def step(buffer: ReplayBuffer, at: int, batch: int = BATCH) -> list[Tensor]:
    """What a loop does with its batch number `at`; what it drew."""
    x, y = rows(at * batch, (at + 1) * batch)
    if buffer.state_dict()["policy"] == "prioritized" and len(buffer):
        drawn, positions, weights = buffer.draw(6)
        buffer.update_priorities(positions, (positions % 13 + 1) * weights)
    else:
        drawn = buffer.sample_like(x, 0.3)
    buffer.add(x, y)
    return list(drawn)


def go_on(buffer: ReplayBuffer, until: int = STEPS) -> list[Tensor]:
    """Steps from where the stream stands, found by `seen` alone; all that was drawn."""
    drawn = []
    for at in range(buffer.seen // BATCH, until):
        drawn += step(buffer, at)
    return drawn


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict):
        assert isinstance(b, dict)
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def same(a: ReplayBuffer, b: ReplayBuffer) -> bool:
    """Whether they hold the same, and draw the same next."""
    if not equal(a.state_dict(), b.state_dict()):
        return False
    drawn = [buffer.sample(9) if len(buffer) else () for buffer in (a, b)]
    return all(torch.equal(p, q) for p, q in zip(*drawn, strict=True))


def uninterrupted(policy: str, steps: int) -> ReplayBuffer:
    buffer = built(policy)
    go_on(buffer, steps)
    return buffer


@contextlib.contextmanager
def child(body: Callable[[], None]) -> Iterator[int]:
    """A forked process that does `body`; afterwards it has ended, in peace unless it was killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        process = os.fork()
    if not process:
        status = 1
        try:
            torch.set_num_threads(1)
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield process
    finally:
        _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL), "see the traceback of the child above"


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system has such a folder: a kill is survived by the page cache alone."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generations of a few kilobytes, so that a short run goes through many."""
    monkeypatch.setattr(durable, "_GENERATION_BYTES", 3000)
    monkeypatch.setattr(durable, "_SWEEP_BYTES", 400)


def generations(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.rec"))


# --- killed ----------------------------------------------------------------------------------


def killed_after(folder: Path, policy: str, acknowledged: int, delay_s: float) -> int:
    """Run the loop in a child, kill it soon after so many additions; the last it acknowledged."""
    read, write = os.pipe()

    def body() -> None:
        buffer = built(policy, folder)
        for at in range(STEPS):
            step(buffer, at)
            os.write(write, struct.pack("<q", buffer.seen))

    last = 0
    with child(body) as process:
        os.close(write)
        while last < acknowledged * BATCH:
            last = struct.unpack("<q", os.read(read, 8))[0]
        end = time.perf_counter() + delay_s
        while time.perf_counter() < end:
            pass
        os.kill(process, signal.SIGKILL)
    while word := os.read(read, 8):
        last = struct.unpack("<q", word)[0]
    os.close(read)
    return last


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_killed_anywhere_it_opens_whole_and_goes_on_bit_for_bit(tmp_path, policy, small):
    """50 times each: small generations, so that many a kill hits one being begun or dropped."""
    rng = random.Random(policy)
    expected = [uninterrupted(policy, steps) for steps in range(STEPS + 1)]
    cuts = 0
    for trial in range(50):
        folder = tmp_path / str(trial)
        last = killed_after(folder, policy, rng.randrange(STEPS - 3), rng.random() * 1.5e-3)
        with built(policy, folder) as buffer:
            assert last <= buffer.seen <= last + BATCH
            assert buffer.seen % BATCH == 0
            state = buffer.state_dict()
            assert not state["rows"] or whole(state["rows"]["x"], state["rows"]["y"])
            steps = buffer.seen // BATCH
            assert equal(state, expected[steps].state_dict())
            cuts += 0 < steps < STEPS
            reference = copy.deepcopy(expected[steps])
            assert equal(dict(enumerate(go_on(buffer))), dict(enumerate(go_on(reference))))
            assert same(buffer, reference)
            assert equal(reference.state_dict()["rows"], expected[STEPS].state_dict()["rows"])
    assert cuts > 35, "the kills missed the loop"


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, small):
    """One folder, killed at every few steps, gives what one run gives."""
    rng = random.Random(0)
    for goal in range(2, STEPS, 4):
        killed_between(tmp_path / "store", goal, rng.random() * 1e-3)
    with built("class_balanced", tmp_path / "store") as buffer:
        go_on(buffer)
        assert same(buffer, uninterrupted("class_balanced", STEPS))


def killed_between(folder: Path, goal: int, delay_s: float) -> None:
    read, write = os.pipe()

    def body() -> None:
        buffer = built("class_balanced", folder)
        for at in range(buffer.seen // BATCH, STEPS):
            step(buffer, at)
            if at >= goal:
                os.write(write, b"!")

    with child(body) as process:
        os.close(write)
        os.read(read, 1)
        time.sleep(delay_s)
        os.kill(process, signal.SIGKILL)
    os.close(read)


class _Stopped(BaseException):
    """Stands for the death of the process."""


@pytest.mark.parametrize("policy", ["ring", "reservoir"])
def test_dead_before_any_system_call_it_opens(tmp_path, policy, small, monkeypatch):
    """Every call that changes the folder is once the one that was not made any more."""
    names = ("pwritev", "ftruncate", "fsync", "unlink", "replace", "open")
    real = {name: getattr(os, name) for name in names}
    left, dead = 0, False

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left, dead
            left -= 1
            if left < 0:
                dead = True
            if dead:
                raise _Stopped
            return real[name](*args, **kwargs)

        return call

    expected = [uninterrupted(policy, steps) for steps in range(21)]
    for calls in itertools.count(0, 1):
        folder, acknowledged = tmp_path / str(calls), 0
        left, dead = calls, False
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, counted(name))
            with contextlib.suppress(_Stopped, StorageError):
                buffer = built(policy, folder)
                for at in range(20):
                    step(buffer, at)
                    acknowledged = at + 1
                buffer = None
        finished = not dead
        buffer = None
        with built(policy, folder) as again:
            steps = again.seen // BATCH
            assert acknowledged <= steps <= acknowledged + 1
            assert equal(again.state_dict(), expected[steps].state_dict())
        if finished:
            break
    assert calls > 60


# --- damaged ---------------------------------------------------------------------------------


def put(path: Path, content: bytes) -> None:
    """Change a file in place: some file systems wait for the disk when one is emptied first."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def filled(folder: Path, policy: str = "reservoir", steps: int = 6) -> list[int]:
    """A closed store of one generation, and where its records end."""
    with built(policy, folder) as buffer:
        go_on(buffer, steps)
    return [record.stop for record in RecordReader(folder / "00000001.rec")]


@pytest.mark.parametrize("policy", POLICIES)
def test_cut_at_every_byte_of_the_last_record_it_opens_to_the_one_before(tmp_path, policy):
    folder = tmp_path / "store"
    stops = filled(folder, policy)
    path = folder / "00000001.rec"
    content = path.read_bytes()
    assert len(stops) == 6
    before = uninterrupted(policy, 5).state_dict()
    for length in range(stops[-2], stops[-1]):
        put(path, content[:length])
        with built(policy, folder) as buffer:
            assert equal(buffer.state_dict(), before)
            assert path.stat().st_size == stops[-2]


@pytest.mark.parametrize("policy", ["class_balanced", "prioritized"])
def test_a_bit_flipped_in_the_last_record_undoes_it_in_an_earlier_one_is_refused(tmp_path, policy):
    folder = tmp_path / "store"
    stops = filled(folder, policy)
    path = folder / "00000001.rec"
    content = path.read_bytes()
    before = uninterrupted(policy, 5).state_dict()
    for at in range(len(content)):
        last = at >= stops[-2]
        header = at < 24 or any(stop <= at < stop + 40 for stop in stops)
        if not (header or last or at % 7 == 0):
            continue
        for bit in range(8) if header and at > stops[-4] else (at % 8,):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            put(path, bytes(damaged))
            if last:
                with built(policy, folder) as buffer:
                    assert equal(buffer.state_dict(), before)
            else:
                with pytest.raises(CheckpointError, match=r"00000001\.rec"):
                    built(policy, folder)
                assert path.read_bytes() == bytes(damaged)


def test_a_bit_flipped_in_the_manifest_is_refused(tmp_path):
    folder = tmp_path / "store"
    filled(folder)
    path = folder / "manifest.json"
    content = path.read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 7
        put(path, bytes(damaged))
        with pytest.raises(CheckpointError, match="store"):
            built("reservoir", folder)
        with pytest.raises(CheckpointError, match="store"):
            ReplayReader(folder)
    path.write_bytes(content)
    built("reservoir", folder).close()


def two_generations(folder: Path) -> None:
    """A store that needs two generations: the second does not hold all slots yet."""
    with built("ring", folder, capacity=600) as buffer:
        while len(read_manifest(folder)[1]) < 2:
            step(buffer, buffer.seen // BATCH)
        step(buffer, buffer.seen // BATCH)
    assert len(read_manifest(folder)[1]) == 2


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "record away", "longer", "other"])
def test_a_generation_that_is_needed_and_not_right_is_named(tmp_path, small, damage):
    folder = tmp_path / "store"
    two_generations(folder)
    first, second = read_manifest(folder)[1]
    path = folder / first
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        path.write_bytes((folder / second).read_bytes())
    else:
        stops = [record.stop for record in RecordReader(path)]
        content = path.read_bytes()
        length = {"short": stops[-1] - 1, "record away": stops[-2], "longer": stops[-1]}[damage]
        path.write_bytes(content[:length] + (b"more" if damage == "longer" else b""))
    named = second if damage == "empty" else first
    for _ in range(2):
        with pytest.raises(CheckpointError, match=first):
            built("ring", folder, capacity=600)
        with pytest.raises(CheckpointError, match=first):
            ReplayReader(folder)
    assert named in (first, second)


def test_a_young_generation_without_its_elder_is_refused(tmp_path, small):
    """Were the manifest wrong, rows would be missing; that is noticed."""
    folder = tmp_path / "store"
    two_generations(folder)
    settings, names = read_manifest(folder)
    write_manifest(folder, settings, names[1:])
    with pytest.raises(CheckpointError, match="do not hold all"):
        built("ring", folder, capacity=600)


def test_leftovers_that_do_not_count_are_removed(tmp_path, small):
    folder = tmp_path / "store"
    two_generations(folder)
    RecordWriter(folder / "00000099.rec").close()
    (folder / "00000098.rec").write_bytes(b"half")
    with built("ring", folder, capacity=600) as buffer:
        assert generations(folder) == read_manifest(folder)[1]
        go_on(buffer, 200)
        assert generations(folder) == read_manifest(folder)[1]
        x, y = buffer.sample(600)
        assert whole(x, y)


# --- files made to do harm -------------------------------------------------------------------

FORGERIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"seen": None}, {}),
    ({"seen": -1}, {}),
    ({"seen": 1 << 70}, {}),
    ({"seen": True}, {}),
    ({"seen": "7"}, {}),
    ({"draws": -1}, {}),
    ({"draws": []}, {}),
    ({"carry": 5.0}, {}),
    ({"carry": "a"}, {}),
    ({"rule": []}, {}),
    ({"rule": {}}, {}),
    ({"rule": {"origins": {"a": 1}}}, {}),
    ({"rule": {"origins": {"1": 99999}}}, {}),
    ({"rule": {"origins": 3}}, {}),
    ({"sweep": 3}, {}),
    ({"sweep": ["a", {}]}, {}),
    ({"schema": 3}, {}),
    ({"schema": [["float32", [5]]]}, {}),
    ({"schema": [["float32", [5]], ["load", []]]}, {}),
    ({"schema": [["float32", [-5]], ["int64", []]]}, {}),
    ({"schema": [["float32", [1 << 50]], ["int64", []]]}, {}),
    ({"schema": [["float32", [1 << 30, 1 << 30]], ["int64", []]]}, {}),
    ({"schema": [["float32", [4]], ["int64", []]]}, {}),
    ({"schema": [["float64", [5]], ["int64", []]]}, {}),
    ({"schema": [["complex128", [5]], ["int64", []]]}, {}),
    ({"schema": None}, {}),
    ({}, {"slots": np.arange(7, dtype=np.int32)}),
    ({}, {"slots": np.arange(7) - 1}),
    ({}, {"slots": np.arange(7) + 1}),
    ({}, {"slots": np.arange(7) * (1 << 50)}),
    ({}, {"slots": np.arange(14).reshape(7, 2)}),
    ({}, {"slots": np.arange(6)}),
    ({}, {"slots": None}),
    ({}, {"known/keys": np.arange(6, dtype=np.uint64)}),
    ({}, {"known/keys": np.arange(7, dtype=np.float32)}),
    ({}, {"known/keys": np.zeros(7, np.uint64)}),
    ({}, {"known/keys": None}),
    ({}, {"known/more": np.arange(7)}),
    ({}, {"rows/x": np.zeros((8, 5), np.int32)}),
    ({}, {"rows/x": np.zeros((7, 4), np.int32)}),
    ({}, {"rows/x": np.zeros((6, 5), np.int32)}),
    ({}, {"rows/x": np.zeros((7, 5), np.int64)}),
    ({}, {"rows/x": np.full((7, 5), 0x7FC00000, np.int32)}),  # NaN
    ({}, {"rows/y": None}),
]


@pytest.mark.parametrize("forgery", range(len(FORGERIES)))
def test_a_forged_change_is_refused(tmp_path, forgery):
    """True checksums around false values."""
    folder = tmp_path / "store"
    filled(folder, steps=1)
    path = folder / "00000001.rec"
    (record,) = RecordReader(path)
    heads, parts = FORGERIES[forgery]
    arrays = {n: a for n, a in {**record.arrays, **parts}.items() if a is not None}
    path.unlink()
    writer = RecordWriter(path)
    writer.append({**record.head, **heads}, arrays)
    writer.close()
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        built("reservoir", folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    with contextlib.suppress(CheckpointError, InputError):  # it looks at less; it may not crash
        ReplayReader(folder).sample(5)


def test_the_untouched_change_is_taken(tmp_path):
    """Of the test above: it is the forgeries that are refused."""
    folder = tmp_path / "store"
    filled(folder, steps=1)
    path = folder / "00000001.rec"
    (record,) = RecordReader(path)
    head, arrays = record.head, {name: array.copy() for name, array in record.arrays.items()}
    path.unlink()
    writer = RecordWriter(path)
    writer.append(head, arrays)
    writer.close()
    with built("reservoir", folder) as buffer:
        assert same(buffer, uninterrupted("reservoir", 1))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"store": "tessera replay"}', b"\xff\xfe"],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    folder = tmp_path / "store"
    filled(folder, steps=1)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        built("reservoir", folder)


def test_a_newer_version_says_so(tmp_path):
    folder = tmp_path / "store"
    filled(folder, steps=1)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(CheckpointError, match="has version 2, this Tessera reads 1; install"):
        built("reservoir", folder)


# --- a full disk -----------------------------------------------------------------------------


@contextlib.contextmanager
def room(folder: Path, more: int) -> Iterator[None]:
    """No file may become longer than the longest of the folder and `more` bytes."""
    longest = max(path.stat().st_size for path in folder.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (longest + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_disk_loses_nothing_acknowledged(tmp_path, policy):
    folder = tmp_path / "store"

    def body() -> None:
        reference = built(policy)
        buffer = built(policy, folder)
        with room(folder, -1000), pytest.raises(StorageError, match="could not"):
            buffer.add(*rows(0, BATCH))
        assert equal(buffer.state_dict(), reference.state_dict())
        go_on(buffer, 15)
        go_on(reference, 15)
        for more in (0, 1, 30, 100):
            x, y = rows(buffer.seen, buffer.seen + BATCH)
            if policy == "prioritized":  # what was set since the last batch is not lost either
                _, positions, _ = buffer.draw(4)
                assert torch.equal(positions, reference.draw(4)[1])
                for one in (buffer, reference):
                    one.update_priorities(positions, positions + 2.0)
            else:
                assert equal(
                    dict(enumerate(buffer.sample_like(x, 0.4))),
                    dict(enumerate(reference.sample_like(x, 0.4))),
                )
            for _ in range(2):
                with room(folder, more), pytest.raises(StorageError, match="then add again"):
                    buffer.add(x, y)
                assert equal(buffer.state_dict(), reference.state_dict())
                assert ReplayReader(folder).seen == buffer.seen
            buffer.add(x, y)
            reference.add(x, y)
            assert equal(buffer.state_dict(), reference.state_dict())
        go_on(buffer, 30)
        go_on(reference, 30)
        buffer.close()
        with built(policy, folder) as again:
            assert same(again, reference)

    with child(body):
        pass


def test_a_disk_that_fills_up_while_a_generation_begins(tmp_path, small):
    """Whatever step of it fails, the state is the last acknowledged one, here and reopened."""
    folder = tmp_path / "store"

    def body() -> None:
        failed = 0
        reference, buffer = built("ring"), built("ring", folder)
        for at in range(60):
            x, y = rows(at * BATCH, at * BATCH + BATCH)
            less = random.Random(at).randrange(4000) if at else -10_000
            with contextlib.suppress(StorageError), room(folder, -less):
                buffer.add(x, y)
            if buffer.seen == reference.seen:
                assert equal(buffer.state_dict(), reference.state_dict())
                failed += 1
                buffer.add(x, y)
            reference.add(x, y)
            assert equal(buffer.state_dict(), reference.state_dict())
        assert 5 < failed < 60
        assert int(generations(folder)[-1][:8]) > 5
        buffer.close()
        with built("ring", folder) as again:
            assert same(again, reference)

    with child(body):
        pass


def test_an_interrupt_inside_an_addition_leaves_memory_and_folder_alike(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    buffer, reference = built("class_balanced", folder), built("class_balanced")
    go_on(buffer, 20)
    go_on(reference, 20)
    real = os.pwritev
    for after in (False, True):

        def interrupted(*args: Any, after: bool = after) -> int:
            if after:
                real(*args)
            raise KeyboardInterrupt

        x, y = rows(buffer.seen, buffer.seen + BATCH)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", interrupted)
            with pytest.raises(KeyboardInterrupt):
                buffer.add(x, y)
        if after:  # it was written: it is there, and `seen` tells
            reference.add(*rows(reference.seen, reference.seen + BATCH))
        assert equal(buffer.state_dict(), reference.state_dict())
    buffer.close()
    with built("class_balanced", folder) as again:
        assert same(again, reference)


def test_a_store_that_cannot_be_read_again_says_so_and_takes_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    buffer = built("ring", folder)
    go_on(buffer, 3)
    path = folder / "00000001.rec"
    content = path.read_bytes()
    with monkeypatch.context() as patch:

        def gone(*args: Any) -> int:
            path.unlink()
            raise OSError(5, "Input/output error")

        patch.setattr(os, "pwritev", gone)
        with pytest.raises(StorageError, match="Input/output error"):
            buffer.add(*rows(21, 28))
    for call in (lambda: buffer.add(*rows(21, 28)), lambda: buffer.sample(1), lambda: len(buffer)):
        with pytest.raises(StorageError, match=r"00000001\.rec cannot be read.*anew"):
            call()
    buffer.close()
    path.write_bytes(content)
    with built("ring", folder) as again:
        assert same(again, uninterrupted("ring", 3))


# --- one writer, many readers ----------------------------------------------------------------


def test_a_second_writer_is_refused(tmp_path):
    folder = tmp_path / "store"
    buffer = built("ring", folder)
    go_on(buffer, 3)

    def body() -> None:
        with pytest.raises(StorageError, match=r"has a writer already; close\(\) that one"):
            built("ring", folder)
        # Nor may a forked copy of the writer write.
        with pytest.raises(InputError, match="opened before this process was forked off"):
            buffer.add(*rows(21, 28))
        assert len(buffer.sample(5)[0]) == 5
        buffer.close()

    with pytest.raises(StorageError, match="has a writer already"):
        built("ring", folder)
    with child(body):
        pass
    with pytest.raises(StorageError, match="has a writer already"):
        built("ring", folder)
    go_on(buffer, 5)
    buffer.close()
    with built("ring", folder) as again:
        assert same(again, uninterrupted("ring", 5))


def test_a_buffer_that_nobody_holds_lets_go(tmp_path):
    buffer = built("ring", tmp_path)
    go_on(buffer, 3)
    del buffer
    with built("ring", tmp_path) as again:
        assert again.seen == 3 * BATCH


@pytest.mark.parametrize("policy", POLICIES)
def test_readers_in_other_processes_see_complete_states_only(tmp_path, policy, small):
    folder = tmp_path / "store"
    held = [sorted(uninterrupted(policy, s).state_dict()["rows"].get("x", torch.empty(0, 1))[:, 0]
                   .tolist()) for s in range(STEPS + 1)]  # fmt: skip
    buffer = built(policy, folder)
    step(buffer, 0)
    ready, go = os.pipe()

    def body() -> None:
        os.close(ready)
        reader = ReplayReader(folder)
        os.write(go, b"!")
        states, refreshes = set(), 0
        while reader.seen < STEPS * BATCH:
            reader.refresh()
            refreshes += 1
            x, y = reader.sample(CAPACITY)
            assert whole(x, y)
            assert sorted(x[:, 0].tolist()) == held[reader.seen // BATCH]
            states.add(reader.seen)
        assert len(states) > 3, "it saw the end only"

    with child(body), child(body):
        os.close(go)
        assert os.read(ready, 1) + os.read(ready, 1) == b"!!"
        for at in range(1, STEPS):
            step(buffer, at)
            time.sleep(1e-3)
    os.close(ready)
    buffer.close()


def test_a_reader_survives_the_deletion_of_what_it_reads(tmp_path, small):
    folder = tmp_path / "store"
    buffer = built("ring", folder)
    go_on(buffer, 8)
    reader = ReplayReader(folder)
    first = generations(folder)
    go_on(buffer, STEPS)
    assert not set(first) & set(generations(folder))
    x, y = reader.sample(CAPACITY)
    assert reader.seen == 8 * BATCH
    assert sorted(x[:, 0].tolist()) == list(range(8 * BATCH))[-CAPACITY:]
    assert reader.refresh() == buffer.seen
    x, y = reader.sample(CAPACITY)
    assert sorted(x[:, 0].tolist()) == list(range(STEPS * BATCH))[-CAPACITY:]
    assert whole(x, y)
    buffer.load_state_dict(uninterrupted("ring", 9).state_dict())  # back in the stream
    assert reader.refresh() == 9 * BATCH
    assert sorted(reader.sample(CAPACITY)[0][:, 0].tolist()) == list(range(3, 63))
    buffer.close()


def test_what_a_reader_offers(tmp_path):
    folder = tmp_path / "store"
    buffer = ReplayBuffer(50, path=folder, fields=("x", "y", "half"))
    reader = ReplayReader(folder, seed=1)
    assert (len(reader), reader.seen, reader.fields) == (0, 0, ("x", "y", "half"))
    with pytest.raises(InputError, match="nothing to draw from"):
        reader.sample(1)
    x, y = rows(0, 30)
    buffer.add(x, y, x[:, 0].bfloat16())
    assert len(reader) == 0
    assert reader.refresh() == 30
    drawn = reader.sample(6)
    assert [part.dtype for part in drawn] == [torch.float32, torch.int64, torch.bfloat16]
    assert torch.equal(drawn[0][:, 0], drawn[2].float())
    others = [ReplayReader(folder, seed=seed) for seed in (1, 2)]
    assert torch.equal(others[0].sample(6)[0], drawn[0])
    assert not torch.equal(others[1].sample(6)[0], drawn[0])
    assert not torch.equal(reader.sample(6)[0], drawn[0])
    assert len(reader.sample(99)[0]) == 30
    with pytest.raises(InputError, match="whole n >= 0"):
        reader.sample(-1)
    with pytest.raises(CheckpointError, match="no replay store"):
        ReplayReader(tmp_path)
    buffer.close()


def test_readers_in_threads_beside_the_writer(tmp_path, small):
    folder = tmp_path / "store"
    buffer = built("ring", folder)
    step(buffer, 0)
    reader, stop, problems = ReplayReader(folder), threading.Event(), []

    def read() -> None:
        try:
            while not stop.is_set():
                reader.refresh()
                x, y = reader.sample(20)
                assert whole(x, y)
                assert len(reader) <= reader.seen
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for at in range(1, STEPS):
        step(buffer, at)
    stop.set()
    for thread in threads:
        thread.join()
    buffer.close()
    assert not problems


# --- the size of the folder ------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 40, 500])
@pytest.mark.parametrize("policy", ["ring", "reservoir"])
def test_the_folder_stays_a_small_multiple_of_the_rows(tmp_path, monkeypatch, policy, batch):
    """At most four times what is held, one minimal generation, and the heads of the records."""
    monkeypatch.setattr(durable, "_GENERATION_BYTES", 100_000)
    monkeypatch.setattr(durable, "_SWEEP_BYTES", 10_000)
    folder = tmp_path / "store"
    capacity, width = 500, 200
    x = torch.zeros(batch, width)
    live = capacity * (4 * width + 8 + 24)
    most = begun = 0
    with ReplayBuffer(capacity, policy, path=folder) as buffer:
        buffer.add(torch.zeros(capacity, width), torch.zeros(capacity, dtype=torch.int64))
        for _ in range(60_000 // batch // (8 if batch == 1 else 1)):
            buffer.add(x, torch.zeros(batch, dtype=torch.int64))
            most = max(most, sum(path.stat().st_size for path in folder.iterdir()))
        begun = int(generations(folder)[-1][:8])
        assert len(generations(folder)) <= 2
    assert begun > 1
    assert most < 4 * live + 100_000 + 3 * batch * 850


def test_priorities_alone_do_not_make_the_folder_grow(tmp_path, small):
    folder = tmp_path / "store"
    with built("prioritized", folder) as buffer:
        go_on(buffer, 20)
        size = sum(path.stat().st_size for path in folder.iterdir())
        for _ in range(200):
            _, positions, _ = buffer.draw(8)
            buffer.update_priorities(positions, torch.ones(8))
        assert sum(path.stat().st_size for path in folder.iterdir()) == size
        for _ in range(300):
            _, positions, _ = buffer.draw(8)
            buffer.update_priorities(positions, positions + 1.0)
            buffer.flush()
        assert sum(path.stat().st_size for path in folder.iterdir()) < 30_000
        state = buffer.state_dict()
    with built("prioritized", folder) as again:
        assert equal(again.state_dict(), state)


# --- opening, closing, settings --------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_closed_and_opened_it_is_as_in_memory(tmp_path, policy, small):
    """At every step: also what was drawn since the last batch."""
    folder, reference = tmp_path / "store", built(policy)
    for at in range(25):
        with built(policy, folder) as buffer:
            assert equal(buffer.state_dict(), reference.state_dict())
            assert same(buffer, reference)
            assert equal(dict(enumerate(step(buffer, at))), dict(enumerate(step(reference, at))))
            if len(buffer):
                assert torch.equal(buffer.sample(3)[0], reference.sample(3)[0])
    assert generations(folder)[-1] > "00000003.rec"


def test_draws_after_the_last_addition_are_drawn_again(tmp_path):
    folder = tmp_path / "store"
    with child(lambda: _draw_and_die(folder)) as process:
        assert process > 0
    with built("reservoir", folder) as buffer:
        assert equal(buffer.state_dict(), uninterrupted("reservoir", 10).state_dict())


def _draw_and_die(folder: Path) -> None:
    buffer = built("reservoir", folder)
    go_on(buffer, 10)
    buffer.sample(5)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"capacity": 70}, "made with capacity=60, this ReplayBuffer has capacity=70"),
        ({"policy": "ring"}, "made with policy='reservoir', this ReplayBuffer has policy='ring'"),
        ({"seed": 4}, "made with seed=3, this ReplayBuffer has seed=4"),
        ({"fields": ("x", "z")}, r"made with fields=\['x', 'y'\], this"),
    ],
)
def test_other_settings_are_refused_with_both_values_and_a_way_out(tmp_path, other, message):
    folder = tmp_path / "store"
    filled(folder, steps=2)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    settings: dict[str, Any] = {"capacity": CAPACITY, "policy": "reservoir", "seed": 3} | other
    with pytest.raises(CheckpointError, match=message + ".*give another path"):
        ReplayBuffer(path=folder, **settings)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    built("reservoir", folder).close()  # and the lock is free


def test_rows_of_another_shape_are_refused_and_nothing_written(tmp_path):
    folder = tmp_path / "store"
    filled(folder, steps=2)
    with built("reservoir", folder) as buffer:
        size = (folder / "00000001.rec").stat().st_size
        for bad in (torch.zeros(3, 4), torch.zeros(3, 5, dtype=torch.float64)):
            with pytest.raises(InputError, match="but the buffer holds rows of"):
                buffer.add(bad, torch.zeros(3, dtype=torch.int64))
        with pytest.raises(InputError, match="NaN"):
            buffer.add(torch.full((1, 5), torch.nan), torch.zeros(1, dtype=torch.int64))
        assert (folder / "00000001.rec").stat().st_size == size


@pytest.mark.parametrize("content", ["file", "folder", "no manifest"])
def test_what_is_no_store_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "mine"
    if content == "file":
        path.write_text("text")
        with pytest.raises(StorageError, match="could not make the folder"):
            built("ring", path)
        return
    if content == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("text")
    else:
        filled(path)
        (path / "manifest.json").unlink()
    before = sorted(path.iterdir())
    with pytest.raises(CheckpointError, match="is no replay store: it holds"):
        built("ring", path)
    assert sorted(path.iterdir()) == before


def test_a_folder_of_which_only_the_lock_was_made_is_begun(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "lock").write_bytes(b"")
    (folder / ".tessera-00-11.tmp").write_bytes(b"half")
    with built("ring", folder) as buffer:
        go_on(buffer, 2)


@pytest.mark.parametrize("path", [True, False])
def test_a_closed_buffer_says_so(tmp_path, path):
    buffer = built("prioritized", tmp_path / "store" if path else None)
    go_on(buffer, 2)
    buffer.flush()
    state = buffer.state_dict()
    buffer.close()
    buffer.close()
    calls: list[Callable[[], object]] = [
        lambda: buffer.add(*rows(0, 3)),
        lambda: buffer.sample(1),
        lambda: buffer.draw(1),
        lambda: buffer.sample_like(torch.zeros(2, 5)),
        lambda: buffer.update_priorities(torch.tensor([0]), torch.ones(1)),
        buffer.state_dict,
        lambda: buffer.load_state_dict(state),
        buffer.flush,
        lambda: copy.deepcopy(buffer),
        lambda: ReplayBuffer.merge([buffer]),
    ]
    for call in calls:
        with pytest.raises(InputError, match="was closed; build it again"):
            call()


def test_a_flush_that_fails_says_so_and_close_closes_all_the_same(tmp_path, monkeypatch):
    buffer = built("ring", tmp_path)
    go_on(buffer, 2)

    def broken(file: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(StorageError, match="could not flush"):
            buffer.flush()
    step(buffer, 2)  # what was promised without a flush still holds
    with pytest.raises(StorageError, match="an earlier flush failed"):
        buffer.close()
    with built("ring", tmp_path) as again:
        assert same(again, uninterrupted("ring", 3))


# --- states, copies, merges ------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_states_go_from_memory_to_disk_and_back(tmp_path, policy, small):
    folder, source = tmp_path / "store", uninterrupted(policy, 20)
    with built(policy, folder) as buffer:
        go_on(buffer, 35)
        buffer.load_state_dict(source.state_dict())
        assert len(generations(folder)) == 1
        assert equal(buffer.state_dict(), source.state_dict())
        step(buffer, 20)
    reference = uninterrupted(policy, 21)
    with built(policy, folder) as buffer:
        assert equal(buffer.state_dict(), reference.state_dict())
        inside = built(policy)
        inside.load_state_dict(buffer.state_dict())
        twin = copy.deepcopy(buffer)
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert equal(inside.state_dict(), twin.state_dict())
        go_on(twin, 30)  # in memory only: the folder is the original's
        assert sum(path.stat().st_size for path in folder.iterdir()) == size
        go_on(buffer, 30)
        assert same(buffer, twin)
        buffer.load_state_dict(built(policy).state_dict())
        assert (len(buffer), buffer.seen) == (0, 0)
    with built(policy, folder) as buffer:
        assert same(buffer, built(policy))
        go_on(buffer, 5)
        assert same(buffer, uninterrupted(policy, 5))


def test_a_damaged_state_changes_neither_memory_nor_folder(tmp_path):
    with built("ring", tmp_path) as buffer:
        go_on(buffer, 4)
        before = buffer.state_dict()
        files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        with pytest.raises(CheckpointError, match="damaged replay state"):
            buffer.load_state_dict(before | {"seen": 9999})
        assert equal(buffer.state_dict(), before)
        assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == files


def test_a_state_that_does_not_fit_the_disk_changes_nothing(tmp_path):
    folder = tmp_path / "store"

    def body() -> None:
        buffer = built("ring", folder)
        go_on(buffer, 4)
        before = buffer.state_dict()
        with room(folder, -100), pytest.raises(StorageError):
            buffer.load_state_dict(uninterrupted("ring", 30).state_dict())
        assert equal(buffer.state_dict(), before)
        buffer.close()
        with built("ring", folder) as again:
            assert same(again, uninterrupted("ring", 4))
            again.load_state_dict(uninterrupted("ring", 30).state_dict())
            assert same(again, uninterrupted("ring", 30))

    with child(body):
        pass


def test_large_states_are_logged_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "_COPY_BYTES", 1000)
    source = uninterrupted("class_balanced", 30)
    with built("class_balanced", tmp_path) as buffer:
        buffer.load_state_dict(source.state_dict())
    assert len(list(RecordReader(tmp_path / "00000001.rec"))) > 3
    with built("class_balanced", tmp_path) as buffer:
        assert same(buffer, source)


def test_durable_shards_are_merged_as_those_in_memory(tmp_path):
    def shards(root: Path | None) -> list[ReplayBuffer]:
        found = []
        for seed in range(3):
            path = None if root is None else root / str(seed)
            shard = ReplayBuffer(30, seed=seed, path=path)
            go_on(shard, 10 + seed)
            if path is not None:
                shard.close()
                shard = ReplayBuffer(30, seed=seed, path=path)
            found.append(shard)
        return found

    one, two = ReplayBuffer.merge(shards(tmp_path)), ReplayBuffer.merge(shards(None))
    assert same(one, two)
    state = one.state_dict()
    kept = ReplayBuffer(30, seed=state["seed"], path=tmp_path / "whole")
    kept.load_state_dict(state)
    kept.close()
    with ReplayBuffer(30, seed=state["seed"], path=tmp_path / "whole") as again:
        assert same(again, one)
        go_on(again, 60)
        go_on(one, 60)
        assert same(again, one)


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_of_every_size_and_kind_of_row(tmp_path, policy, small):
    """No rows, one row, more than fit; scalars, bits, eighths of a float; fields of any name."""
    fields = ("y", "a/b", "ä", "bits", "tiny")
    sizes = [0, 1, 3, 0, 130, 64, 7, 61, 0, 1]
    reference = ReplayBuffer(60, policy, fields=fields)
    start = 0
    for size in sizes:
        t = torch.arange(start, start + size)
        batch = (
            t % 3,
            t.to(torch.float16)[:, None, None].expand(-1, 2, 3),
            t.double(),
            (t % 2 == 0)[:, None].expand(-1, 3),
            (t % 7).float().to(torch.float8_e4m3fn)[:, None],
        )
        with ReplayBuffer(60, policy, fields=fields, path=tmp_path) as buffer:
            buffer.add(*batch)
            reference.add(*batch)
            start += size
            state, expected = buffer.state_dict(), reference.state_dict()
            for one in (state, expected):
                one["rows"]["tiny"] = one["rows"]["tiny"].float()
            assert equal(state, expected)
    reader = ReplayReader(tmp_path)
    assert [part.dtype for part in reader.sample(3)] == [
        torch.int64, torch.float16, torch.float64, torch.bool, torch.float8_e4m3fn
    ]  # fmt: skip


def test_many_labels_are_logged_as_they_change(tmp_path):
    """The counts of 2000 labels are not written with every batch."""
    with ReplayBuffer(100, "class_balanced", path=tmp_path) as buffer:
        buffer.add(torch.zeros(2000, 1), torch.arange(2000))
        before = (tmp_path / "00000001.rec").stat().st_size
        for i in range(10):
            buffer.add(torch.zeros(1, 1), torch.tensor([i]))
        assert (tmp_path / "00000001.rec").stat().st_size - before < 10 * 700
        state = buffer.state_dict()
    with ReplayBuffer(100, "class_balanced", path=tmp_path) as again:
        assert equal(again.state_dict(), state)

"""A replay buffer that survives: a folder with a log of its changes.

The rows stay in memory. Every change is appended as one record (`generations` says what is in it)
to the newest of a few generation files. When that has grown, the next one begins: from then on each
change also logs some slots again, until the new generation holds all of them and the older ones
are deleted. So the folder stays a small multiple of the rows, and no addition waits for a copy.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tessera.data.generations import MANIFEST, Image, read_manifest, schema_of, write_manifest
from tessera.data.lock import Lock
from tessera.data.memory import Memory
from tessera.data.policies import Int64s
from tessera.data.records import RecordWriter
from tessera.data.rows import Place
from tessera.errors import CheckpointError, InputError, StorageError

__all__ = ["Durable"]

# A generation ends when it is longer than this, and than twice the rows held.
_GENERATION_BYTES = 64 << 20
# While a generation does not stand alone, each change logs this much again, or twice its own size.
_SWEEP_BYTES = 256 << 10
_COPY_BYTES = 16 << 20
_NONE = np.empty(0, np.int64)


@final
class Durable:
    """Keeps a memory and a folder that holds it too; who calls holds the buffer's lock.

    Args:
        path: The folder; made if it is missing.
        settings: Of the memory.

    Raises:
        CheckpointError: The folder is damaged, of other settings, or no replay store.
        StorageError: It cannot be written, or has a writer already.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self._folder = Path(path).absolute()
        self._settings = settings
        self._writer: RecordWriter | None = None
        self._names: list[str] = []
        self._sweep = [0, 0]
        self._schema: list[list[Any]] | None = None
        self._rule: dict[str, Any] = {}  # as logged in this generation
        self._counters: dict[str, Any] = {}  # as logged
        self._touched = np.zeros(settings["capacity"], bool)  # slots with a priority not logged,
        self._touches = False  # if any
        self._broken: BaseException | None = None
        _prepare(self._folder)
        self._lock = Lock(self._folder, "the replay store")
        try:
            if not (self._folder / MANIFEST).exists():
                write_manifest(self._folder, settings, [])
            self._memory = self._recover({}, {})
        except BaseException:
            self._release()
            raise

    @property
    def memory(self) -> Memory:
        """What is held.

        Raises:
            StorageError: The folder could not be read again after a failure.
        """
        if self._broken is not None:
            raise StorageError(
                f"the replay store {self._folder} could not be read again after a failed write "
                f"({self._broken}); build the ReplayBuffer anew"
            ) from self._broken
        return self._memory

    def put(self, values: Sequence[Tensor]) -> None:
        """Let checked rows arrive; with them is recorded what else has changed since the last.

        Raises:
            StorageError: They could not be recorded; they have not arrived.
        """
        self._check_open()
        memory = self.memory
        with self._or_as_before():
            self._log(memory, memory.put(values))

    def prioritize(self, positions: Tensor, priorities: Tensor) -> int:
        """As `ReplayBuffer.update_priorities`; recorded with the next rows, or by `flush`.

        Were it recorded at once, a loop that is killed before its next `add` could not go on from
        `seen`: nothing would tell that this step's priorities are set already.
        """
        self._check_open()
        memory = self.memory
        count = memory.prioritize(positions, priorities)
        given = positions.detach().cpu().numpy()
        self._touched[given[given >= memory.seen - memory.capacity] % memory.capacity] = True
        self._touches = True
        return count

    def replace(self, memory: Memory) -> None:
        """Be another memory.

        Raises:
            StorageError: It could not be logged; this is as it was.
        """
        self._check_open()
        with self._or_as_before():
            self._log_whole(memory)
            self._memory = memory

    def flush(self) -> None:
        """Record what has changed since the last rows arrived, and have the disk hold it all.

        Raises:
            StorageError: It could not.
        """
        self._check_open()
        memory = self.memory
        if self._counters != _counters(memory) or self._touches:
            with self._or_as_before():
                self._log(memory, [])
        if self._writer is not None:
            self._writer.sync()

    def close(self) -> None:
        """Flush, and let the next writer in.

        Raises:
            StorageError: It could not be flushed; it is closed nevertheless.
        """
        try:
            if self._broken is None and self._lock.held:
                self.flush()
        finally:
            self._release()

    def _release(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._lock.close()

    def _check_open(self) -> None:
        if not self._lock.held:
            raise InputError(
                f"the replay store {self._folder} is not open for writing here: it was closed, or "
                "opened before this process was forked off. Read it with ReplayReader"
            )

    # --- writing -----------------------------------------------------------------------------

    def _log(self, memory: Memory, places: Sequence[Place]) -> None:
        """Append a record: new rows in these slots, and what else has changed."""
        writer, old = self._writer, None
        row_bytes = _row_bytes(memory)
        done, goal = self._sweep
        limit = max(_GENERATION_BYTES, 2 * memory.held * row_bytes)
        if writer is None or (done >= goal and writer.bytes > limit):
            old, writer = writer, self._next_writer()
            done, goal = 0, 0 if old is None else memory.held
        index = np.concatenate([_NONE, *map(_indices, places)])
        again = max(_SWEEP_BYTES, 2 * row_bytes * len(index))
        stop = min(goal, done + -(-again // row_bytes))
        head = self._head(memory, writer) | {"sweep": [stop, goal]}
        if writer is not self._writer:
            head["after"] = None if old is None else [old.path.name, old.count, old.bytes]
        moved = np.concatenate([index, np.arange(done, stop)])
        self._append(writer, memory, head, moved, self._waiting())
        if writer is not self._writer:
            if old is not None:
                old.sync()
            self._begin(writer, [*self._names, writer.path.name])
        self._logged(memory, [stop, goal])
        if stop >= goal and len(self._names) > 1:
            self._drop(self._names[:-1])

    def _log_whole(self, memory: Memory) -> None:
        """Begin a generation that is all there is, and holds this memory."""
        writer = self._next_writer()
        step = max(1, _COPY_BYTES // _row_bytes(memory))
        for start in range(0, max(1, memory.held), step):
            stop = min(start + step, memory.held)
            head = self._head(memory, writer) | {"sweep": [stop, memory.held]}
            if not start:
                head["after"] = None
            self._append(writer, memory, head, np.arange(start, stop), _NONE)
        before = self._names
        self._begin(writer, [writer.path.name])
        self._logged(memory, [memory.held, memory.held])
        _remove(self._folder, before)

    def _next_writer(self) -> RecordWriter:
        last = int(self._names[-1][:8]) if self._names else 0
        path = self._folder / f"{last + 1:08d}.rec"
        path.unlink(missing_ok=True)  # of a writer that was killed or failed before it counted
        return RecordWriter(path)

    def _head(self, memory: Memory, writer: RecordWriter) -> dict[str, Any]:
        """Counters; what differs from the last record; all of it in a generation's first."""
        rule = memory.policy.rule()
        if writer.count:
            rule = {name: _changed(value, self._rule.get(name)) for name, value in rule.items()}
        head = {**_counters(memory), "rule": rule}
        schema = schema_of(memory.columns)
        if not writer.count or schema != self._schema:
            head["schema"] = schema
        return head

    def _append(
        self,
        writer: RecordWriter,
        memory: Memory,
        head: Mapping[str, Any],
        moved: Int64s,
        touched: Int64s,
    ) -> None:
        """The rows in the slots `moved`, and what the policy knows of these and of `touched`."""
        slots = np.concatenate([touched, moved])
        arrays: dict[str, npt.NDArray[Any]] = {"slots": slots}
        arrays |= {f"known/{name}": known for name, known in memory.policy.at(slots).items()}
        for name, column in zip(memory.fields, memory.columns, strict=False):
            arrays[f"rows/{name}"] = column.store.take(moved, 0)
        writer.append(head, arrays)

    def _begin(self, writer: RecordWriter, names: list[str]) -> None:
        """Let a generation count from now on."""
        writer.sync()
        write_manifest(self._folder, self._settings, names)
        if self._writer is not None:
            self._writer.close()
        self._writer, self._names = writer, names

    def _logged(self, memory: Memory, sweep: list[int]) -> None:
        self._rule, self._counters = memory.policy.rule(), _counters(memory)
        self._schema, self._sweep = schema_of(memory.columns), sweep
        if self._touches:
            self._touched[:] = False
            self._touches = False

    def _waiting(self) -> Int64s:
        """The slots whose priority is not logged yet."""
        return np.flatnonzero(self._touched) if self._touches else _NONE

    def _drop(self, names: list[str]) -> None:
        """Delete generations that are not needed; if that fails, the next change tries again."""
        assert self._writer is not None
        try:
            self._writer.sync()
            write_manifest(self._folder, self._settings, self._names[len(names) :])
        except StorageError:
            return
        self._names = self._names[len(names) :]
        _remove(self._folder, names)

    # --- reading -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _or_as_before(self) -> Iterator[None]:
        """Do it all, or be what the folder holds, with what had changed since its last record."""
        memory, touched = self._memory, self._waiting()
        newer: dict[str, Any] = {"draws": memory.draws, "carry": memory.carry}
        known = {}
        if len(touched):
            newer["rule"], known = memory.policy.rule(), memory.policy.at(touched)
        try:
            yield
        except BaseException:
            memory.columns = ()  # the rows are read again: do not hold them twice
            del memory
            try:
                self._memory = self._recover(newer, known, touched)
            except BaseException as error:
                self._broken = error
                self._release()
            raise

    def _recover(
        self, newer: Mapping[str, Any], known: Mapping[str, Int64s], touched: Int64s = _NONE
    ) -> Memory:
        """What the folder holds, and a writer that goes on behind it."""
        settings, names = read_manifest(self._folder)
        for name, own in self._settings.items():
            if settings.get(name) != own:
                raise CheckpointError(
                    f"the replay store {self._folder} was made with {name}="
                    f"{settings.get(name)!r}, this ReplayBuffer has {name}={own!r}; build it as "
                    "the store was, or give another path and add the rows there"
                )
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        left = {path.name for path in self._folder.glob("[0-9]*.rec")} - set(names)
        _remove(self._folder, sorted(left))
        image = Image(settings)
        image.follow(self._folder, names)
        memory = Memory(self._settings)
        if image.counters:
            state, columns = image.state()
            state |= newer
            state["slots"] = memory.policy.known(0) | state["slots"]
            for name, values in known.items():
                state["slots"][name][torch.from_numpy(touched)] = torch.from_numpy(values)
            memory = Memory.of(state, self._settings, columns)
        if names:
            reader = image.readers[names[-1]]
            self._writer = RecordWriter(self._folder / names[-1], reader)
        self._names = names
        self._logged(memory, image.sweep)
        if newer:
            memory.draws, memory.carry = newer["draws"], newer["carry"]
            self._touched[touched], self._touches = True, bool(len(touched))
        return memory


def _row_bytes(memory: Memory) -> int:
    """What a slot takes in a record."""
    known = sum(array.itemsize for array in memory.policy.at(_NONE).values())
    return 8 + known + sum(column.store.strides[0] for column in memory.columns)


def _counters(memory: Memory) -> dict[str, Any]:
    return {"seen": memory.seen, "draws": memory.draws, "carry": memory.carry}


def _indices(place: Place) -> Int64s:
    return np.arange(place.start, place.stop) if isinstance(place, slice) else place


def _changed(value: Any, before: Any) -> Any:
    """Of a dictionary, the entries that differ."""
    if not isinstance(value, dict) or not isinstance(before, dict):
        return value
    return dict(value.items() - before.items()) if value != before else {}


def _prepare(folder: Path) -> None:
    """Make the folder, or refuse one that holds something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise StorageError(f"could not make the folder {folder}: {error.strerror}") from error
    strange = {n for n in names - {"lock"} if not n.startswith(".tessera-")}
    if strange and MANIFEST not in names:
        raise CheckpointError(
            f"{folder} is no replay store: it holds {sorted(strange)[:5]} and no {MANIFEST}. Give "
            "an empty folder, or one that ReplayBuffer made"
        )


def _remove(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError:  # it does not count: it is in the way of nobody
            continue

"""Requests of many tenants become batches of one model."""

from __future__ import annotations

import bisect
import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from tessera.arch import Delta
from tessera.errors import BusyError, InputError, TesseraError
from tessera.serve.batch import Bank, Part, Plan, form_of, run
from tessera.serve.turns import Turns, Waiting

__all__ = ["Answer", "Engine", "Ran"]

_KEPT_BYTES = 256 << 20
_LOG = logging.getLogger("tessera.serve")


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What one request got.

    Attributes:
        outputs: Name -> [rows, ...].
        delta: Hash of the delta it was computed under; "" for the base.
        batch: Number of the batch, from 1.
        part: Which part of it the request was.
    """

    outputs: Mapping[str, Tensor]
    delta: str
    batch: int
    part: int


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ran:
    """One batch that was run.

    Attributes:
        batch: Its number, from 1.
        plan: How to run the same again.
        tenants: Of each part.
        ms: Milliseconds the forward took.
    """

    batch: int
    plan: Plan
    tenants: Sequence[str]
    ms: float


@final
class Engine:
    """One model, its bank of deltas, and the thread that runs batches.

    A batch starts when it is full, or `deadline_ms` after its oldest request came. Tenants take
    turns, one request each, so that a busy one delays the others by at most its own turn. Inside a
    batch each row has its own delta; a delta is written into the bank between two batches, so that
    no request sees half of one.

    Args:
        model: The base; it is put into eval mode, and is nobody else's while this runs.
        load: A delta by its hash, in any thread.
        slots: Deltas in the bank, >= 1.
        max_rows: Rows of a batch, >= 1; a request may have as many.
        deadline_ms: How long a request waits for company, >= 0.
        buckets: Lengths that sequences are padded to, rising; transformers models only.
        queue_rows: Rows that may wait, >= max_rows; more are refused.
        on_batch: Told of each batch, in the engine's thread, before its answers are out.

    Raises:
        InputError: A setting is out of range.

    Example:
        >>> import torch
        >>> engine = Engine(nn.Linear(2, 1), lambda name: None)
        >>> answer = engine.submit({"input": torch.ones(3, 2)}, "", tenant="t").result()
        >>> answer.outputs["output"].shape
        torch.Size([3, 1])
        >>> engine.close()
    """

    def __init__(
        self,
        model: nn.Module,
        load: Callable[[str], Delta],
        *,
        slots: int = 64,
        max_rows: int = 64,
        deadline_ms: float = 2.0,
        buckets: Sequence[int] = (16, 32, 64, 128, 256, 512),
        queue_rows: int = 1024,
        on_batch: Callable[[Ran], None] | None = None,
    ) -> None:
        lengths = list(buckets)
        if not lengths or lengths != sorted(set(lengths)) or lengths[0] < 1:
            raise InputError(f"an engine needs rising buckets >= 1, got {buckets!r}")
        if slots < 1 or max_rows < 1 or queue_rows < max_rows or not deadline_ms >= 0:
            raise InputError(
                f"an engine needs slots, max_rows >= 1, queue_rows >= max_rows and deadline_ms >= "
                f"0, got {slots}, {max_rows}, {queue_rows} and {deadline_ms}"
            )
        self.model, self._form = model.eval(), form_of(model)
        self._load, self._on_batch = load, on_batch
        self._buckets = [n for n in lengths if not self._form.limit or n < self._form.limit]
        if self._form.limit and self._form.limit <= lengths[-1]:
            self._buckets.append(self._form.limit)
        self._slots, self._max_rows, self._queue_rows = slots, max_rows, queue_rows
        self._deadline_s = deadline_ms / 1e3
        self._bank = Bank(model, slots)
        self._change = threading.Condition()
        self._turns = Turns()
        self._forgotten: set[str] = set()
        self._closing = False
        self._count = itertools.count(1)
        self._known: OrderedDict[str, Delta] = OrderedDict()
        self._known_bytes = 0
        self._known_lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="tessera-engine", daemon=True)
        self._thread.start()

    # --- asked by any thread ---------------------------------------------------------------------

    def submit(
        self,
        inputs: Mapping[str, Tensor],
        delta: str,
        *,
        tenant: str,
        timeout_s: float | None = None,
    ) -> Future[Answer]:
        """Queue a request.

        Args:
            inputs: Name -> [rows, ...], as the model's forward takes them.
            delta: Hash of the delta; "" for the base.
            tenant: Whose turn it takes.
            timeout_s: Refused if it has not started by then.

        Returns:
            The answer to come. Cancelling it before its batch starts takes it out.

        Raises:
            InputError: The inputs do not belong together, or are longer than any bucket.
            BusyError: The queue is full, or the engine is closing.
        """
        rows, length = self._measure(inputs)
        bucket = 0
        if self._form.padding:
            at = bisect.bisect_left(self._buckets, length)
            if at == len(self._buckets):
                raise InputError(
                    f"a sequence of {length} is longer than the longest bucket {self._buckets[-1]}"
                )
            bucket = self._buckets[at]
        padded = self._form.padding
        form = tuple(
            (name, t.dtype, tuple(t.shape[2 if name in padded else 1 :]))
            for name, t in sorted(inputs.items())
        )
        part = Part(inputs=dict(inputs), delta=delta, rows=rows, length=length)
        now = time.monotonic()
        waiting = Waiting(
            tenant=tenant,
            part=part,
            delta=self.delta(delta) if delta else None,
            form=(bucket, form),
            since=now,
            until=None if timeout_s is None else now + timeout_s,
        )
        with self._change:
            if self._closing:
                raise BusyError("the server is shutting down", retry_after_s=5.0)
            if self._turns.rows + rows > self._queue_rows:
                raise BusyError(
                    f"{self._turns.rows} rows are waiting, and the queue holds {self._queue_rows}"
                )
            self._turns.add(waiting)
            self._change.notify()
        return waiting.future

    def has(self, delta: str) -> bool:
        """Whether a delta is in memory, so that `submit` need not read it from a disk."""
        with self._known_lock:
            return not delta or delta in self._known

    def delta(self, name: str) -> Delta:
        """The delta of that hash, from memory if it is there."""
        with self._known_lock:
            found = self._known.get(name)
            if found is not None:
                self._known.move_to_end(name)
                return found
        found = self._load(name)
        size = sum(t.nbytes for t in found.tensors.values())
        with self._known_lock:
            if name not in self._known:
                self._known[name] = found
                self._known_bytes += size
            while self._known_bytes > _KEPT_BYTES and len(self._known) > 1:
                _, old = self._known.popitem(last=False)
                self._known_bytes -= sum(t.nbytes for t in old.tensors.values())
        return found

    @property
    def slots(self) -> int:
        """Deltas that can be in use at a time."""
        return self._slots

    @property
    def slots_used(self) -> int:
        """Deltas in the bank."""
        return len(self._bank.resident())

    @property
    def queue_rows(self) -> int:
        """Rows that may wait."""
        return self._queue_rows

    def forget(self, name: str) -> None:
        """Free the memory of a delta, its slot with the next batch; who still asks loads it."""
        with self._known_lock:
            found = self._known.pop(name, None)
            if found is not None:
                self._known_bytes -= sum(t.nbytes for t in found.tensors.values())
        with self._change:
            self._forgotten.add(name)

    def waiting(self) -> int:
        """Rows in the queue."""
        return self._turns.rows

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, and stop; after what is queued if `drain`, else refusing that."""
        with self._change:
            self._closing = True
            dropped = [] if drain else list(self._turns)
            if not drain:
                self._turns.clear()
            self._change.notify_all()
        for waiting in dropped:
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(BusyError("the server is shutting down"))
        self._thread.join()

    def _measure(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """Rows, and length of the sequences."""
        if not inputs:
            raise InputError("a request needs at least one input tensor, got none")
        rows, length = None, 0
        for name, tensor in inputs.items():
            if tensor.dim() < 1 or (name in self._form.padding and tensor.dim() != 2):
                raise InputError(
                    f"the input {name!r} {tuple(tensor.shape)} has no batch, or length"
                )
            if rows is not None and len(tensor) != rows:
                raise InputError(
                    f"the inputs have different numbers of rows: {name!r} {tuple(tensor.shape)}, "
                    f"another {rows}"
                )
            rows = len(tensor)
            if name in self._form.padding:
                if length and tensor.shape[1] != length:
                    raise InputError(
                        f"the inputs have different lengths: {name!r} {tuple(tensor.shape)}, "
                        f"another {length}"
                    )
                length = tensor.shape[1]
        assert rows is not None
        if not 1 <= rows <= self._max_rows:
            raise InputError(f"a request has 1 .. {self._max_rows} rows, got {rows}")
        return rows, length

    # --- the engine's thread ---------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            batch = self._gather()
            if batch is None:
                return
            if batch:
                self._run(batch)

    def _gather(self) -> list[Waiting] | None:
        """The next batch; empty where all of it was cancelled or late, None to stop."""
        with self._change:
            while not self._turns:
                if self._closing:
                    return None
                self._change.wait()
            first = self._turns.first()
            while not self._closing:
                left = first.since + self._deadline_s - time.monotonic()
                if left <= 0 or self._turns.rows >= self._max_rows:
                    break
                self._change.wait(left)
                if not self._turns:
                    return []
            return self._turns.take(max_rows=self._max_rows, max_deltas=self._slots)

    def _run(self, batch: Sequence[Waiting]) -> None:
        batch = [w for w in batch if w.future.set_running_or_notify_cancel()]
        if not batch:
            return
        while self._forgotten:
            self._bank.drop(self._forgotten.pop())
        deltas = {w.part.delta: w.delta for w in batch if w.delta is not None}
        begun = time.perf_counter()
        try:
            outputs = run(self._bank, self._form, [w.part for w in batch], deltas, batch[0].form[0])
        except Exception as error:
            self._alone(batch, error)
            return
        ms, number = 1e3 * (time.perf_counter() - begun), next(self._count)
        plan = Plan(
            bucket=batch[0].form[0],
            parts=[(w.part.delta, w.part.rows) for w in batch],
            room=self._bank.room,
        )
        ran = Ran(batch=number, plan=plan, tenants=[w.tenant for w in batch], ms=ms)
        if self._on_batch is not None:
            try:
                self._on_batch(ran)
            except Exception:  # whoever listens must not stop the engine
                _LOG.exception("on_batch failed for batch %d", number)
        for at, (waiting, own) in enumerate(zip(batch, outputs, strict=True)):
            waiting.future.set_result(
                Answer(outputs=own, delta=waiting.part.delta, batch=number, part=at)
            )

    def _alone(self, batch: Sequence[Waiting], error: Exception) -> None:
        """One bad request must not spoil the others': each is tried by itself."""
        if len(batch) == 1:
            if not isinstance(error, TesseraError):
                error = InputError(f"the model could not run this request: {error}")
            batch[0].future.set_exception(error)
            return
        for waiting in batch:
            again = Waiting(
                tenant=waiting.tenant,
                part=waiting.part,
                delta=waiting.delta,
                form=waiting.form,
                since=waiting.since,
                until=None,
            )
            self._run([again])
            failure = again.future.exception()
            if failure is None:
                waiting.future.set_result(again.future.result())
            else:
                waiting.future.set_exception(failure)

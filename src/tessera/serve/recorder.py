"""What was asked and answered goes into the audit log, so that it can be computed again."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import platform
import queue
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from safetensors.torch import save
from torch import Tensor

from tessera import trees
from tessera.errors import BusyError, InputError, StorageError
from tessera.serve.audit import Audit
from tessera.serve.blobs import Blobs
from tessera.serve.engine import Answer, Ran

__all__ = ["KEEP", "Recorder", "fingerprint"]

KEEP = ("inputs", "hashes", "nothing")
_GROUP = 256
_EVERY_S = 0.05
_CLOSE_S = 30.0
_WAITING = 20_000
_LOG = logging.getLogger("tessera.serve")


def fingerprint(device: torch.device | str = "cpu") -> dict[str, str]:
    """What the last bits of an answer depend on, besides model, delta and batch.

    Args:
        device: Of the model; it is named where it is not the CPU.

    Example:
        >>> sorted(fingerprint())
        ['capability', 'machine', 'mkldnn', 'threads', 'torch']
    """
    found = {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": str(torch._C._has_mkldnn),
        "machine": f"{platform.machine()} {_processor()}",
        "threads": str(torch.get_num_threads()),
    }
    kind = torch.device(device).type
    if kind != "cpu":
        found["device"] = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Asked:
    request: str
    tenant: str
    alias: str
    generation: int
    answer: Answer
    inputs: Mapping[str, Tensor]
    arm: Mapping[str, Any]


_Noted = tuple[str, str | None, dict[str, Any]]
_Item = _Asked | Ran | _Noted
_Entry = _Noted


@final
class Recorder:
    """Writes requests and batches into the audit log, in groups, in a thread of its own.

    A group is one transaction, and one blob with the inputs of its requests. The log is behind by
    a fraction of a second: what a crash may lose is the record of the last answers, never
    a change of state, which the registry writes itself. Where the log cannot keep up requests are
    refused rather than left out of it.

    Args:
        audit: The log.
        blobs: Where inputs are kept.
        base_hash: Of the model.
        keep: "inputs": whatever is needed to compute an answer again; "hashes": of inputs and
            answers; "nothing": of requests, no record at all.
        device: Of the model.

    Raises:
        InputError: No such `keep`.
    """

    def __init__(
        self,
        audit: Audit,
        blobs: Blobs,
        *,
        base_hash: str,
        keep: str = "inputs",
        device: torch.device | str = "cpu",
    ) -> None:
        if keep not in KEEP:
            raise InputError(f"a recorder keeps one of {', '.join(KEEP)}, got {keep!r}")
        self._audit, self._blobs, self._keep = audit, blobs, keep
        # Batches are counted from 1 in each process: this says of which.
        self.boot = secrets.token_hex(8)
        self._queue: queue.Queue[_Item | threading.Event | None] = queue.Queue(_WAITING)
        self.failed = 0
        self._give_up = math.inf
        audit.append(
            "server.start",
            None,
            {"boot": self.boot, "base": base_hash, "keep": keep, "pid": os.getpid()}
            | fingerprint(device),
        )
        self._thread = threading.Thread(target=self._work, name="tessera-recorder", daemon=True)
        self._thread.start()

    def batch(self, ran: Ran) -> None:
        """Take note of a batch: `Engine`'s `on_batch`."""
        if self._keep != "nothing":
            self._queue.put(ran)

    def request(
        self,
        request: str,
        *,
        tenant: str,
        alias: str,
        generation: int,
        answer: Answer,
        inputs: Mapping[str, Tensor],
        arm: Mapping[str, Any] | None = None,
    ) -> None:
        """Take note of an answer.

        Args:
            request: Its id, as the client gave it or as it was made.
            tenant: Whose.
            alias: What it named.
            generation: Of the alias then.
            answer: What it got.
            inputs: What it asked; not changed afterwards.
            arm: What an experiment said of it; None: it took part in none.

        Raises:
            BusyError: The log is too far behind.
        """
        if self._keep != "nothing":
            self._tell(
                _Asked(
                    request=request,
                    tenant=tenant,
                    alias=alias,
                    generation=generation,
                    answer=answer,
                    inputs=inputs,
                    arm=arm or {},
                )
            )

    def note(self, kind: str, tenant: str, body: dict[str, Any]) -> None:
        """Take note of something that may be lost: where the log is far behind, it is."""
        if self._keep != "nothing":
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait((kind, tenant, body))

    def _tell(self, item: _Asked) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full as error:
            raise BusyError("the audit log is behind, and no answer goes unrecorded") from error

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until all that was told so far is in the log; False if it took too long."""
        written = threading.Event()
        self._queue.put(written)
        return written.wait(timeout_s)

    def close(self) -> None:
        """Write what is left, and stop; a database that is away is waited for half a minute."""
        self._give_up = time.monotonic() + _CLOSE_S
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        going = True
        while going:
            group: list[_Item] = []
            told: list[threading.Event] = []
            until: float | None = None
            while len(group) < _GROUP:
                try:
                    left = None if until is None else max(0.0, until - time.monotonic())
                    item = self._queue.get(timeout=left)
                except queue.Empty:
                    break
                if item is None:
                    going = False
                    break
                if isinstance(item, threading.Event):
                    told.append(item)
                    break
                group.append(item)
                until = until or time.monotonic() + _EVERY_S
            self._write(group)
            for event in told:
                event.set()

    def _write(self, group: Sequence[_Item]) -> None:
        """Write a group, however long database or blobs are away; the queue fills meanwhile."""
        if not group:
            return
        before, entries, delay_s = 0, list[_Entry](), 0.05
        while True:
            try:
                if not entries:
                    before = self._audit.head()[0]
                    entries = self._entries(group)
                elif self._stands(entries[0], before):
                    return  # the connection was lost after the commit
                self._audit.extend(entries)
                return
            except StorageError as error:
                if delay_s == 0.05:
                    _LOG.error("the audit log cannot be written, and is tried again: %s", error)
                if time.monotonic() > self._give_up:
                    self._lost(group)
                    return
                time.sleep(delay_s)
                delay_s = min(1.0, 2 * delay_s)
            except Exception:
                # A log that fails must be seen, and must not take the server with it.
                self._lost(group)
                return

    def _lost(self, group: Sequence[_Item]) -> None:
        self.failed += len(group)
        _LOG.exception("%d events could not be written to the audit log", len(group))

    def _stands(self, entry: _Entry, before: int) -> bool:
        """Whether an event is in the log, after that one."""
        kind, _, body = entry
        return any(dict(e.body) == body for e in self._audit.read(after_seq=before, kinds=[kind]))

    def _entries(self, group: Sequence[_Item]) -> list[_Entry]:
        asked = [item for item in group if isinstance(item, _Asked)]
        blob = ""
        if asked and self._keep == "inputs":
            blob = self._blobs.put(
                save(
                    {
                        f"{i}.{name}": tensor.contiguous()
                        for i, item in enumerate(asked)
                        for name, tensor in item.inputs.items()
                    }
                )
            )
        places = {id(item): i for i, item in enumerate(asked)}
        found: list[_Entry] = []
        for item in group:
            if isinstance(item, _Asked):
                found.append(self._asked(item, blob, places[id(item)]))
            elif isinstance(item, Ran):
                found.append(self._ran(item))
            else:
                found.append(item)
        return found

    def _ran(self, ran: Ran) -> tuple[str, str | None, dict[str, Any]]:
        body = {"boot": self.boot, "batch": ran.batch, "ms": round(ran.ms, 3)}
        return "batch", None, {**body, "plan": ran.plan.json()}

    def _asked(self, item: _Asked, blob: str, at: int) -> tuple[str, str | None, dict[str, Any]]:
        inputs = trees.sha256(item.inputs)
        return (
            "request",
            item.tenant,
            {
                "request": item.request,
                "alias": item.alias,
                "generation": item.generation,
                "delta": item.answer.delta,
                "boot": self.boot,
                "batch": item.answer.batch,
                "part": item.answer.part,
                "inputs": inputs,
                "blob": blob,
                "at": at,
                "response": response_hash(item.answer.outputs),
            }
            | dict(item.arm),
        )


def response_hash(outputs: Mapping[str, Tensor]) -> str:
    """sha256 over the names, types, shapes and bytes of an answer.

    Example:
        >>> one, other = torch.zeros(2), torch.tensor([0.0, -0.0])
        >>> response_hash({"y": one}) == response_hash({"y": other})  # to the last bit
        False
    """
    return hashlib.sha256(trees.sha256(outputs).encode()).hexdigest()

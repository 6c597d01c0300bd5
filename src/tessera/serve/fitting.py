"""Fits on behalf of tenants: a short queue, one a tenant, in a process that stands back."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, final

import torch
from torch import nn

from tessera.arch import Delta
from tessera.errors import BusyError
from tessera.serve.batch import device_of
from tessera.serve.fitting_process import FitProcess
from tessera.serve.fitting_run import Fitted, FitterSettings, Order, run_order
from tessera.serve.fitting_values import Origin
from tessera.serve.recorder import fingerprint

__all__ = ["Fitted", "Fitter", "FitterSettings", "Order"]

_NICEST = 5  # of a thread: the engine waits while it holds the interpreter's lock


class _Loading(Protocol):
    def load(self, hash: str, *, tenant: str | None = None) -> Delta: ...


@final
class Fitter:
    """Runs fits over the model that an engine serves, without touching it.

    With an origin they run in a process of their own, which builds the base a second time and
    stands back for whatever else the machine does: no request waits for a fit. Without one they run
    in a thread, over a shadow of the base; requests then share the interpreter with them.

    Args:
        model: The base, in eval mode.
        registry: Loads what a fit goes on from.
        settings: By default `FitterSettings()`.
        origin: How another process builds the same base; None: there is no way.

    Attributes:
        settings: As given.
        machine: What the last bits of a fit depend on, for `fitting_log.told`.

    Example:
        >>> from tessera.serve.fitting_values import FitSettings
        >>> fitter = Fitter(nn.Linear(3, 2), registry=None)
        >>> order = Order(
        ...     tenant="acme",
        ...     inputs={"input": torch.eye(3)[:2]},
        ...     labels=torch.tensor([0, 1]),
        ...     settings=FitSettings(r=1, steps=5),
        ... )
        >>> with fitter.place("acme"):
        ...     found = fitter.submit(order).result()
        >>> found.steps, found.losses[-1] < found.losses[0]
        (5, True)
        >>> fitter.close()
    """

    def __init__(
        self,
        model: nn.Module,
        registry: _Loading | None,
        settings: FitterSettings | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.settings = settings or FitterSettings()
        self._model, self._load = model, None if registry is None else registry.load
        threads = {"threads": str(self.settings.threads)}
        self.machine: Mapping[str, str] = fingerprint(device_of(model)) | threads
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._closing = False
        workers = self.settings.workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tessera-fit")
        self._processes: list[FitProcess] = []
        self._idle = queue.SimpleQueue[FitProcess]()
        if origin is None:
            _prepare(self._pool, self.settings)
            return
        for _ in range(workers):
            self._processes.append(FitProcess(origin, model, self.settings))
            self._idle.put(self._processes[-1])

    @contextlib.contextmanager
    def place(self, tenant: str, *, behind: bool = False) -> Iterator[None]:
        """A place in the queue for this tenant, to be taken before its shots are read.

        Args:
            tenant: Whose.
            behind: For a fit that no request waits for: beside the tenant's own place, and only
                where nothing has to wait for it now.

        Raises:
            BusyError: It has one already, all are taken, or the server is shutting down.
        """
        who = f"{tenant} (in the background)" if behind else tenant
        with self._lock:
            if self._closing:
                raise BusyError("the server is shutting down", retry_after_s=5.0)
            if who in self._busy:
                raise BusyError(f"a fit of {tenant}'s is under way; one is taken at a time")
            waiting = 0 if behind else self.settings.waiting
            if len(self._busy) >= self.settings.workers + waiting:
                raise BusyError(
                    f"{len(self._busy)} fits are under way, and no more are taken", retry_after_s=2
                )
            self._busy.add(who)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(who)

    def submit(self, order: Order) -> Future[Fitted]:
        """Queue a fit; the caller has a `place`.

        Raises:
            BusyError: The server is shutting down.
        """
        try:
            return self._pool.submit(self._run, order, time.monotonic() + self.settings.wait_s)
        except RuntimeError as error:
            raise BusyError("the server is shutting down", retry_after_s=5.0) from error

    def close(self) -> None:
        """Drop what waits, wait for what runs, and end the processes."""
        with self._lock:
            self._closing = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.close()

    # --- in a thread of the pool -----------------------------------------------------------------

    def _run(self, order: Order, until: float) -> Fitted:
        if time.monotonic() > until:
            raise BusyError("the fit waited too long for its turn", retry_after_s=5.0)
        if not self._processes:
            return run_order(self._model, self._load, order, self.settings)
        process = self._idle.get()  # there are as many as threads
        try:
            return process.fit(order, self._load)
        finally:
            self._idle.put(process)


def _prepare(pool: ThreadPoolExecutor, settings: FitterSettings) -> None:
    """Give the pool's threads few of torch's own, and let them stand back."""
    # torch takes the number a thread says as every later thread's too: so all say it now, and
    # afterwards it is what it was.
    threads, gate = torch.get_num_threads(), threading.Barrier(settings.workers)
    niceness = min(settings.niceness, _NICEST)

    def begin() -> None:
        gate.wait(60)
        torch.get_num_threads()  # the first time it takes what holds for all; later ones stay
        torch.set_num_threads(settings.threads)
        with contextlib.suppress(OSError, AttributeError):  # of a thread on Linux; nowhere else
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)

    for done in [pool.submit(begin) for _ in range(settings.workers)]:
        done.result()
    torch.set_num_threads(threads)

"""The process for fits, from the server's side: started, asked, watched, ended."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from typing import final

from torch import nn

from tessera.arch import base_hash
from tessera.errors import CheckpointError
from tessera.serve.batch import device_of
from tessera.serve.fitting_frames import (
    Message,
    error_of,
    fitted_of,
    of_order,
    plain,
    read,
    write,
)
from tessera.serve.fitting_run import Fitted, FitterSettings, Load, Order
from tessera.serve.fitting_values import Origin
from tessera.serve.web import Unavailable

__all__ = ["FitProcess"]

_LOG = logging.getLogger("tessera.serve")
_MODULE = "tessera.serve.fitting_worker"
_START_S = 300.0
_RETRY_S = 5.0
_DIED = "the process for fits ended before this fit did; another takes its place"


class _Ended(Exception):
    """The process is no more, or no more of use; in words for whoever wanted the fit."""


@final
class FitProcess:
    """A process that fits one order at a time, at a low priority; one that dies is replaced.

    Args:
        origin: How it builds the base.
        model: The base that is served: it must be the same, and be put on the same device.
        settings: Its threads, its niceness, and what it takes on.

    Example:
        >>> origin = Origin(function="torch.nn:Identity")
        >>> process = FitProcess(origin, nn.Identity(), FitterSettings())
        >>> process.pid > 0
        True
        >>> process.close()
    """

    def __init__(self, origin: Origin, model: nn.Module, settings: FitterSettings) -> None:
        self._settings = settings
        self._first = Message(
            said={
                "path": sys.path,
                "origin": {"function": origin.function, "arguments": dict(origin.arguments)},
                "base": base_hash(model),
                "device": str(device_of(model)),
                "settings": plain(settings),
            }
        )
        self._process, self._ready = self._start(), False

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def fit(self, order: Order, load: Load | None) -> Fitted:
        """Have an order fitted; what it goes on from is loaded here, and sent along.

        Raises:
            InputError: As `run_order`; so are DeltaError and NonFiniteError.
            Unavailable: The process could not build the model, ended before the fit did, or took
                so long that it was ended. There is another one for the next order.
        """
        parent = None
        if order.settings.parent and load is not None:
            parent = load(order.settings.parent, tenant=order.tenant)
        message = of_order(order, parent)
        if self._process.poll() is not None:
            self._renew()
        try:
            if not self._ready:
                answer = self._ask(None, _START_S)
                if "error" in answer.said:  # it may name folders, which clients are not told
                    _LOG.error("the process for fits did not start: %s", error_of(answer.said))
                    raise _Ended("fits cannot be run; the server's log says why")
                self._ready = True
            answer = self._ask(message, self._settings.ms / 1e3 + self._settings.grace_s)
        except _Ended as error:
            self.close()
            _LOG.error("%s (status %s)", error, self._process.returncode)
            if self._ready:  # one that could not start would not now
                self._renew()
            raise Unavailable(str(error), retry_after_s=_RETRY_S) from error
        return fitted_of(answer)

    def close(self) -> None:
        """End it; whatever it is doing is lost."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not sent is not wanted any more
                pipe.close()

    def _renew(self) -> None:
        self.close()
        self._process, self._ready = self._start(), False

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # So that a terminal's Ctrl-C is not for it. It stays in the server's session: only
            # within one does Linux look at who is nicer (sched(7), autogroups).
            process_group=0 if os.name == "posix" else None,
        )
        # From here, so that all its threads will have it.
        with contextlib.suppress(OSError, AttributeError):  # where there is no such thing
            os.setpriority(os.PRIO_PROCESS, process.pid, self._settings.niceness)
        # Whenever it ends, the system need not remember it.
        threading.Thread(target=process.wait, name="tessera-fit-end", daemon=True).start()
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already: the next question will tell
            write(process.stdin, self._first)
        return process

    def _ask(self, message: Message | None, limit_s: float) -> Message:
        """Its next answer; it is ended where that takes too long."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Timer(limit_s, process.kill)
        late.daemon = True
        late.start()
        begun = time.monotonic()
        try:
            if message is not None:
                write(process.stdin, message)
            answer = read(process.stdout)
        except (OSError, CheckpointError) as error:
            raise _Ended(_DIED) from error
        finally:
            late.cancel()
        if answer is None:
            over = time.monotonic() - begun >= limit_s
            raise _Ended(f"the fit was ended after {limit_s:.3g} s" if over else _DIED)
        return answer

"""The process that fits: ``python -m tessera.serve.fitting_worker``, started by `FitProcess`.

It builds the base, then takes an order at a time from its standard input and answers on its
standard output, as `fitting_frames` says. It has no database and no keys. It ends when the server
does, however that ends: its input ends then.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import signal
import sys
import threading
from typing import BinaryIO

import torch
from torch import nn

from tessera.arch import Delta, base_hash
from tessera.errors import InputError, TesseraError
from tessera.serve.fitting_frames import (
    Message,
    of_error,
    of_fitted,
    order_of,
    read,
    settings_of,
    write,
)
from tessera.serve.fitting_run import FitterSettings, Order, run_order
from tessera.serve.fitting_values import FitSettings, Origin
from tessera.serve.logs import set_up

__all__ = ["main"]

_LOG = logging.getLogger("tessera.serve.fitting_worker")


def main() -> None:
    """Take orders until the server is gone."""
    # A terminal and systemd signal every process of a service; this one goes when the server does,
    # which waits for the fit that runs.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    incoming, outgoing = _pipes()
    set_up(requests=False)
    messages = queue.SimpleQueue[Message]()
    threading.Thread(target=_listen, args=(incoming, messages), daemon=True).start()
    first = messages.get()
    settings = settings_of(first.said["settings"])
    torch.set_num_threads(settings.threads)
    try:
        model = _build(first)
        _warm_up()
    except Exception as error:
        _LOG.error(
            "the process for fits could not build the model: %s: %s", type(error).__name__, error
        )
        write(outgoing, of_error(error))
        return
    with contextlib.suppress(BrokenPipeError):  # the server is gone
        write(outgoing, Message(said={}))
        while True:
            write(outgoing, _answer(model, messages.get(), settings))


def _pipes() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output for the messages alone: the model's code may print, or read."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return incoming, outgoing


def _listen(incoming: BinaryIO, messages: queue.SimpleQueue[Message]) -> None:
    """Pass on what comes; the end of it is the end of the process, whatever it is doing."""
    try:
        while (message := read(incoming)) is not None:
            messages.put(message)
    finally:
        os._exit(0)


def _build(first: Message) -> nn.Module:
    sys.path[:] = first.said["path"]  # the model's code lies where the server found it
    origin = Origin(**first.said["origin"])
    place, _, function = origin.function.rpartition(":")
    model = getattr(importlib.import_module(place), function)(**origin.arguments)
    if not isinstance(model, nn.Module):
        raise InputError(f"{origin.function} returned {type(model).__name__}, not an nn.Module")
    if base_hash(model) != first.said["base"]:
        raise InputError(
            f"{origin.function} builds another model than the one that is served; start the server "
            "again if it is to serve this one"
        )
    return model.to(first.said["device"]).eval()


def _warm_up() -> None:
    """The first fit of a process loads what later ones find: a second, and nobody's budget."""
    order = Order(
        tenant="",
        inputs={"input": torch.eye(2)},
        labels=torch.tensor([0, 1]),
        settings=FitSettings(r=1, steps=2),
    )
    run_order(nn.Linear(2, 2).eval(), None, order, FitterSettings(ms=1e9))


def _answer(model: nn.Module, message: Message, settings: FitterSettings) -> Message:
    try:
        order, parent = order_of(message)

        def load(hash: str, *, tenant: str | None = None) -> Delta:
            assert parent is not None
            return parent

        return of_fitted(run_order(model, load if parent else None, order, settings))
    except TesseraError as error:
        return of_error(error)
    except Exception as error:
        _LOG.exception("a fit failed in its process")
        return of_error(error)


if __name__ == "__main__":
    main()

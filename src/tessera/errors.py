"""Every error Tessera raises, in one tree.

Each class also derives from the builtin one would expect, so ``except ValueError`` works too::

    TesseraError
    ├── InputError        (ValueError)           wrong shape, dtype, label or range; NaN in data
    ├── UnknownNameError  (LookupError)          no such recipe, scenario, stream, policy, ...
    ├── GraphError        (ValueError)           a step that is no graph; a damaged or unsafe graph
    ├── AnchorError       (ValueError)           an anchor that does not fit what it is used for
    ├── DeltaError        (ValueError)           a delta that does not fit its base, or is damaged
    ├── MetricError       (ValueError)           a figure asked for before it was recorded
    ├── AccessError       (PermissionError)      no key, a wrong one, or one without the scope
    ├── ConflictError     (RuntimeError)         somebody else was first: read again, then decide
    ├── BusyError         (RuntimeError)         a queue or a quota is full; retry after a while
    ├── NonFiniteError    (FloatingPointError)   the loss became NaN or infinite
    ├── MissingDataError  (FileNotFoundError)    a data set that is not on this machine
    └── CheckpointError   (ValueError)           a checkpoint that is damaged, foreign or too new
        └── StorageError  (OSError)              a checkpoint or report that could not be written

A message says who needs what, what it got (names, shapes, values), and the line that fixes it.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AccessError",
    "AnchorError",
    "BusyError",
    "CheckpointError",
    "ConflictError",
    "DeltaError",
    "GraphError",
    "InputError",
    "MetricError",
    "MissingDataError",
    "NonFiniteError",
    "StorageError",
    "TesseraError",
    "UnknownNameError",
    "unknown_name",
]


class TesseraError(Exception):
    """The base of every error Tessera raises on purpose."""


class InputError(TesseraError, ValueError):
    """An argument or a batch has the wrong shape, dtype, range, or is not finite."""


class UnknownNameError(TesseraError, LookupError):
    """A name (recipe, scenario, stream, policy) that does not exist."""


class AnchorError(TesseraError, ValueError):
    """An anchor does not fit the model or the penalty it is used with."""


class DeltaError(TesseraError, ValueError):
    """A delta does not fit the model it is laid over, or its tensors do not belong together."""


class GraphError(TesseraError, ValueError):
    """A step cannot be captured, or a graph cannot be run, differentiated or loaded."""


class MetricError(TesseraError, ValueError):
    """A metric was asked for before the accuracies it needs were recorded."""


class AccessError(TesseraError, PermissionError):
    """A request without a key, with a wrong or revoked one, or with one that lacks the scope."""


class ConflictError(TesseraError, RuntimeError):
    """What was to be changed has changed since it was read; nothing was written."""


class BusyError(TesseraError, RuntimeError):
    """A queue or a quota is full.

    Attributes:
        retry_after_s: When it is worth asking again, in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NonFiniteError(TesseraError, FloatingPointError):
    """A loss is NaN or infinite; no weight was changed."""


class MissingDataError(TesseraError, FileNotFoundError):
    """A data set is not on this machine; the message names what provides it."""


class CheckpointError(TesseraError, ValueError):
    """A checkpoint is truncated, damaged, of another kind, or of a newer version."""


class StorageError(CheckpointError, OSError):
    """A file could not be written; what stood there before is unchanged."""


def unknown_name(kind: str, got: object, known: Iterable[str]) -> UnknownNameError:
    """The error for a name that is not in a list, with the list.

    Example:
        >>> str(unknown_name("scenario", "clas", ["class", "task"]))
        "there is no scenario 'clas'; choose one of: class, task"
    """
    return UnknownNameError(f"there is no {kind} {got!r}; choose one of: {', '.join(known)}")

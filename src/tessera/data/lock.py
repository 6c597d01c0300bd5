"""One writer to a folder."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path
from typing import final

from tessera.errors import StorageError

__all__ = ["Lock"]


@final
class Lock:
    """A folder that one process at a time may write to; the system frees it when the process ends.

    Args:
        folder: Exists.
        who: What the message calls it.

    Raises:
        StorageError: Another writer, here or in another process, has it; or it cannot be locked.
    """

    def __init__(self, folder: Path, who: str) -> None:
        self._file = -1
        try:
            self._file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise StorageError(
                f"{who} {folder} has a writer already; close() that one, wait for its process to "
                "end, or open it for reading"
            ) from error
        except OSError as error:
            self.close()
            raise StorageError(f"could not lock {who} {folder}: {error.strerror}") from error
        _LOCKS.add(self)

    @property
    def held(self) -> bool:
        """Whether this process has it: not once it is closed, nor in a forked child."""
        return self._file >= 0

    def close(self) -> None:
        """Let the next writer in."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __del__(self) -> None:
        self.close()


# A forked child shares the lock. Were it not to let go, the folder would stay locked after its
# writer was killed, for as long as a worker of a DataLoader lives. This frees the child's share.
_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()


def _let_go() -> None:
    for lock in list(_LOCKS):
        lock.close()


os.register_at_fork(after_in_child=_let_go)

"""The rows of a durable replay buffer, read by other processes than its writer."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import final

from torch import Tensor

from tessera import random
from tessera.data import checks
from tessera.data.draws import Words
from tessera.data.generations import Image, read_manifest
from tessera.errors import CheckpointError

__all__ = ["ReplayReader"]

_TRIES = 100


@final
class ReplayReader:
    """The rows of a buffer with ``path=``, for other processes: read-only, beside its writer.

    The rows stay in the mapped files, so that all readers of a machine share one copy. A reader
    shows the state after some addition, whole, until `refresh` moves it on.

    Args:
        path: A folder that `ReplayBuffer` made.
        seed: Of its samples.

    Raises:
        CheckpointError: The folder is damaged or no replay store.

    Example:
        >>> import tempfile, torch
        >>> from tessera.data import ReplayBuffer
        >>> folder = tempfile.mkdtemp()
        >>> buffer = ReplayBuffer(100, path=folder)
        >>> buffer.add(torch.rand(8, 3), torch.arange(8))
        >>> reader = ReplayReader(folder)
        >>> x, y = reader.sample(4)
        >>> len(reader), x.shape
        (8, torch.Size([4, 3]))
        >>> buffer.add(torch.rand(8, 3), torch.arange(8))
        >>> reader.refresh(), reader.seen
        (16, 16)
        >>> buffer.close()
    """

    def __init__(self, path: str | os.PathLike[str], *, seed: int = 0) -> None:
        self._folder = Path(path)
        self._sampling = Words(random.key(seed, "reader"))
        self._draws = 0
        self._lock = threading.Lock()
        self._image: Image | None = None
        self.refresh()

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of what an item consists of, in the order of `sample`."""
        with self._lock:
            return tuple(self._shown().fields)

    @property
    def seen(self) -> int:
        """How many rows had been added."""
        with self._lock:
            return self._shown().seen

    def __len__(self) -> int:
        with self._lock:
            return self._shown().held

    def refresh(self) -> int:
        """Take in what was added since.

        Returns:
            `seen`.

        Raises:
            CheckpointError: The folder is damaged. There are no rows until another call reads it.
        """
        with self._lock:
            for _ in range(_TRIES):
                settings, names = read_manifest(self._folder)
                image = self._image
                if image is None or not image.names or image.names[-1] not in names:
                    image = Image(settings)
                self._image = None  # until all is taken in
                try:
                    image.follow(self._folder, names)
                except CheckpointError:
                    # The writer may have begun another generation in between.
                    if read_manifest(self._folder)[1] == names:
                        raise
                    continue
                self._image = image
                return image.seen
            raise CheckpointError(f"{self._folder} changed {_TRIES} times while it was read")

    def sample(self, n: int) -> tuple[Tensor, ...]:
        """`n` different rows, every set of `n` and every order of it equally likely.

        Under every policy: a reader does not know what a priority means to its writer.

        Args:
            n: How many, >= 0. More than there are gives all rows, in random order.

        Returns:
            One tensor [min(n, there are), ...] a field, in the order of `fields`.

        Raises:
            InputError: There are no rows, or `n` is negative.
        """
        checks.require_count("sample", "n", n)
        with self._lock:
            image = self._shown()
            checks.require_rows("sample", image.held)
            wanted = min(int(n), image.held)
            index, self._draws = self._sampling.distinct(self._draws, wanted, image.held)
            return image.rows(index)

    def _shown(self) -> Image:
        if self._image is None:
            raise CheckpointError(f"{self._folder} could not be read; call refresh() again")
        return self._image

"""The scan of all vectors: who may be among the k best."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tessera.retrieval.vectors import Floats

__all__ = ["candidates"]

_CHUNK_ROWS = 1 << 16


def candidates(
    vectors: Floats, wanted: npt.NDArray[np.bool_] | None, q: Floats, k: int, slack: float
) -> npt.NDArray[np.int64]:
    """Rows among which the k best are, where a score in float32 may be off by half of `slack`.

    Args:
        vectors: [n, dim].
        wanted: [n], which of them count; None: all.
        q: [dim].
        k: >= 1.
        slack: >= 0.
    """
    found = [np.empty(0, np.int64)]
    for start in range(0, len(vectors), _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, len(vectors))
        scores = vectors[start:stop] @ q
        if wanted is not None:
            scores[~wanted[start:stop]] = -np.inf
        least = -np.inf
        if len(scores) > k:
            least = np.partition(scores, len(scores) - k)[len(scores) - k] - slack
        found.append(np.flatnonzero((scores >= least) & (scores > -np.inf)) + start)
    return np.concatenate(found)

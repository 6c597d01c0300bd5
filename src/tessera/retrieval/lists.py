"""Vectors in lists around centres, by faiss: a query looks into the nearest few."""

from __future__ import annotations

import importlib
import math
from typing import Any, final

import numpy as np
import numpy.typing as npt

from tessera.errors import MissingDataError
from tessera.retrieval.vectors import Floats

__all__ = ["Lists", "has_outgrown", "require_faiss"]

Homes = npt.NDArray[np.int32]

_SPARE = 32  # fetched beside the k best: room for ties, mostly enough
_SEED, _ROUNDS, _SAMPLE = 1234, 8, 64  # of k-means; the sample: rows a centre


def require_faiss() -> Any:
    """The module.

    Raises:
        MissingDataError: It is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise MissingDataError(
            "retrieval.Index with backend='faiss' needs faiss: pip install "
            "'tessera-lifelong[faiss]'; backend='exact' does without"
        ) from error


def _lists_for(rows: int) -> int:
    return max(1, int(4 * math.sqrt(rows)))


def has_outgrown(lists: int, rows: int) -> bool:
    """Whether so many rows call for new centres: they are 2.25 times what `lists` was made for."""
    return 2 * _lists_for(rows) >= 3 * lists


@final
class Lists:
    """faiss's IVFFlat, whose numbers of vectors are the rows of the index it serves.

    It only grows: what was deleted is not wanted, and is left out when the index closes its gaps.

    Args:
        centres: float32 [lists, dim].
    """

    def __init__(self, centres: Floats) -> None:
        self._faiss = require_faiss()
        self.centres = np.ascontiguousarray(centres)
        lists, dim = self.centres.shape
        self._coarse = self._faiss.IndexFlatIP(dim)
        self._coarse.add(self.centres)
        self._index = self._faiss.IndexIVFFlat(
            self._coarse, dim, lists, self._faiss.METRIC_INNER_PRODUCT
        )
        self._index.is_trained = True

    @classmethod
    def trained(cls, vectors: Floats) -> Lists:
        """Empty lists, around centres of these vectors (spherical k-means, always the same)."""
        kmeans = require_faiss().Kmeans(
            vectors.shape[1],
            _lists_for(len(vectors)),
            niter=_ROUNDS,
            seed=_SEED,
            spherical=True,
            max_points_per_centroid=_SAMPLE,
            min_points_per_centroid=1,  # or it warns
        )
        kmeans.train(vectors)
        return cls(kmeans.centroids)

    def add(self, vectors: Floats, homes: Homes | None = None) -> Homes:
        """Add the next rows, into the lists `homes` or each into the nearest; returns which."""
        vectors = np.ascontiguousarray(vectors)
        if homes is None:
            homes = self._coarse.search(vectors, 1)[1][:, 0].astype(np.int32)
        wide = homes.astype(np.int64)
        pointer = self._faiss.swig_ptr
        self._index.add_core(len(vectors), pointer(vectors), None, pointer(wide))
        return homes

    def candidates(
        self, wanted: npt.NDArray[np.bool_], q: Floats, k: int, slack: float, probes: int
    ) -> npt.NDArray[np.int64] | None:
        """Rows among which are the k best of the nearest lists; None: there are no k in them.

        Args:
            wanted: [n], which rows count.
            q: [dim].
            k: >= 1.
            slack: Twice what a score in float32 may be off.
            probes: How many lists.
        """
        bits = np.packbits(wanted, bitorder="little")
        chosen = self._faiss.SearchParametersIVF(
            nprobe=min(probes, len(self.centres)), sel=self._faiss.IDSelectorBitmap(bits)
        )
        scores, rows = (a[0] for a in self._index.search(q[None], k + _SPARE, params=chosen))
        if rows[k - 1] < 0:
            return None
        least = scores[k - 1] - np.float32(slack)
        near: npt.NDArray[np.int64] = rows[(rows >= 0) & (scores >= least)]
        if len(near) < k + _SPARE:
            return near
        # More entries may be as good as the k-th: all of them, for ties go by id.
        below = float(np.nextafter(least, np.float32(-np.inf)))
        more: npt.NDArray[np.int64] = self._index.range_search(q[None], below, params=chosen)[2]
        return more

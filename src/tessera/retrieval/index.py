"""An exact index: the nearest vectors, their payloads, and the same answer every time."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tessera.errors import InputError, UnknownNameError, unknown_name
from tessera.retrieval.hits import Hits
from tessera.retrieval.store import METRICS, Stored, read, write

__all__ = ["Index"]

Floats = npt.NDArray[np.float32]
Encoder = Callable[[Sequence[Any]], Tensor]

_CHUNK_ROWS = 1 << 16
_ENCODED_AT_ONCE = 64
_UNIT = 2.0**-24  # the rounding error of a float32 operation


@final
class Index:
    """Vectors with payloads, and an exact search among them.

    The score of an entry v for a query q is ``q . v / (|q| |v|)`` ("cosine") or ``q . v`` ("dot").
    A scan in float32 finds all that may be among the k best, given how far rounding can be off, and
    these are scored again in float64, each by itself: so the answer does not depend on the order
    of additions, on the batch, or on the machine's BLAS, and of equal scores the smaller id comes
    first. Vectors are kept as float32; for "cosine" with length 1.

    A payload is whatever should be found: a passage, the name of a delta, a prompt. `save` wants
    plain values, as JSON has them. Any number of threads may ask while one adds.

    Args:
        encoder: Turns a list of items into float vectors [n, dim]; None: only vectors go in.
        dim: Numbers of a vector, >= 1.
        metric: "cosine" or "dot".

    Raises:
        InputError: `dim` is out of range.
        UnknownNameError: No such metric.

    Example:
        >>> letters = lambda words: torch.eye(26)[[ord(word[0]) - 97 for word in words]]
        >>> index = Index(encoder=letters, dim=26)
        >>> index.encode(["apple", "banana", "avocado"])
        [0, 1, 2]
        >>> hits = index.query("apricot", k=2)
        >>> hits.payloads, hits.weights.tolist()
        (['apple', 'avocado'], [0.5, 0.5])
    """

    def __init__(self, encoder: Encoder | None = None, *, dim: int, metric: str = "cosine") -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise InputError(f"retrieval.Index needs a whole dim >= 1, got {dim!r}")
        if metric not in METRICS:
            raise unknown_name("metric of retrieval.Index", metric, METRICS)
        self._encoder, self._dim, self._metric = encoder, dim, metric
        self._lock = threading.RLock()
        self._vectors: Floats = np.empty((0, dim), np.float32)  # grows by doubling
        self._ids = np.empty(0, np.int64)
        self._spaces = np.empty(0, np.int64)  # of each row the number of its namespace; -1: deleted
        self._payloads: list[Any] = []
        self._names: dict[str, int] = {}
        self._rows = self._dead = self._next = 0
        self._longest = 0.0  # length of the longest vector ever added

    def __len__(self) -> int:
        """How many entries there are."""
        return self._rows - self._dead

    @property
    def dim(self) -> int:
        """Numbers of a vector."""
        return self._dim

    def encode(
        self, corpus: Iterable[Any], *, payloads: Iterable[Any] | None = None, namespace: str = ""
    ) -> list[int]:
        """Add items by what the encoder makes of them.

        Args:
            corpus: Items for the encoder.
            payloads: What a hit gives, one an item; None: the items themselves.
            namespace: Whose they are.

        Returns:
            Their ids: 0, 1, 2, ..., never used again.

        Raises:
            InputError: There is no encoder, it gave something else than finite [n, dim], or the
                numbers of items and payloads differ. Nothing was added.
        """
        items = list(corpus)
        vectors = [
            self._encoded(items[i : i + _ENCODED_AT_ONCE])
            for i in range(0, len(items), _ENCODED_AT_ONCE)
        ]
        whole = torch.cat(vectors) if vectors else torch.empty(0, self._dim)
        return self.add(whole, items if payloads is None else payloads, namespace=namespace)

    def add(self, vectors: Tensor, payloads: Iterable[Any], *, namespace: str = "") -> list[int]:
        """Add vectors.

        Args:
            vectors: Float [n, dim], on any device; finite, and for "cosine" not zero.
            payloads: What a hit gives, n of them.
            namespace: Whose they are.

        Returns:
            Their ids.

        Raises:
            InputError: The vectors or the number of payloads do not fit. Nothing was added.
        """
        rows, given = self._checked("Index.add", vectors), list(payloads)
        if len(given) != len(rows):
            raise InputError(
                f"Index.add needs a payload for each of {len(rows)} vectors, got {len(given)}"
            )
        with self._lock:
            first, count = self._rows, len(rows)
            self._reserve(first + count)
            self._vectors[first : first + count] = rows
            ids = np.arange(self._next, self._next + count)
            self._ids[first : first + count] = ids
            space = self._names.setdefault(namespace, len(self._names))
            self._spaces[first : first + count] = space
            self._payloads += given
            if count:
                self._longest = max(self._longest, float(np.linalg.norm(rows, axis=1).max()))
            self._rows, self._next = first + count, self._next + count
        return [int(i) for i in ids]

    def delete(self, ids: Iterable[int]) -> None:
        """Take entries out; their ids are not used again.

        Raises:
            UnknownNameError: There is no such entry. Nothing was deleted.
        """
        wanted = np.array(sorted(set(ids)), np.int64)
        with self._lock:
            # Ids ascend along the rows.
            at = np.searchsorted(self._ids[: self._rows], wanted)
            inside = at < self._rows
            found = inside.copy()
            found[inside] = self._ids[at[inside]] == wanted[inside]
            found[found] = self._spaces[at[found]] >= 0
            if not found.all():
                raise UnknownNameError(
                    f"Index.delete: there is no entry {int(wanted[~found][0])}; ids are those that "
                    "encode() and add() returned"
                )
            self._spaces[at] = -1
            for row in at.tolist():
                self._payloads[row] = None
            self._dead += len(at)
            if self._dead > max(1024, self._rows // 2):
                self._compact()

    def query(
        self,
        x: Any,
        k: int = 4,
        *,
        namespace: str | None = None,
        threshold: float = -math.inf,
        temperature: float = 1.0,
    ) -> Hits:
        """The k nearest entries.

        Args:
            x: A vector [dim], or an item for the encoder.
            k: Most hits, >= 1.
            namespace: Search only there; None: everywhere. An unknown one is empty.
            threshold: Leave out entries with a lower score: nothing near may mean nothing at all.
            temperature: Of the weights, > 0: the lower, the more the best one counts.

        Raises:
            InputError: An argument is out of range, or x does not fit.
        """
        return self.query_batch(
            x[None] if isinstance(x, Tensor) else [x],
            k,
            namespace=namespace,
            threshold=threshold,
            temperature=temperature,
        )[0]

    def query_batch(
        self,
        xs: Any,
        k: int = 4,
        *,
        namespace: str | None = None,
        threshold: float = -math.inf,
        temperature: float = 1.0,
    ) -> list[Hits]:
        """`query` for each of several: vectors [n, dim], or items that the encoder takes at once.

        Raises:
            InputError: An argument is out of range, or xs does not fit.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"Index.query needs a whole k >= 1, got {k!r}")
        if not (temperature > 0 and math.isfinite(temperature)) or math.isnan(threshold):
            raise InputError(
                f"Index.query needs a finite temperature > 0 and a threshold that is a number, got "
                f"{temperature} and {threshold}"
            )
        vectors = xs if isinstance(xs, Tensor) else self._encoded(list(xs))
        queries = self._checked("Index.query", vectors)
        with self._lock:
            space = None if namespace is None else self._names.get(namespace, -2)
            found = [self._nearest(q, k, space) for q in queries]
            return [self._hits(*pair, threshold, temperature) for pair in found]

    def _nearest(
        self, q: Floats, k: int, space: int | None
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """Rows and exact scores of the k best, best first."""
        # |fl(q . v) - q . v| <= d u |q| |v|, whatever the order of the additions.
        slack = 2 * self._dim * _UNIT * float(np.linalg.norm(q)) * self._longest
        found = []
        for start in range(0, self._rows, _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, self._rows)
            scores, spaces = self._vectors[start:stop] @ q, self._spaces[start:stop]
            if space is not None:
                scores[spaces != space] = -np.inf
            elif self._dead:
                scores[spaces < 0] = -np.inf
            found.append(self._candidates(scores, k, slack) + start)
        kept = np.concatenate(found) if found else np.empty(0, np.intp)
        exact = (self._vectors[kept].astype(np.float64) * q.astype(np.float64)).sum(1)
        order = np.lexsort((self._ids[kept], -exact))[:k]
        return kept[order], exact[order]

    def _candidates(self, scores: Floats, k: int, slack: float) -> npt.NDArray[np.intp]:
        """Who may be among the k best, where a score may be off by half of `slack`."""
        least = -np.inf
        if len(scores) > k:
            least = np.partition(scores, len(scores) - k)[len(scores) - k] - slack
        return np.flatnonzero((scores >= least) & (scores > -np.inf))

    def _hits(
        self,
        rows: npt.NDArray[np.intp],
        scores: npt.NDArray[np.float64],
        threshold: float,
        temperature: float,
    ) -> Hits:
        near = scores >= threshold
        rows, scores = rows[near], scores[near]
        found = torch.from_numpy(scores)
        return Hits(
            torch.from_numpy(self._ids[rows]),
            found,
            [self._payloads[row] for row in rows.tolist()],
            torch.softmax(found / temperature, 0),
        )

    def _encoded(self, items: Sequence[Any]) -> Tensor:
        if self._encoder is None:
            raise InputError(
                "this retrieval.Index has no encoder: give vectors, or build it with encoder="
            )
        vectors = self._encoder(list(items))
        if not isinstance(vectors, Tensor) or vectors.shape != (len(items), self._dim):
            got = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
            raise InputError(
                f"the encoder must give vectors [{len(items)}, {self._dim}] for {len(items)} "
                f"items, got {got}"
            )
        return vectors

    def _checked(self, who: str, vectors: Tensor) -> Floats:
        """Finite float32 rows, of length 1 for "cosine"."""
        if not isinstance(vectors, Tensor) or vectors.dim() != 2 or vectors.shape[1] != self._dim:
            got = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
            raise InputError(f"{who} needs vectors [n, {self._dim}], got {got}")
        rows = vectors.detach().to("cpu", torch.float64).numpy()
        finite = np.isfinite(rows).all(1)
        if self._metric == "dot":  # which keeps them as they are
            finite &= (np.abs(rows) <= np.finfo(np.float32).max).all(1)
        if not finite.all():
            bad = int(np.flatnonzero(~finite)[0])
            raise InputError(f"{who}: vector {bad} has NaN or infinite numbers, as float32")
        if self._metric == "cosine":
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            if len(rows) and not lengths.min() > 0:
                bad = int(lengths.argmin())
                raise InputError(f"{who}: vector {bad} is zero, and has no direction")
            rows = rows / lengths
        return rows.astype(np.float32)

    def _reserve(self, rows: int) -> None:
        if rows > len(self._vectors):
            size = max(rows, 2 * len(self._vectors), 256)
            for name in ("_vectors", "_ids", "_spaces"):
                old = getattr(self, name)
                new = np.empty((size, *old.shape[1:]), old.dtype)
                new[: self._rows] = old[: self._rows]
                setattr(self, name, new)

    def _compact(self) -> None:
        """Close the gaps that deleted entries left."""
        alive = np.flatnonzero(self._spaces[: self._rows] >= 0)
        for name in ("_vectors", "_ids", "_spaces"):
            setattr(self, name, getattr(self, name)[alive])
        self._payloads = [self._payloads[row] for row in alive.tolist()]
        self._rows, self._dead = len(alive), 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index, whole or not at all; the encoder is not in it.

        Raises:
            InputError: A payload is no plain value, as JSON has them.
            StorageError: It could not be written; what stood there is unchanged.
        """
        with self._lock:
            self._compact()
            names = sorted(self._names, key=self._names.__getitem__)
            write(
                Path(path),
                Stored(
                    metric=self._metric,
                    vectors=torch.from_numpy(self._vectors),
                    ids=torch.from_numpy(self._ids),
                    spaces=torch.from_numpy(self._spaces),
                    names=names,
                    payloads=self._payloads,
                    next_id=self._next,
                ),
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, encoder: Encoder | None = None) -> Index:
        """The index that `save` wrote.

        Raises:
            MissingDataError: There is no such file.
            CheckpointError: It is damaged, another file, or too new.

        Example:
            >>> import tempfile
            >>> index = Index(dim=2)
            >>> _ = index.add(torch.eye(2), ["x", "y"])
            >>> path = Path(tempfile.mkdtemp()) / "some.index"
            >>> index.save(path)
            >>> Index.load(path).query(torch.tensor([0.0, 3.0]), k=1).payloads
            ['y']
        """
        stored = read(Path(path))
        index = cls(encoder, dim=stored.vectors.shape[1], metric=stored.metric)
        index._vectors, index._ids = stored.vectors.numpy(), stored.ids.numpy()
        index._spaces, index._payloads = stored.spaces.numpy(), list(stored.payloads)
        index._names = {name: number for number, name in enumerate(stored.names)}
        index._rows, index._next = len(index._ids), stored.next_id
        if index._rows:
            index._longest = float(np.linalg.norm(index._vectors, axis=1).max())
        return index

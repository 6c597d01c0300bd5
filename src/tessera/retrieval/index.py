"""An index: the nearest vectors, their payloads, and the same answer every time."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tessera.errors import InputError, unknown_name
from tessera.retrieval import scan
from tessera.retrieval.hits import Hits
from tessera.retrieval.lists import Lists, has_outgrown, require_faiss
from tessera.retrieval.rows import Rows
from tessera.retrieval.store import BACKENDS, METRICS, Stored, read, write
from tessera.retrieval.vectors import Encoder, Floats, as_rows, encoded

__all__ = ["Index"]

_UNIT = 2.0**-24  # the rounding error of a float32 operation
_APPROXIMATE_FROM = 100_000  # entries; a scan of fewer takes some milliseconds


@final
class Index:
    """Vectors with payloads, and an exact search among them.

    The score of an entry v for a query q is ``q . v / (|q| |v|)`` ("cosine") or ``q . v`` ("dot").
    A scan in float32 finds all that may be among the k best, given how far rounding can be off, and
    these are scored again in float64, each by itself: so the answer does not depend on the order
    of additions, on the batch, or on the machine's BLAS, and of equal scores the smaller id comes
    first. Vectors are kept as float32; for "cosine" with length 1.

    With ``backend="faiss"`` a search among 100,000 entries or more looks only into the `probes`
    lists (of ``4 sqrt(n)``) nearest to the query, and may miss what lies in others; among fewer
    it is exact all the same. Scores and ties are as above. The `add` that reaches 100,000 entries
    makes the lists, which takes seconds; so does one whenever they have grown 2.25 times since.

    A payload is whatever should be found: a passage, the name of a delta, a prompt. `save` wants
    plain values, as JSON has them. Any number of threads may ask while one adds.

    Args:
        encoder: Turns a list of items into float vectors [n, dim]; None: only vectors go in.
        dim: Numbers of a vector, >= 1.
        metric: "cosine" or "dot".
        backend: "exact", or "faiss" (of the extra of that name), which holds the vectors twice.
        probes: Of "faiss": lists a query looks into, >= 1. More find more, and take longer.

    Raises:
        InputError: `dim` or `probes` is out of range.
        UnknownNameError: No such metric or backend.
        MissingDataError: faiss is not installed.

    Example:
        >>> letters = lambda words: torch.eye(26)[[ord(word[0]) - 97 for word in words]]
        >>> index = Index(encoder=letters, dim=26)
        >>> index.encode(["apple", "banana", "avocado"])
        [0, 1, 2]
        >>> hits = index.query("apricot", k=2)
        >>> hits.payloads, hits.weights.tolist()
        (['apple', 'avocado'], [0.5, 0.5])
    """

    def __init__(
        self,
        encoder: Encoder | None = None,
        *,
        dim: int,
        metric: str = "cosine",
        backend: str = "exact",
        probes: int = 64,
    ) -> None:
        for name, value in (("dim", dim), ("probes", probes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"retrieval.Index needs a whole {name} >= 1, got {value!r}")
        if metric not in METRICS:
            raise unknown_name("metric of retrieval.Index", metric, METRICS)
        if backend not in BACKENDS:
            raise unknown_name("backend of retrieval.Index", backend, BACKENDS)
        if backend == "faiss":
            require_faiss()
        self._encoder, self._dim, self._metric = encoder, dim, metric
        self._backend, self._probes = backend, probes
        self._lock = threading.RLock()
        nothing = np.empty(0, np.int64)
        self._rows = Rows(np.empty((0, dim), np.float32), nothing, nothing, [])
        self._lists: Lists | None = None
        self._names: dict[str, int] = {}
        self._next = self._deletions = 0
        self._longest = 0.0  # length of the longest vector ever added

    def __len__(self) -> int:
        """How many entries there are."""
        return self._rows.count - self._rows.dead

    @property
    def dim(self) -> int:
        """Numbers of a vector."""
        return self._dim

    def encode(
        self, corpus: Iterable[Any], *, payloads: Iterable[Any] | None = None, namespace: str = ""
    ) -> list[int]:
        """Add items by what the encoder makes of them.

        Args:
            corpus: Items for the encoder, which gets at most 256 at once.
            payloads: What a hit gives, one an item; None: the items themselves.
            namespace: Whose they are.

        Returns:
            Their ids: 0, 1, 2, ..., never used again.

        Raises:
            InputError: There is no encoder, it gave something else than finite [n, dim], or the
                numbers of items and payloads differ. Nothing was added.
        """
        items = list(corpus)
        given = items if payloads is None else payloads
        return self.add(encoded(self._encoder, items, self._dim), given, namespace=namespace)

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
        rows = as_rows("Index.add", vectors, self._dim, self._metric)
        given = list(payloads)
        if len(given) != len(rows):
            raise InputError(
                f"Index.add needs a payload for each of {len(rows)} vectors, got {len(given)}"
            )
        with self._lock:
            ids = np.arange(self._next, self._next + len(rows))
            space = self._names.setdefault(namespace, len(self._names))
            self._rows.append(rows, ids, space, given)
            self._next += len(rows)
            if len(rows):
                self._longest = max(self._longest, float(np.linalg.norm(rows, axis=1).max()))
            if self._lists is not None:
                self._rows.homes[self._rows.count - len(rows) :] = self._lists.add(rows)
            self._make_lists()
        return [int(i) for i in ids]

    def delete(self, ids: Iterable[int]) -> None:
        """Take entries out; their ids are not used again.

        Raises:
            UnknownNameError: There is no such entry. Nothing was deleted.
        """
        with self._lock:
            at = self._rows.at(sorted(set(ids)), None)
            self._rows.remove(at)
            self._deletions += 1
            if self._rows.dead > max(1024, self._rows.count // 2):
                self._compact()

    @property
    def deletions(self) -> int:
        """How often `delete` was called: while it stays, what was there still is."""
        return self._deletions

    def holds(self, ids: Iterable[int], *, namespace: str | None = None) -> list[bool]:
        """Of each id, whether there is such an entry (None: in whatever namespace)."""
        wanted = np.array(list(ids), np.int64)
        with self._lock:
            return [bool(b) for b in self._rows.find(wanted, self._number(namespace))[1]]

    def payloads(self, ids: Iterable[int], *, namespace: str | None = None) -> list[Any]:
        """What was stored with these entries.

        Args:
            ids: Of entries, in any order.
            namespace: Only of this one; None: of any.

        Raises:
            UnknownNameError: There is no such entry, or it is another namespace's.

        Example:
            >>> index = Index(dim=2)
            >>> _ = index.add(torch.eye(2), ["x", "y"])
            >>> index.payloads([1, 0])
            ['y', 'x']
        """
        with self._lock:
            at = self._rows.at(list(ids), self._number(namespace))
            return [self._rows.payloads[row] for row in at.tolist()]

    def _number(self, namespace: str | None) -> int | None:
        return None if namespace is None else self._names.get(namespace, -2)

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
        vectors = xs if isinstance(xs, Tensor) else encoded(self._encoder, list(xs), self._dim)
        queries = as_rows("Index.query", vectors, self._dim, self._metric)
        with self._lock:
            space = self._number(namespace)
            found = [self._nearest(q, k, space) for q in queries]
            return [self._hits(*pair, threshold, temperature) for pair in found]

    def _nearest(
        self, q: Floats, k: int, space: int | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Rows and exact scores of the k best, best first."""
        vectors, wanted, kept = self._rows.vectors, None, None
        if space is not None:
            wanted = self._rows.spaces == space
        elif self._rows.dead or self._lists is not None:
            wanted = self._rows.spaces >= 0
        # |fl(q . v) - q . v| <= d u |q| |v|, whatever the order of the additions.
        slack = 2 * self._dim * _UNIT * float(np.linalg.norm(q)) * self._longest
        if self._lists is not None and wanted is not None and wanted.sum() >= _APPROXIMATE_FROM:
            kept = self._lists.candidates(wanted, q, k, slack, self._probes)
        if kept is None:
            kept = scan.candidates(vectors, wanted, q, k, slack)
        exact = (vectors[kept].astype(np.float64) * q.astype(np.float64)).sum(1)
        order = np.lexsort((self._rows.ids[kept], -exact))[:k]
        return kept[order], exact[order]

    def _hits(
        self,
        rows: npt.NDArray[np.int64],
        scores: npt.NDArray[np.float64],
        threshold: float,
        temperature: float,
    ) -> Hits:
        near = scores >= threshold
        rows, scores = rows[near], scores[near]
        found = torch.from_numpy(scores)
        return Hits(
            torch.from_numpy(self._rows.ids[rows]),
            found,
            [self._rows.payloads[row] for row in rows.tolist()],
            torch.softmax(found / temperature, 0),
        )

    def _compact(self) -> None:
        self._rows.compact()
        if self._lists is not None:
            self._lists = Lists(self._lists.centres)
            self._lists.add(self._rows.vectors, self._rows.homes)

    def _make_lists(self) -> None:
        """The lists, where there are to be some and none that fit so many entries."""
        if self._backend != "faiss" or len(self) < _APPROXIMATE_FROM:
            return
        if self._lists is None or has_outgrown(len(self._lists.centres), len(self)):
            vectors = self._rows.vectors
            self._lists = Lists.trained(vectors[self._rows.spaces >= 0])
            self._rows.homes[:] = self._lists.add(vectors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index, whole or not at all; the encoder is not in it.

        Raises:
            InputError: A payload is no plain value, as JSON has them.
            StorageError: It could not be written; what stood there is unchanged.
        """
        with self._lock:
            if self._rows.dead:
                self._compact()
            rows, lists = self._rows, self._lists
            write(
                Path(path),
                Stored(
                    metric=self._metric,
                    vectors=torch.from_numpy(rows.vectors),
                    ids=torch.from_numpy(rows.ids),
                    spaces=torch.from_numpy(rows.spaces),
                    names=sorted(self._names, key=self._names.__getitem__),
                    payloads=rows.payloads,
                    next_id=self._next,
                    backend=self._backend,
                    probes=self._probes,
                    homes=None if lists is None else torch.from_numpy(rows.homes),
                    centres=None if lists is None else torch.from_numpy(lists.centres),
                ),
            )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        encoder: Encoder | None = None,
        backend: str | None = None,
    ) -> Index:
        """The index that `save` wrote: it answers alike.

        Args:
            path: The file.
            encoder: As `Index` takes it.
            backend: Another than it was saved with; None: the same.

        Raises:
            MissingDataError: There is no such file, or no faiss.
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
        index = cls(
            encoder,
            dim=stored.vectors.shape[1],
            metric=stored.metric,
            backend=stored.backend if backend is None else backend,
            probes=stored.probes,
        )
        vectors = stored.vectors.numpy()
        index._rows = Rows(
            vectors, stored.ids.numpy(), stored.spaces.numpy(), list(stored.payloads)
        )
        index._names = {name: number for number, name in enumerate(stored.names)}
        index._next = stored.next_id
        if len(vectors):
            index._longest = float(np.linalg.norm(vectors, axis=1).max())
        if index._backend == "faiss" and stored.centres is not None and stored.homes is not None:
            index._lists = Lists(stored.centres.numpy())
            index._rows.homes[:] = index._lists.add(vectors, stored.homes.numpy())
        index._make_lists()
        return index

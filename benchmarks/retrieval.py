"""The index: recall against float64, and a query's time beside PyTorch's product and topk.

    python benchmarks/retrieval.py [--wordnet]

384 numbers a vector, k = 10, one thread, NumPy's BLAS too. Claims: recall@10 is 1.0, also where
vectors differ by less than float32's own error; a query of 10,000 entries takes at most 1 ms. Then
faiss as the backend, if it is installed: at 100,000 entries its recall and its time beside the
exact index's, on vectors in clusters and, the worst case, on random ones; with --wordnet on
WordNet's 117,659 glosses by MiniLM, which takes ten minutes to encode.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import time
from itertools import cycle

import torch

from _timing import interleaved, machine, ratios
from tessera.retrieval import Index, MiniLM, wordnet_glosses

DIM, K, QUERIES = 384, 10, 100


def recall(vectors: torch.Tensor, queries: torch.Tensor) -> float:
    index = Index(dim=DIM, metric="dot")
    index.add(vectors, range(len(vectors)))
    found = 0
    for q in queries:
        exact = (vectors.double() * q.double()).sum(1).topk(K).indices
        found += len(set(index.query(q, K).ids.tolist()) & set(exact.tolist()))
    return found / (K * len(queries))


def clustered(rows: int) -> torch.Tensor:
    """2,000 clusters in 32 directions, and some noise in all."""
    centres = torch.randn(2_000, 32)[torch.randint(2_000, (rows,))]
    low = centres + 0.6 * torch.randn(rows, 32)
    return low @ torch.randn(32, DIM) + 0.5 * torch.randn(rows, DIM)


def beside_exact(name: str, rows: torch.Tensor) -> None:
    """faiss against the exact index, on all rows but the queries."""
    queries, vectors = rows[:QUERIES], rows[QUERIES:]
    exact = Index(dim=DIM)
    exact.add(vectors, range(len(vectors)))
    want = [set(exact.query(q, K).ids.tolist()) for q in queries]
    print(f"{name}, {len(vectors):,} entries:")
    for probes in (16, 64, 256):
        begun = time.perf_counter()
        near = Index(dim=DIM, backend="faiss", probes=probes)
        near.add(vectors, range(len(vectors)))
        made = time.perf_counter() - begun
        found = sum(
            len(ids & set(near.query(q, K).ids.tolist()))
            for q, ids in zip(queries, want, strict=True)
        )
        one, other = cycle(queries), cycle(queries)
        times = interleaved(
            {
                "faiss": lambda near=near, one=one: near.query(next(one), K),
                "exact": lambda other=other: exact.query(next(other), K),
            },
            rounds=15,
            repeats=20,
        )
        low, middle, high = ratios(times, "faiss", "exact")
        ms = {variant: 1e3 * statistics.median(t) for variant, t in times.items()}
        print(
            f"  probes {probes:3}: recall@{K} {found / K / QUERIES:.3f}, {ms['faiss']:.3f} ms, "
            f"exact {ms['exact']:.3f} ms, {middle:.3f}x ({low:.3f} .. {high:.3f}); made in "
            f"{made:.1f} s"
        )


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    torch.manual_seed(0)
    queries = torch.randn(QUERIES, DIM)
    print(f"recall@{K}, random vectors:   {recall(torch.randn(10_000, DIM), queries):.4f}")
    close = torch.randn(DIM) + 1e-6 * torch.randn(2_000, DIM)
    print(f"recall@{K}, nearly the same:  {recall(close, queries):.4f}")
    for rows in (1_000, 10_000, 100_000):
        vectors = torch.nn.functional.normalize(torch.randn(rows, DIM), dim=1)
        index = Index(dim=DIM)
        index.add(vectors, range(rows))
        one, other = cycle(queries), cycle(queries)
        times = interleaved(
            {
                "ours": lambda index=index, one=one: index.query(next(one), K),
                "torch": lambda vectors=vectors, other=other: (vectors @ next(other)).topk(K),
            },
            rounds=15,
            repeats=20,
        )
        low, middle, high = ratios(times, "ours", "torch")
        ms = 1e3 * statistics.median(times["ours"])
        bar = "; target: at most 1 ms" if rows == 10_000 else ""
        print(
            f"{rows:7,} entries: {ms:6.3f} ms, {middle:.2f}x torch ({low:.2f} .. {high:.2f}){bar}"
        )
    if importlib.util.find_spec("faiss") is None:
        print("faiss is not installed: pip install 'tessera-lifelong[faiss]'")
        return
    beside_exact("in clusters", clustered(100_000 + QUERIES))
    beside_exact("random", torch.randn(100_000 + QUERIES, DIM))
    if "--wordnet" in sys.argv:
        vectors = MiniLM()([g.definition for g in wordnet_glosses()])
        beside_exact("WordNet's glosses", vectors[torch.randperm(len(vectors))])


if __name__ == "__main__":
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":  # it is read when numpy is imported
        os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()

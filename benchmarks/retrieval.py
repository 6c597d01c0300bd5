"""The exact index: recall against float64, and a query's time beside PyTorch's product and topk.

    python benchmarks/retrieval.py

384 numbers a vector, k = 10, one thread, NumPy's BLAS too. Claims: recall@10 is 1.0, also where
vectors differ by less than float32's own error; a query of 10,000 entries takes at most 1 ms.
"""

from __future__ import annotations

import os
import statistics
import sys
from itertools import cycle

import torch

from _timing import interleaved, machine, ratios
from tessera.retrieval import Index

DIM, K, QUERIES = 384, 10, 100


def recall(vectors: torch.Tensor, queries: torch.Tensor) -> float:
    index = Index(dim=DIM, metric="dot")
    index.add(vectors, range(len(vectors)))
    found = 0
    for q in queries:
        exact = (vectors.double() * q.double()).sum(1).topk(K).indices
        found += len(set(index.query(q, K).ids.tolist()) & set(exact.tolist()))
    return found / (K * len(queries))


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


if __name__ == "__main__":
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":  # it is read when numpy is imported
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()

"""Lifelong learning for PyTorch: learn a stream without forgetting.

>>> from tessera import arch, data, loss, opt
>>> from tessera import graph as tg, ops as T
"""

from tessera import (
    arch,
    checkpoint,
    data,
    errors,
    graph,
    loss,
    meta,
    metrics,
    ops,
    opt,
    peft,
    profiler,
    random,
    recipes,
    retrieval,
    trees,
)
from tessera.errors import TesseraError

__all__ = [
    "TesseraError",
    "arch",
    "checkpoint",
    "data",
    "errors",
    "graph",
    "loss",
    "meta",
    "metrics",
    "ops",
    "opt",
    "peft",
    "profiler",
    "random",
    "recipes",
    "retrieval",
    "trees",
]

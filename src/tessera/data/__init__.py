"""Data: benchmarks cut into tasks, a replay buffer of four policies, drift detectors."""

from tessera.data.batch import Batch
from tessera.data.drift import ADWIN, PageHinkley
from tessera.data.prioritized import ReplayDraw
from tessera.data.replay import ReplayBuffer
from tessera.data.scenarios import Benchmark, Task, benchmark

__all__ = [
    "ADWIN",
    "Batch",
    "Benchmark",
    "PageHinkley",
    "ReplayBuffer",
    "ReplayDraw",
    "Task",
    "benchmark",
]

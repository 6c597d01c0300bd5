"""Data: benchmarks cut into tasks, and a replay buffer that keeps a fair sample of a stream."""

from tessera.data.batch import Batch
from tessera.data.drift import ADWIN, PageHinkley
from tessera.data.replay import ReplayBuffer
from tessera.data.scenarios import Benchmark, Task, benchmark

__all__ = ["ADWIN", "Batch", "Benchmark", "PageHinkley", "ReplayBuffer", "Task", "benchmark"]

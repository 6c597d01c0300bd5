"""Data: benchmarks cut into tasks, and a replay buffer that keeps a fair sample of a stream."""

from tessera.data.batch import Batch
from tessera.data.replay import ReplayBuffer
from tessera.data.scenarios import Benchmark, Task, benchmark

__all__ = ["Batch", "Benchmark", "ReplayBuffer", "Task", "benchmark"]

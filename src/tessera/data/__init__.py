"""Data: streams and their shards, the journal, tasks, replay, drift and its detectors."""

from tessera.data.batch import Batch
from tessera.data.detectors import DriftDetector
from tessera.data.drift import ADWIN, PageHinkley
from tessera.data.drifting import bernoulli, hyperplane, sea, stagger
from tessera.data.few_shot import Episodes, episodes
from tessera.data.generative import GenerativeReplay
from tessera.data.glyph_build import build_glyphs
from tessera.data.glyph_sets import Glyphs, glyphs
from tessera.data.journal import Journal
from tessera.data.prioritized import ReplayDraw
from tessera.data.replay import ReplayBuffer
from tessera.data.replay_reader import ReplayReader
from tessera.data.scenarios import Benchmark, Task, benchmark
from tessera.data.segments import JournalRecord, JournalShard
from tessera.data.shards import IterableShard, MemoryShard, Shard
from tessera.data.stream import Stream
from tessera.data.tables import DatasetShard, ParquetShard
from tessera.data.tar import TarShard

__all__ = [
    "ADWIN",
    "Batch",
    "Benchmark",
    "DatasetShard",
    "DriftDetector",
    "Episodes",
    "GenerativeReplay",
    "Glyphs",
    "IterableShard",
    "Journal",
    "JournalRecord",
    "JournalShard",
    "MemoryShard",
    "PageHinkley",
    "ParquetShard",
    "ReplayBuffer",
    "ReplayDraw",
    "ReplayReader",
    "Shard",
    "Stream",
    "TarShard",
    "Task",
    "benchmark",
    "bernoulli",
    "build_glyphs",
    "episodes",
    "glyphs",
    "hyperplane",
    "sea",
    "stagger",
]

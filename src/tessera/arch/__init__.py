"""Anchors: weights at one moment, with the importance of each; statistics of each stream; and
deltas: small tensors laid over a base."""

from tessera.arch.anchor import Anchor
from tessera.arch.base import base_hash, root
from tessera.arch.delta import Delta
from tessera.arch.overlay import overlay
from tessera.arch.rows import StackedModel
from tessera.arch.stack import Layout, Stack
from tessera.arch.streaming import StreamNorms, stream_norms
from tessera.arch.take import anchor_from

__all__ = [
    "Anchor",
    "Delta",
    "Layout",
    "Stack",
    "StackedModel",
    "StreamNorms",
    "anchor_from",
    "base_hash",
    "overlay",
    "root",
    "stream_norms",
]

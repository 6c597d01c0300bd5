"""Anchors: weights at one moment, with the importance of each; and statistics of each stream."""

from tessera.arch.anchor import Anchor
from tessera.arch.streaming import StreamNorms, stream_norms
from tessera.arch.take import anchor_from

__all__ = ["Anchor", "StreamNorms", "anchor_from", "stream_norms"]

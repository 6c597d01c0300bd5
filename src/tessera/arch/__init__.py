"""Anchors: weights at one moment, with the importance of each."""

from tessera.arch.anchor import Anchor
from tessera.arch.take import anchor_from

__all__ = ["Anchor", "anchor_from"]

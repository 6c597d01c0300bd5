"""Figures of a continual-learning run, each named by the paper that defines it."""

from tessera.metrics.accuracy import AccuracyMatrix
from tessera.metrics.prequential import Prequential

__all__ = ["AccuracyMatrix", "Prequential"]

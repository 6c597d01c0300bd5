"""Figures of a continual-learning run, each named by the paper that defines it."""

from tessera.metrics.accuracy import AccuracyMatrix

__all__ = ["AccuracyMatrix"]

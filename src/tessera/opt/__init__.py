"""Transforms for an optimizer's ``plugin=``, and the schedule that drift drives."""

from tessera.opt.adaptation import DriftSchedule
from tessera.opt.consolidate import consolidate
from tessera.opt.ema import WeightAverage, ema
from tessera.opt.ogd import ogd
from tessera.opt.path_integral import path_integral

__all__ = ["DriftSchedule", "WeightAverage", "consolidate", "ema", "ogd", "path_integral"]

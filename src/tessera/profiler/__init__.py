"""`profiler`: milliseconds, joules with their source named, and budgets that hold them."""

from tessera.profiler.budget import Budget
from tessera.profiler.measure import Measurement, Meter, measure
from tessera.profiler.pace import Pace

__all__ = ["Budget", "Measurement", "Meter", "Pace", "measure"]

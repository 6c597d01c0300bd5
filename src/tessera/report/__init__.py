"""One continual-learning run and its baselines as a self-contained HTML page."""

from tessera.report.page import write

__all__ = ["write"]

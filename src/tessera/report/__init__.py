"""A run and those beside it as a self-contained HTML page."""

from tessera.report.online import write_online
from tessera.report.page import write

__all__ = ["write", "write_online"]

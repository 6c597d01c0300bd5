"""Transforms for an optimizer's ``plugin=``."""

from tessera.opt.consolidate import consolidate
from tessera.opt.ogd import ogd
from tessera.opt.path_integral import path_integral

__all__ = ["consolidate", "ogd", "path_integral"]

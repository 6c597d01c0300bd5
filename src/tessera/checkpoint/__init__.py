"""Everything a run is, in one file: saved whole or not at all, checked byte by byte on loading."""

from tessera.checkpoint.state import State, load, save

__all__ = ["State", "load", "save"]

"""Retrieval: the nearest entries of an index, and what was stored with them."""

from tessera.retrieval.hits import Hits
from tessera.retrieval.index import Index

__all__ = ["Hits", "Index"]

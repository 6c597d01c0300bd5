"""Retrieval: the nearest entries of an index, what was stored with them, and what was computed."""

from tessera.retrieval.hits import Hits
from tessera.retrieval.index import Index
from tessera.retrieval.kvcache import CacheStats, KVCache
from tessera.retrieval.text import MiniLM
from tessera.retrieval.wordnet import Gloss, wordnet_glosses

__all__ = ["CacheStats", "Gloss", "Hits", "Index", "KVCache", "MiniLM", "wordnet_glosses"]

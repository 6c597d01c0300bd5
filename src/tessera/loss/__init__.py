"""Penalties against forgetting; each returns a 0-d tensor to be added to the task loss."""

from tessera.loss.der import der
from tessera.loss.ewc import ewc
from tessera.loss.l2sp import l2sp
from tessera.loss.lwf import lwf
from tessera.loss.recency_weighted import recency_weighted
from tessera.loss.si import si
from tessera.ops import kl_divergence

__all__ = ["der", "ewc", "kl_divergence", "l2sp", "lwf", "recency_weighted", "si"]

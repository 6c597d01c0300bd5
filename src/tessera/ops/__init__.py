"""`T`: thin tensor functions, and the closed forms the penalties are made of."""

from tessera.ops.functional import concat, cross_entropy, kl_divergence, log_softmax, softmax
from tessera.ops.quadratic import weighted_square

__all__ = [
    "concat",
    "cross_entropy",
    "kl_divergence",
    "log_softmax",
    "softmax",
    "weighted_square",
]

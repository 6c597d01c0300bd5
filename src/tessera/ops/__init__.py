"""`T`: thin tensor functions, and the closed forms the penalties are made of."""

from tessera.ops.functional import (
    concat,
    cross_entropy,
    delta_apply,
    kl_divergence,
    log_softmax,
    parameter,
    softmax,
)
from tessera.ops.quadratic import weighted_square

__all__ = [
    "concat",
    "cross_entropy",
    "delta_apply",
    "kl_divergence",
    "log_softmax",
    "parameter",
    "softmax",
    "weighted_square",
]

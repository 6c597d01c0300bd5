"""Meta-learning: inner loops that can be differentiated, implicit gradients, fast weights."""

from tessera.meta.adapted import Adapted, MetaState
from tessera.meta.compiled import MetaStep
from tessera.meta.encoder import TaskEncoder
from tessera.meta.fast import fastweights
from tessera.meta.hvp import hvp
from tessera.meta.hyper import HyperNet, Hypernetwork
from tessera.meta.implicit import implicit_bilevel
from tessera.meta.inner import InnerOpt
from tessera.meta.maml import maml_step
from tessera.meta.prototypes import prototypes
from tessera.meta.rates import LearnedRates, learned_rates
from tessera.meta.reduce import all_reduce_grads
from tessera.meta.reptile import reptile_step
from tessera.meta.tasks import maml_tasks

__all__ = [
    "Adapted",
    "HyperNet",
    "Hypernetwork",
    "InnerOpt",
    "LearnedRates",
    "MetaState",
    "MetaStep",
    "TaskEncoder",
    "all_reduce_grads",
    "fastweights",
    "hvp",
    "implicit_bilevel",
    "learned_rates",
    "maml_step",
    "maml_tasks",
    "prototypes",
    "reptile_step",
]

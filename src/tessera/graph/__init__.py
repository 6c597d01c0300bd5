"""`tg`: the training step, its optimizers and transforms, a step as a graph, background work."""

from tessera.graph.capture import Graph, capture
from tessera.graph.inner import InnerAdam, InnerSGD
from tessera.graph.ir import Node
from tessera.graph.optim import SGD, Adam, Transform
from tessera.graph.regions import gradient_region
from tessera.graph.schedule import OnlineSchedule, current_stream
from tessera.graph.step import no_grad, training_step

__all__ = [
    "SGD",
    "Adam",
    "Graph",
    "InnerAdam",
    "InnerSGD",
    "Node",
    "OnlineSchedule",
    "Transform",
    "capture",
    "current_stream",
    "gradient_region",
    "no_grad",
    "training_step",
]

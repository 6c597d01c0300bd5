"""`tg`: the training step, its optimizers, and the transforms they take as plugins."""

from tessera.graph.optim import SGD, Adam, InnerSGD, Transform
from tessera.graph.step import no_grad, training_step

__all__ = ["SGD", "Adam", "InnerSGD", "Transform", "no_grad", "training_step"]

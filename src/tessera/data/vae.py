"""The generator of generative replay: a variational autoencoder that is told the class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera import random
from tessera.data.rows import shown
from tessera.errors import CheckpointError

__all__ = ["VAE"]

# Of the hidden units of the decoder, the share a class opens. From 0.15 to 0.5 it matters little.
_OPEN = 0.3


@final
class VAE:
    """A conditional VAE with a Bernoulli likelihood, and class gates in its decoder.

    Weights are named tensors, made from the seed without the process-wide generator.

    Args:
        features: Values an example has.
        num_classes: Labels are 0 .. num_classes - 1.
        latent: Dimensions of the code.
        hidden: Units of each hidden layer; two in the encoder, two in the decoder.
        seed: Of weights and gates.
        device: Where they live.

    Source:
        Kingma & Welling 2014 (arXiv:1312.6114). Gates: van de Ven, Siegelmann & Tolias 2020,
        Nature Communications 11:4069, "internal context".

    Example:
        >>> vae = VAE(6, 2, latent=3, hidden=8, seed=0, device=torch.device("cpu"))
        >>> z, y = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])
        >>> vae.decode(vae.decoder, z, y).shape
        torch.Size([4, 6])
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        latent: int,
        hidden: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.num_classes, self.latent, self.device = num_classes, latent, device
        sizes = {
            "encoder": (features + num_classes, hidden, hidden, 2 * latent),
            "decoder": (latent + num_classes, hidden, hidden, features),
        }
        self.weights: dict[str, Tensor] = {}
        for part, widths in sizes.items():
            for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
                g = random.generator(seed, "generative", "init", part, layer)
                bound = 1 / math.sqrt(fan_in)  # as nn.Linear has it
                for name, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
                    w = torch.empty(shape).uniform_(-bound, bound, generator=g).to(device)
                    self.weights[f"{part}.{layer}.{name}"] = w.requires_grad_()
        g = random.generator(seed, "generative", "gates")
        rank = torch.rand(2, num_classes, hidden, generator=g).argsort(-1)
        self._gates = (rank < math.ceil(_OPEN * hidden)).to(device, torch.float32)

    @property
    def decoder(self) -> dict[str, Tensor]:
        """The weights that drawing needs."""
        return {name: w for name, w in self.weights.items() if name.startswith("decoder.")}

    def decode(self, weights: Mapping[str, Tensor], z: Tensor, y: Tensor) -> Tensor:
        """Logits [n, features] of the examples with codes z [n, latent] and labels y [n].

        Args:
            weights: A `decoder`, this one or one of before.
        """
        h = torch.cat([z, self._one_hot(y)], 1)
        for layer in (0, 1):
            h = torch.relu(_linear(weights, f"decoder.{layer}", h)) * self._gates[layer][y]
        return _linear(weights, "decoder.2", h)

    def loss(self, x: Tensor, y: Tensor, g: torch.Generator) -> Tensor:
        """The negative evidence bound, mean over rows: nats of reconstruction and of the code.

        Args:
            x: [n, features] in [0, 1], n >= 1.
            y: int64 [n].
            g: Of the noise.
        """
        h = torch.cat([x, self._one_hot(y)], 1)
        for layer in (0, 1):
            h = torch.relu(_linear(self.weights, f"encoder.{layer}", h))
        mean, log_var = _linear(self.weights, "encoder.2", h).chunk(2, 1)
        noise = torch.randn(mean.shape, generator=g).to(self.device)
        logits = self.decode(self.weights, mean + (0.5 * log_var).exp() * noise, y)
        rebuilt = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        coded = 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum()
        return (rebuilt + coded) / len(x)

    def draw(self, weights: Mapping[str, Tensor], y: Tensor, g: torch.Generator) -> Tensor:
        """Examples [n, features] of the labels y [n], in [0, 1], each value at its mean."""
        with torch.no_grad():
            return self.decode(weights, self._codes(len(y), g), y).sigmoid()

    def recall(
        self, source: Mapping[str, Tensor], y: Tensor, relearned: Tensor, g: torch.Generator
    ) -> Tensor:
        """How far it is from drawing the labels y as `source` does, mean over rows, in nats.

        The same code is to give the same example, which the cross-entropy of the two drawings
        measures: a VAE that learns its own drawings instead loses variety with every generation.
        A class that new rows teach too shares its codes with them; there the encoder has to make
        room, and the loss is that of new rows.

        Args:
            source: The `decoder` of before.
            y: int64 [n], n >= 1.
            relearned: bool [num_classes], which classes the new rows teach too.
            g: Of the codes and the noise.
        """
        z = self._codes(len(y), g)
        with torch.no_grad():
            x = self.decode(source, z, y).sigmoid()
        again = relearned[y]
        logits = self.decode(self.weights, z[~again], y[~again])
        total = F.binary_cross_entropy_with_logits(logits, x[~again], reduction="sum")
        if again.any():
            total = total + again.sum() * self.loss(x[again], y[again], g)
        return total / len(y)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy all weights in.

        Raises:
            CheckpointError: They are not of this network; nothing changed.
        """
        check(weights, self.weights)
        with torch.no_grad():
            for name, w in self.weights.items():
                w.copy_(weights[name])

    def _codes(self, n: int, g: torch.Generator) -> Tensor:
        return torch.randn(n, self.latent, generator=g).to(self.device)

    def _one_hot(self, y: Tensor) -> Tensor:
        return F.one_hot(y, self.num_classes).to(torch.float32)


def check(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Refuse weights that differ from `like` in name, dtype or shape, or are not finite.

    Raises:
        CheckpointError: It names the first that does.
    """
    if not isinstance(weights, Mapping) or set(weights) != set(like):
        names = sorted(weights) if isinstance(weights, Mapping) else type(weights).__name__
        raise CheckpointError(f"damaged generative replay state: it has weights {names}")
    for name, w in like.items():
        got = weights[name]
        fits = isinstance(got, Tensor) and got.shape == w.shape and got.dtype == w.dtype
        if not fits or not got.isfinite().all():
            raise CheckpointError(
                f"damaged generative replay state: {name} must be finite {shown(w)}, "
                f"got {shown(got)}"
            )


def _linear(weights: Mapping[str, Tensor], name: str, h: Tensor) -> Tensor:
    return F.linear(h, weights[f"{name}.weight"], weights[f"{name}.bias"])

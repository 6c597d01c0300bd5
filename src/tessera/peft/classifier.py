"""A head over a text encoder, and a start for it from a few examples."""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import InputError

__all__ = ["Classifier", "class_means"]


@final
class Classifier(nn.Module):
    """Classes over the mean of an encoder's last hidden states, padding left out.

    ``logits = W f + b`` with ``f = mean over tokens of last_hidden_state``, of length 1 where
    `normalize`. W and b start at zero, so that two classifiers over the same encoder are the same
    base. Fit a delta with ``peft.lora(model, 8, head="head")``; `class_means` gives its head a
    better start.

    Args:
        encoder: A module whose answer to ``encoder(input_ids=, attention_mask=)`` has a
            `last_hidden_state` [n, tokens, dim], as the encoders of transformers have.
        num_classes: Outputs, >= 1.
        dim: Of the hidden states; None: ``encoder.config.hidden_size``.
        pad: The token id that fills rows up; None: ``encoder.config.pad_token_id``, or 0.
        normalize: Whether f is scaled to length 1, as sentence encoders are trained.

    Raises:
        InputError: `num_classes` or `dim` is out of range, or `dim` is not known.

    Source:
        Mean pooling: Reimers & Gurevych 2019, "Sentence-BERT" (arXiv:1908.10084).

    Example:
        >>> class Letters(nn.Module):  # stands for a language model
        ...     def forward(self, input_ids, attention_mask):
        ...         return F.one_hot(input_ids, 4).float()
        >>> model = Classifier(Letters(), 2, dim=4)
        >>> model.features(torch.tensor([[1, 3, 0]]))  # 0 is padding
        tensor([[0.0000, 0.7071, 0.0000, 0.7071]])
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        *,
        dim: int | None = None,
        pad: int | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        config = getattr(encoder, "config", None)
        dim = getattr(config, "hidden_size", None) if dim is None else dim
        if dim is None:
            raise InputError(
                f"peft.Classifier needs to know how wide the states of {type(encoder).__name__} "
                "are, which has no config.hidden_size; say dim="
            )
        if dim < 1 or num_classes < 1:
            raise InputError(
                f"peft.Classifier needs dim >= 1 and num_classes >= 1, got {dim} and {num_classes}"
            )
        self.encoder = encoder
        # On no device at first: so it draws no random numbers.
        self.head = nn.Linear(dim, num_classes, device="meta").to_empty(device="cpu")
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        padding = getattr(config, "pad_token_id", None) if pad is None else pad
        self.pad = 0 if padding is None else int(padding)
        self.normalize = normalize

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits [n, num_classes].

        Args:
            input_ids: int64 [n, tokens].
            attention_mask: [n, tokens], 0 at padding; None: wherever the id is not `pad`.
        """
        logits: Tensor = self.head(self.features(input_ids, attention_mask))
        return logits

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The vectors [n, dim] under the head.

        Args:
            input_ids: int64 [n, tokens].
            attention_mask: [n, tokens], 0 at padding; None: wherever the id is not `pad`.
        """
        mask = (input_ids != self.pad).long() if attention_mask is None else attention_mask
        out: Any = self.encoder(input_ids=input_ids, attention_mask=mask)
        states: Tensor = getattr(out, "last_hidden_state", out)
        states = states[..., -mask.shape[-1] :, :]  # a prompt's vectors come before the text's
        weight = mask.unsqueeze(-1).to(states.dtype)
        # An empty row is a zero vector, no NaN.
        mean = (states * weight).sum(-2) / weight.sum(-2).clamp(min=1)
        return F.normalize(mean, dim=-1) if self.normalize else mean


def class_means(
    features: Tensor, y: Tensor, num_classes: int, *, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    """A linear head that answers with the class whose mean direction is nearest.

    ``w_c = scale * m_c / |m_c|`` with ``m_c`` the mean of the class's features at length 1, and
    ``b = 0``: for features of length 1 the logits are scaled cosines, and the argmax is the
    nearest-class-mean rule. A class without examples gets a zero row.

    Args:
        features: Float [n, dim].
        y: int64 [n] in 0 .. num_classes - 1.
        num_classes: C, >= 1.
        scale: Inverse temperature of the softmax over cosines, > 0. A start for a fit wants it
            low: where the head is sure already, no gradient reaches what is below it.

    Returns:
        (weight [C, dim], bias [C]), detached.

    Raises:
        InputError: The shapes do not fit, a label is out of range, or a feature is not finite.

    Source:
        Snell, Swersky & Zemel 2017, "Prototypical Networks" (arXiv:1703.05175); on cosines: Qi,
        Brown & Lowe 2018, "Low-Shot Learning with Imprinted Weights" (arXiv:1712.07136).

    Example:
        >>> features = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
        >>> class_means(features, torch.tensor([0, 0, 1]), 2, scale=1.0)
        (tensor([[1., 0.],
                [0., 1.]]), tensor([0., 0.]))
    """
    if features.dim() != 2 or y.shape != features.shape[:1] or not features.is_floating_point():
        raise InputError(
            "peft.class_means needs float features [n, dim] and labels [n], got "
            f"{tuple(features.shape)} {features.dtype} and {tuple(y.shape)}"
        )
    if num_classes < 1 or scale <= 0:
        raise InputError(
            f"peft.class_means needs num_classes >= 1 and scale > 0, got {num_classes}, {scale}"
        )
    if len(y) and not (int(y.min()) >= 0 and int(y.max()) < num_classes):
        raise InputError(
            f"peft.class_means: labels must lie in 0 .. {num_classes - 1}, got "
            f"{int(y.min())} .. {int(y.max())}"
        )
    if not bool(torch.isfinite(features).all()):
        raise InputError("peft.class_means: the features hold NaN or infinite numbers")
    unit = F.normalize(features.detach(), dim=-1)
    # A product with one-hot rows adds in a fixed order, on every device.
    sums = F.one_hot(y.long(), num_classes).to(unit.dtype).T @ unit
    return scale * F.normalize(sums, dim=-1), sums.new_zeros(num_classes)

"""A head over a text encoder: what it averages, what it starts from, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tessera import arch, peft
from tessera.errors import InputError


def test_class_means_are_the_nearest_mean_rule() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(30, 8, generator=draw)
    y = torch.arange(30) % 3
    weight, bias = peft.class_means(features, y, 4)
    unit = torch.nn.functional.normalize(features, dim=-1)
    means = torch.stack([unit[y == c].mean(0) for c in range(3)])
    nearest = torch.nn.functional.cosine_similarity(unit[:, None], means, dim=-1).argmax(1)
    assert torch.equal((unit @ weight[:3].T).argmax(1), nearest)
    assert weight[3].abs().sum() == bias.abs().sum() == 0


class Embedder(torch.nn.Module):
    """Stands for a language model: each token's vector, times how many tokens count."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(6, 4)
        with torch.no_grad():
            self.table.weight.copy_(torch.arange(24.0).view(6, 4).sin())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.table(input_ids) * attention_mask.sum(-1)[:, None, None]
        return states


def test_a_classifier_takes_the_mean_over_what_is_no_padding() -> None:
    encoder = Embedder()
    model = peft.Classifier(encoder, 3, dim=4, normalize=False)
    ids = torch.tensor([[2, 5, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    table = encoder.table.weight.detach()
    want = torch.stack([(table[2] + table[5]) / 2 * 2, table[3], torch.zeros(4)])
    found = model.features(ids).detach()
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(model.features(ids[:, :2]).detach(), want)  # less padding
    mask = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    told = model.features(ids, mask).detach()
    torch.testing.assert_close(told, torch.stack([table[2], table[3], 4 * table[0]]))
    assert not model(ids).detach().any(), "its head starts at zero"
    unit = peft.Classifier(encoder, 3, dim=4).features(ids[:2]).detach()
    torch.testing.assert_close(unit, torch.nn.functional.normalize(want[:2], dim=-1))


def test_two_classifiers_over_one_encoder_are_the_same_base() -> None:
    encoder = Embedder()
    before = torch.random.get_rng_state()
    hashes = [arch.base_hash(peft.Classifier(encoder, n, dim=4)) for n in (3, 3, 2)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: peft.Classifier(Embedder(), 3), r"wide the states of Embedder.*say dim="),
        (lambda: peft.Classifier(Embedder(), 0, dim=4), r"num_classes >= 1, got 4 and 0"),
        (
            lambda: peft.class_means(torch.zeros(2, 3), torch.tensor([0]), 2),
            r"\(2, 3\) torch.float32 and \(1,\)",
        ),
        (
            lambda: peft.class_means(torch.zeros(2, 3), torch.tensor([0, 2]), 2),
            r"labels must lie in 0 .. 1, got 0 .. 2",
        ),
        (
            lambda: peft.class_means(torch.full((1, 3), torch.nan), torch.tensor([0]), 2),
            r"NaN or infinite",
        ),
        (
            lambda: peft.class_means(torch.zeros(1, 3), torch.tensor([0]), 2, scale=0.0),
            r"scale > 0",
        ),
    ],
)
def test_what_a_classifier_cannot_be_is_said(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()

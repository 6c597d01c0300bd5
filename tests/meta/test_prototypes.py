"""A head that begins as the nearest prototype."""

import pytest
import torch

from tessera.errors import InputError
from tessera.meta.prototypes import prototypes


def batch(n=9, d=4, classes=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, d, dtype=torch.float64, generator=g), torch.arange(n).remainder(classes)


def test_the_head_is_the_nearest_prototype():
    features, labels = batch()
    weight, bias = prototypes(features, labels)
    mean = torch.stack([features[labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(weight, 2 * mean)
    x = batch(20)[0]
    squared = torch.cdist(x, mean) ** 2
    logits = x @ weight.T + bias
    torch.testing.assert_close(logits, x.square().sum(1, keepdim=True) - squared)
    assert torch.equal(logits.argmax(1), squared.argmin(1))


def test_it_is_differentiable_and_takes_tasks():
    features, labels = batch()
    assert torch.autograd.gradcheck(lambda f: prototypes(f, labels), features.requires_grad_())
    both = torch.stack([features, 2 * features])
    turned = torch.stack([labels, (labels + 1) % 3])
    weight, bias = prototypes(both, turned)
    assert (weight.shape, bias.shape) == ((2, 3, 4), (2, 3))
    for i in range(2):
        torch.testing.assert_close((weight[i], bias[i]), prototypes(both[i], turned[i]))


@pytest.mark.parametrize(
    ("features", "labels", "count", "message"),
    [
        (torch.zeros(3), torch.zeros(3), None, r"features \[n, d\].*got \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(2).long(), None, r"\(3, 2\) and \(2,\)"),
        (torch.zeros(0, 2), torch.zeros(0).long(), None, r"at least one row"),
        (torch.zeros(2, 2), torch.zeros(2), None, r"int64 labels, got torch\.float32"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), None, r"class 1 of 3 has no example"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), 2, r"of 2 classes got labels 0 \.\. 2"),
        (torch.zeros(1, 2, 2), torch.tensor([[0, 0]]), 2, r"class 1 of 2 has no example in task 0"),
    ],
)
def test_bad_input_is_named(features, labels, count, message):
    with pytest.raises(InputError, match=message):
        prototypes(features, labels, count)

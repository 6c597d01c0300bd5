"""A set as one vector: whatever the order, whatever the number."""

import pytest
import torch

from tessera.data import Batch
from tessera.errors import InputError, UnknownNameError
from tessera.meta.encoder import TaskEncoder

POOLINGS = ("mean", "attention")


def examples(n=7, dtype=torch.float32, shape=(6,)):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, *shape, generator=g, dtype=torch.float64).to(dtype)
    return Batch(x, torch.randint(0, 3, (n,), generator=g))


def encoder(pooling="mean", **how):
    return TaskEncoder(6, 3, embed_dim=5, width=16, pooling=pooling, **how)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_another_order_gives_the_same_bits(pooling, n):
    encode, context = encoder(pooling), examples(n)
    embedding = encode(context)
    assert embedding.shape == (5,)
    for i in range(10):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(i))
        assert torch.equal(encode(Batch(context.x[order], context.y[order])), embedding)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_set_given_twice_over_is_the_same_set(pooling):
    encode, context = encoder(pooling), examples()
    twice = Batch(context.x.repeat(2, 1), context.y.repeat(2))
    assert torch.allclose(encode(twice), encode(context), atol=1e-6)
    more = Batch(torch.cat([context.x, context.x[:1]]), torch.cat([context.y, context.y[:1]]))
    assert not torch.allclose(encode(more), encode(context), atol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_it_reads_the_examples_and_which_label_is_whose(pooling):
    encode, context = encoder(pooling), examples()
    other = Batch(context.x + 0.5, context.y)
    turned = Batch(context.x, context.y.roll(1))
    assert not torch.equal(context.y, turned.y)
    for changed in (other, turned):
        assert not torch.allclose(encode(changed), encode(context), atol=1e-4)


def test_the_embedding_by_hand():
    encode, context = encoder(), examples(4)
    f = [
        encode.deep(torch.nn.functional.gelu(encode.example(x))) * encode.label[y]
        for x, y in zip(context.x, context.y, strict=True)
    ]
    assert torch.allclose(encode(context), encode.task(encode.norm(sum(f) / 4)), atol=1e-6)


def test_a_class_may_be_missing_and_an_example_have_any_shape():
    encode = TaskEncoder(12, 5, embed_dim=4)
    context = examples(3, shape=(3, 2, 2))
    flat = Batch(context.x.flatten(1), context.y)
    assert torch.equal(encode(context), encode(flat))
    scalar = TaskEncoder(1, 5, embed_dim=4)
    x = torch.arange(3.0)
    assert torch.equal(
        scalar(Batch(x, torch.zeros(3).long())), scalar(Batch(x[:, None], torch.zeros(3).long()))
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_many_sets_at_once_under_vmap(pooling):
    encode = encoder(pooling)
    sets = [examples(5), examples(5, torch.float64)]
    x, y = (
        torch.stack([s.x.float() + i for i, s in enumerate(sets)]),
        torch.stack([s.y.roll(i) for i, s in enumerate(sets)]),
    )
    many = torch.func.vmap(lambda x, y: encode(Batch(x, y)))(x, y)
    for i in range(2):
        assert torch.allclose(many[i], encode(Batch(x[i], y[i])), atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_reach_every_parameter_and_the_examples(pooling):
    encode, context = encoder(pooling).double(), examples(4, torch.float64)

    def run(x):
        return encode(Batch(x, context.y))

    assert torch.autograd.gradcheck(run, (context.x.requires_grad_(),))
    run(context.x).square().sum().backward()
    untouched = [n for n, p in encode.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


def test_it_starts_from_its_seed_alone():
    before = torch.get_rng_state()
    one, two, other = encoder(), encoder(), encoder(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    state = one.state_dict()
    assert all(torch.equal(t, two.state_dict()[n]) for n, t in state.items())
    assert not torch.equal(state["label"], other.state_dict()["label"])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(0, 6), torch.zeros(0).long(), r"at least one: .* got \(0, 6\) and \(0,\)"),
        (torch.zeros(2, 6), torch.zeros(3).long(), r"as many labels as examples"),
        (torch.zeros(2, 5), torch.zeros(2).long(), r"in_dim=6 values an example, got 5"),
        (torch.zeros(2, 6), torch.zeros(2), r"int64 labels, got torch.float32; use y.long"),
        (torch.zeros(2, 6), torch.tensor([0, 3]), r"labels 0 .. 2, got 0 .. 3"),
        (torch.zeros(2, 6), torch.tensor([-1, 0]), r"labels 0 .. 2, got -1 .. 0"),
        ([[0.0] * 6], torch.zeros(1).long(), r"needs tensors"),
    ],
)
def test_bad_sets_are_refused(x, y, message):
    with pytest.raises(InputError, match=message):
        encoder()(Batch(x, y))


def test_other_bad_input_is_refused():
    with pytest.raises(InputError, match=r"a data\.Batch\(x, y\) of examples, got Tensor"):
        encoder()(torch.zeros(2, 6))
    with pytest.raises(InputError, match="a whole in_dim >= 1, got 0"):
        TaskEncoder(0, 3)
    with pytest.raises(UnknownNameError, match="there is no pooling 'max'"):
        encoder("max")

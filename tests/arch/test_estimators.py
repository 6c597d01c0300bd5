"""What the Fisher is a mean over, and what taking it must not touch."""

import math
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import arch
from tessera.arch.labels import MAX_EXACT_CLASSES
from tessera.data import Batch
from tessera.errors import AnchorError, InputError, UnknownNameError


def net(classes=4, width=8):
    torch.manual_seed(1)
    layers = [nn.Linear(5, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def rows(n, classes=4):
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 5, generator=g), torch.randint(0, classes, (n,), generator=g)


def batches(x, y, size):
    return [Batch(*b) for b in zip(x.split(size), y.split(size), strict=True)]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- the batch size ---------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_the_fisher_is_bit_identical_for_every_batch_size(estimator):
    model, (x, y) = net(), rows(300)
    whole = arch.anchor_from(model, "a", data=[(x, y)], estimator=estimator).fisher
    for size in (1, 8, 128):
        split = arch.anchor_from(model, "a", data=batches(x, y, size), estimator=estimator)
        assert equal(split.fisher, whole), size
    lazily = (b for b in batches(x, y, 7))
    assert equal(arch.anchor_from(model, "a", data=lazily, estimator=estimator).fisher, whole)


def test_uneven_and_empty_batches_change_nothing():
    model, (x, y) = net(), rows(20)
    whole = arch.anchor_from(model, "a", data=[(x, y)]).fisher
    cuts = [(x[:0], y[:0]), (x[:3], y[:3]), (x[3:3], y[3:3]), (x[3:], y[3:])]
    assert equal(arch.anchor_from(model, "a", data=cuts).fisher, whole)


def test_the_fisher_does_not_depend_on_the_number_of_copies_of_the_data():
    """A mean over examples, not a sum."""
    model, (x, _) = net(), rows(40)
    once = arch.anchor_from(model, "a", data=[x]).fisher
    thrice = arch.anchor_from(model, "a", data=[x, x, x]).fisher
    for n in once:
        torch.testing.assert_close(thrice[n], once[n], rtol=1e-5, atol=1e-9)


def test_batches_of_different_lengths_are_each_their_own_block():
    torch.manual_seed(0)
    emb, head = nn.Embedding(9, 4), nn.Linear(4, 3)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = emb, head

        def forward(self, i):
            return self.head(self.emb(i).mean(1))

    short, long = torch.randint(0, 9, (6, 3)), torch.randint(0, 9, (2, 7))
    got = arch.anchor_from(Mean(), "a", data=[short, long])
    parts = [arch.anchor_from(Mean(), "a", data=[d]).fisher for d in (short, long)]
    assert got.stats["samples"] == 8
    for n in got.fisher:
        torch.testing.assert_close(got.fisher[n], (6 * parts[0][n] + 2 * parts[1][n]) / 8)


def test_samples_uses_the_first_examples_and_reads_no_further():
    model, (x, y) = net(), rows(64)
    want = arch.anchor_from(model, "a", data=[(x[:21], y[:21])])
    asked = []

    def source():
        for i, b in enumerate(batches(x, y, 8)):
            asked.append(i)
            yield b

    got = arch.anchor_from(model, "a", data=source(), samples=21)
    assert got.stats["samples"] == 21
    assert asked == [0, 1, 2]
    assert equal(got.fisher, want.fisher)


def test_more_samples_than_there_are_means_all_of_them():
    model, (x, y) = net(), rows(10)
    assert arch.anchor_from(model, "a", data=[(x, y)], samples=99).stats["samples"] == 10


def test_inputs_alone_will_do():
    model, (x, y) = net(), rows(12)
    labelled = arch.anchor_from(model, "a", data=[(x, y)]).fisher
    for form in ([x], [(x,)], [[x]], [(x, None)]):
        assert equal(arch.anchor_from(model, "a", data=form).fisher, labelled)


# --- the labels -------------------------------------------------------------------------------


def test_auto_is_exact_up_to_32_classes_and_sampled_beyond():
    for classes, estimator in ((2, "exact"), (MAX_EXACT_CLASSES, "exact"), (33, "sampled")):
        model, (x, _) = net(classes), rows(6)
        assert arch.anchor_from(model, "a", data=[x]).stats["estimator"] == estimator
    assert MAX_EXACT_CLASSES == 32


def test_exact_by_name_takes_any_number_of_classes():
    model, (x, _) = net(40), rows(6)
    assert arch.anchor_from(model, "a", data=[x], estimator="exact").stats["estimator"] == "exact"


def test_only_empirical_looks_at_the_labels():
    model, (x, y) = net(), rows(30)
    for estimator, looks in (("exact", False), ("sampled", False), ("empirical", True)):
        one, other = (
            arch.anchor_from(model, "a", data=[(x, labels)], estimator=estimator).fisher
            for labels in (y, (y + 1) % 4)
        )
        assert equal(one, other) is not looks, estimator


def test_empirical_is_not_the_fisher():
    model, (x, y) = net(), rows(200)
    exact = arch.anchor_from(model, "a", data=[(x, y)]).fisher
    empirical = arch.anchor_from(model, "a", data=[(x, y)], estimator="empirical").fisher
    gap = (exact["4.bias"] - empirical["4.bias"]).abs().max()
    assert gap > 0.05 * exact["4.bias"].max()


def test_sampled_labels_do_not_depend_on_how_the_data_is_split():
    """Also not on where a block begins: 300 examples are two blocks, 44 of them one."""
    model, (x, _) = net(), rows(300)
    tail = x[256:]
    whole = arch.anchor_from(model, "a", data=[x], estimator="sampled").fisher["4.bias"]
    head = arch.anchor_from(model, "a", data=[x[:256]], estimator="sampled").fisher["4.bias"]
    of_tail = (300 * whole - 256 * head) / 44
    fresh = arch.anchor_from(model, "a", data=[tail], estimator="sampled").fisher["4.bias"]
    assert not torch.allclose(of_tail, fresh, rtol=1e-3)  # positions 256.. draw labels of their own


def test_the_seed_decides_the_sampled_labels():
    model, (x, _) = net(), rows(50)

    def draw(seed):
        return arch.anchor_from(model, "a", data=[x], estimator="sampled", seed=seed).fisher

    assert equal(draw(3), draw(3))
    assert not equal(draw(3), draw(4))


def test_sampled_is_unbiased():
    """Softmax regression with one input: the sampled bias Fisher is a mean of known variance."""
    torch.manual_seed(0)
    model = nn.Linear(1, 40)
    x = torch.zeros(20_000, 1)
    p = model(x[:1]).softmax(1)[0].detach().double()
    got = arch.anchor_from(model, "a", data=[x], seed=11)
    assert got.stats["estimator"] == "sampled"
    # (delta - p)^2 is (1-p)^2 with probability p, else p^2: mean p(1-p), variance p(1-p)(1-2p)^2.
    spread = (p * (1 - p)).sqrt() * (1 - 2 * p).abs() / math.sqrt(len(x))
    z = (got.fisher["bias"].double() - p * (1 - p)) / spread
    assert z.abs().max() < 4.5  # 40 classes, fixed seed
    assert 0.6 < z.square().mean() < 1.5  # the right spread too: independent draws
    # The mutant that always takes the likeliest label is far outside.
    top = F.one_hot(p.argmax(), 40).double()
    assert (((top - p).square() - p * (1 - p)) / spread).abs().max() > 100


def test_labels_of_sequences_are_sampled_per_position():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 6), torch.zeros(3000, 4, 3)
    got = arch.anchor_from(model, "a", data=[x])
    assert got.stats["estimator"] == "sampled"
    p = model(x[0, :1]).softmax(1)[0].detach()
    # Four independent positions: the square of their sum has the sum of their variances.
    torch.testing.assert_close(got.fisher["bias"], 4 * p * (1 - p), rtol=0.1, atol=0)


def test_masked_classes_are_no_labels():
    """Masking with -inf is the same as a head without these classes."""
    torch.manual_seed(0)
    model, (x, _) = nn.Linear(5, 6), rows(40)
    small = nn.Linear(5, 2)
    with torch.no_grad():
        small.weight.copy_(model.weight[[1, 4]])
        small.bias.copy_(model.bias[[1, 4]])
    mask = torch.full((6,), -math.inf)
    mask[[1, 4]] = 0.0
    by_add = arch.anchor_from(model, "a", data=[x], logits=lambda z: z + mask).fisher
    by_fill = arch.anchor_from(
        model, "a", data=[x], logits=lambda z: z.masked_fill(mask < 0, -math.inf)
    ).fisher
    want = arch.anchor_from(small, "a", data=[x]).fisher
    for got in (by_add, by_fill):
        torch.testing.assert_close(got["weight"][[1, 4]], want["weight"], rtol=1e-5, atol=1e-9)
        assert got["weight"][[0, 2, 3, 5]].count_nonzero() == 0


def test_logits_finds_them_in_any_output():
    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(5, 3)

        def forward(self, x):
            return {"logits": self.lin(x), "hidden": x}

    model, (x, _) = Output(), rows(9)
    got = arch.anchor_from(model, "a", data=[x], logits=lambda out: out["logits"]).fisher
    want = arch.anchor_from(model.lin, "a", data=[x]).fisher
    assert torch.equal(got["lin.weight"], want["weight"])
    with pytest.raises(AnchorError, match=r"Output returns dict.*logits=lambda out: out\.logits"):
        arch.anchor_from(model, "a", data=[x])


def test_one_binary_logit_by_the_recipe_of_the_message():
    torch.manual_seed(0)
    model, (x, _) = nn.Linear(5, 1), rows(30)
    with pytest.raises(AnchorError, match=r"torch\.cat\(\[-out, out\], -1\) / 2"):
        arch.anchor_from(model, "a", data=[x])
    got = arch.anchor_from(
        model, "a", data=[x], logits=lambda out: torch.cat([-out, out], -1) / 2
    ).fisher
    p = model(x).sigmoid().detach()
    torch.testing.assert_close(got["bias"], (p * (1 - p)).mean(0), rtol=1e-5, atol=0)


# --- what it must leave alone -----------------------------------------------------------------


def state_of(model):
    return {
        "training": [m.training for m in model.modules()],
        "hooks": [
            [len(h) for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
            for m in model.modules()
        ],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "grad_ids": [id(p.grad) for p in model.parameters() if p.grad is not None],
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "versions": [p._version for p in model.parameters()],
        "rng": torch.random.get_rng_state(),
        "modes": (torch.is_grad_enabled(), torch.get_default_dtype()),
    }


def assert_untouched(model, before):
    now = state_of(model)
    for key in ("training", "hooks", "requires_grad", "grad_ids", "versions", "modes"):
        assert now[key] == before[key], key
    assert equal(now["tensors"], before["tensors"])
    assert torch.equal(now["rng"], before["rng"])
    for a, b in zip(now["grads"], before["grads"], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_an_anchor_leaves_the_model_as_it_was(estimator, mode):
    model, (x, y) = net(), rows(30)
    seen = []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    F.cross_entropy(model(x), y).backward()
    model[0].bias.grad = None
    model[4].bias.requires_grad_(False)
    model.train(mode == "train")
    if mode == "mixed":
        model[3].train()
    before = state_of(model)
    with torch.no_grad():
        arch.anchor_from(model, "a", data=[(x, y)], estimator=estimator)
    arch.anchor_from(model, "b", fisher=None)
    assert_untouched(model, before)


def test_a_refused_anchor_leaves_the_model_as_it_was():
    model, (x, y) = net(), rows(10)
    before = state_of(model)
    for data in ([(x, y), "no batch"], [(x * math.nan, y)], [(x, y[:3])], []):
        with pytest.raises((InputError, AnchorError)):
            arch.anchor_from(model, "a", data=data, estimator="empirical")
    assert_untouched(model, before)


def test_the_fisher_is_taken_in_eval_mode():
    """Dropout off, running statistics used: the same in whatever mode the model is."""
    model, (x, _) = net(), rows(30)
    got = arch.anchor_from(model.train(), "a", data=[x]).fisher
    assert equal(got, arch.anchor_from(model.eval(), "b", data=[x]).fisher)


def test_anchoring_never_disturbs_a_forward_in_another_thread():
    model, (x, y) = net(width=32).eval(), rows(64)
    with torch.no_grad():
        want = model(x)
    wrong, count, stop = [], [0], threading.Event()

    def serve():
        while not stop.is_set():
            with torch.no_grad():
                wrong.append(not torch.equal(model(x), want))
            count[0] += 1

    server = threading.Thread(target=serve)
    server.start()
    for _ in range(8):
        arch.anchor_from(model, "a", data=[(x, y)])
    stop.set()
    server.join()
    assert count[0] > 0
    assert not any(wrong)


def test_a_training_thread_may_take_its_anchor_while_another_backpropagates():
    model, (x, y) = net().eval(), rows(32)
    F.cross_entropy(model(x), y).backward()
    want = [p.grad.clone() for p in model.parameters()]
    wrong = []

    def train():
        for _ in range(30):
            grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            wrong.extend(not torch.equal(a, b) for a, b in zip(grads, want, strict=True))

    trainer = threading.Thread(target=train)
    trainer.start()
    while trainer.is_alive():
        arch.anchor_from(model, "a", data=[(x, y)])
    trainer.join()
    assert len(wrong) == 30 * 6
    assert not any(wrong)


# --- what it refuses --------------------------------------------------------------------------


def test_bad_arguments_are_named():
    model, (x, _) = net(), rows(8)
    with pytest.raises(UnknownNameError, match=r"no fisher 'full'; choose one of: 'diagonal'"):
        arch.anchor_from(model, "a", fisher="full", data=[x])
    with pytest.raises(UnknownNameError, match="no estimator 'emprical'; choose one of: auto, ex"):
        arch.anchor_from(model, "a", estimator="emprical", data=[x])
    with pytest.raises(InputError, match="samples >= 1, got 0"):
        arch.anchor_from(model, "a", data=[x], samples=0)
    with pytest.raises(InputError, match="fisher=None uses no data"):
        arch.anchor_from(model, "a", fisher=None, data=[x])
    with pytest.raises(AnchorError, match="data held no example"):
        arch.anchor_from(model, "a", data=[])


def test_bad_batches_are_named():
    model, (x, y) = net(), rows(8)

    def take(batch, estimator="empirical"):
        arch.anchor_from(model, "a", data=[(x, y), batch], estimator=estimator)

    with pytest.raises(InputError, match=r"batch 1 of data is str"):
        take("xy")
    with pytest.raises(InputError, match=r"batch 1 of data is tuple of \['ndarray', 'Tensor'\]"):
        take((np.zeros((8, 5)), y))
    with pytest.raises(InputError, match=r"batch 1 of data is tuple of \['Tensor', 'list'\]"):
        take((x, [0] * 8))
    with pytest.raises(InputError, match=r"batch 1 of data is tuple of \[\]"):
        take(())
    with pytest.raises(InputError, match="batch 1 of data holds NaN or Inf"):
        take((x + math.inf, y))
    with pytest.raises(InputError, match="batch 1 has 8 inputs, 7 labels"):
        take((x, y[:7]))
    with pytest.raises(InputError, match=r'"empirical" needs int64 labels \(16,\).*torch.float32'):
        take((x, y.float()))
    with pytest.raises(InputError, match=r"labels span 0 \.\. 9, the model has 4 classes"):
        take((x, torch.tensor([9] + [0] * 7)))
    with pytest.raises(InputError, match=r"labels span -1"):
        take((x, torch.tensor([-1] + [0] * 7)))
    with pytest.raises(InputError, match=r'"empirical" needs int64 labels.*got no y'):
        arch.anchor_from(model, "a", data=[x], estimator="empirical")


def test_one_batch_in_the_place_of_batches_is_named():
    model, (x, y) = net(), rows(8)
    with pytest.raises(InputError, match=r"data is one Tensor, not batches; pass data=\[batch\]"):
        arch.anchor_from(model, "a", data=x)
    with pytest.raises(InputError, match="data is one Batch, not batches"):
        arch.anchor_from(model, "a", data=Batch(x, y))


def test_a_model_that_mixes_the_batch_is_refused():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(AnchorError, match=r"'1' is a BatchNorm without running statistics"):
        arch.anchor_from(model, "a", data=[rows(8)[0]])


def test_a_model_that_diverged_is_refused():
    model = net()
    with torch.no_grad():
        model[4].bias[0] = math.nan
    with pytest.raises(AnchorError, match=r"'4\.bias' of the model holds NaN or Inf"):
        arch.anchor_from(model, "a", fisher=None)


def test_logits_that_are_not_finite_are_refused():
    model, (x, _) = nn.Linear(5, 3), rows(8)
    with pytest.raises(InputError, match=r"logits for examples 0 \.\. 7 are not finite"):
        arch.anchor_from(model, "a", data=[x], logits=lambda z: z * math.inf)


def test_exact_labels_of_sequences_are_refused():
    with pytest.raises(AnchorError, match=r'for sequences of labels use estimator="sampled"'):
        arch.anchor_from(nn.Linear(3, 4), "a", data=[torch.zeros(2, 5, 3)], estimator="exact")


def test_outputs_that_are_no_logits_are_refused():
    with pytest.raises(AnchorError, match=r"needs logits \[n, C\] with C >= 2 .*gave \(3, 1\)"):
        arch.anchor_from(nn.Linear(5, 1), "a", data=[rows(6)[0]])
    with pytest.raises(AnchorError, match=r"gave \(3,\)"):
        arch.anchor_from(nn.Linear(5, 2), "a", data=[rows(6)[0]], logits=lambda z: z[:, 0])

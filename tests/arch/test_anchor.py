"""The anchor as a value: what it holds, what it is bound to, and what it refuses."""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tessera import arch, loss, opt
from tessera import graph as tg
from tessera.arch import Anchor
from tessera.errors import AnchorError


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def rows(n=16):
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 5, generator=g), torch.randint(0, 3, (n,), generator=g)


def train(model, steps=5):
    x, y = rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(5, 3)
        self.lock = (i for i in ())  # a generator cannot be copied

    def forward(self, x):
        return self.lin(x)


def test_an_anchor_does_not_follow_the_model_it_was_taken_from():
    model, (x, _) = net(), rows()
    then = {n: p.detach().clone() for n, p in model.named_parameters()}
    anchor = arch.anchor_from(model, "a", data=[x])
    fisher = {n: f.clone() for n, f in anchor.fisher.items()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    out = anchor.model(x)
    train(model)
    assert not torch.equal(model[0].weight, then["0.weight"])
    for n in then:
        assert torch.equal(anchor.params[n], then[n])
        assert torch.equal(anchor.fisher[n], fisher[n])
        assert not anchor.params[n].requires_grad
    for n in buffers:
        assert torch.equal(anchor.stats["buffers"][n], buffers[n])
    assert torch.equal(anchor.model(x), out)


def test_the_frozen_model_is_the_model_in_eval_mode_at_that_moment():
    model, (x, _) = net(), rows()
    train(model)
    anchor = arch.anchor_from(model.train(), "a", fisher=None)
    want = copy.deepcopy(model).eval()(x)
    frozen = anchor.model
    assert model.training
    assert not any(m.training for m in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert torch.equal(frozen(x), want)
    assert frozen(x).grad_fn is None
    for n, p in frozen.named_parameters():
        assert p.data_ptr() == anchor.params[n].data_ptr()  # no second copy of the weights


def test_gradients_pass_through_the_frozen_model_to_its_input():
    anchor = arch.anchor_from(net(), "a", fisher=None)
    x = rows()[0].requires_grad_()
    anchor.model(x).sum().backward()
    assert x.grad is not None


def test_stats_say_how_the_fisher_was_made():
    model, (x, _) = net(), rows()
    anchor = arch.anchor_from(model, "a", data=[x])
    assert anchor.stats["kind"] == "diagonal"
    assert anchor.stats["estimator"] == "exact"
    assert anchor.stats["samples"] == 16
    assert "approximate" not in anchor.stats
    bare = arch.anchor_from(model, "b", fisher=None)
    assert bare.stats["kind"] is None
    assert bare.fisher == {}


def test_the_repr_says_what_it_holds():
    model, (x, _) = net(), rows()
    weights = sum(p.numel() for p in model.parameters())
    assert repr(arch.anchor_from(model, "t1", data=[x])) == (
        f"Anchor('t1', 6 tensors, {weights} weights, fisher)"
    )
    assert "fisher" not in repr(arch.anchor_from(model, "t1", fisher=None))


def test_an_anchor_cannot_be_reassigned():
    anchor = Anchor("a", {"w": torch.zeros(1)})
    with pytest.raises(AttributeError):
        anchor.name = "b"


def test_an_anchor_made_from_data_needs_code_and_bind_gives_it():
    model, (x, _) = net(), rows()
    train(model)
    taken = arch.anchor_from(model, "a", data=[x])
    loaded = Anchor("a", dict(taken.params), dict(taken.stats))
    with pytest.raises(AnchorError, match=r"anchor 'a' is data without .*anchor\.bind\(model\)"):
        _ = loaded.model
    assert loaded.live() == {}
    train(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    frozen = loaded.bind(model)
    assert frozen is loaded.model
    assert torch.equal(frozen(x), taken.model(x))  # running statistics included
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_live_gives_the_parameters_in_training_and_holds_them_weakly():
    model = net()
    anchor = arch.anchor_from(model, "a", fisher=None)
    live = anchor.live()
    assert set(live) == set(anchor.params)
    assert all(live[n] is p for n, p in model.named_parameters())
    gone = weakref.ref(model[0].weight)
    del model, live
    gc.collect()
    assert gone() is None
    assert anchor.live() == {}


def test_binding_again_follows_the_new_model():
    a, b = net(), net()
    anchor = arch.anchor_from(a, "a", fisher=None)
    anchor.bind(b)
    assert all(anchor.live()[n] is p for n, p in b.named_parameters())


def test_a_shared_parameter_is_remembered_once_and_stays_shared():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    anchor = arch.anchor_from(model, "a", data=[torch.randn(4, 3)])
    assert list(anchor.params) == ["0.weight"]
    assert anchor.model[0].weight is anchor.model[1].weight


def test_bind_refuses_another_model():
    anchor = arch.anchor_from(net(), "a", fisher=None)
    with pytest.raises(AnchorError, match=r"of another model: it holds '3\.weight', which this"):
        anchor.bind(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)))
    wide = net()
    wide[3] = nn.Linear(8, 4)
    with pytest.raises(AnchorError, match=r"'3\.weight' has shape \(3, 8\) in the .*\(4, 8\) in"):
        anchor.bind(wide)
    small = Anchor("s", {"weight": torch.zeros(3, 5)})
    with pytest.raises(AnchorError, match=r"it lacks the parameters \['bias'\] \(1 in all\)"):
        small.bind(nn.Linear(5, 3))


def test_statistics_that_do_not_fit_are_refused():
    params = {"w": torch.zeros(2)}
    for kind in ("fisher", "path_integral"):
        with pytest.raises(AnchorError, match=rf"its {kind} names 'v', which is not among"):
            Anchor("a", params, {kind: {"v": torch.zeros(2)}})
        with pytest.raises(AnchorError, match=rf"{kind} of 'w' has shape \(3,\).*has \(2,\)"):
            Anchor("a", params, {kind: {"w": torch.zeros(3)}})
        for bad in (-1.0, math.nan, math.inf):
            with pytest.raises(AnchorError, match=rf"{kind} of 'w' holds negative or non-finite"):
                Anchor("a", params, {kind: {"w": torch.tensor([0.0, bad])}})


def test_a_model_that_cannot_be_copied_is_refused_by_name():
    with pytest.raises(AnchorError, match=r"private copy of Stubborn.*Define __deepcopy__"):
        arch.anchor_from(Stubborn(), "a", fisher=None)
    with pytest.raises(AnchorError, match=r"private copy of Stubborn"):
        arch.anchor_from(Stubborn(), "a", data=[rows()[0]])
    copyable = nn.Sequential()
    copyable.lin = nn.Linear(5, 3)
    anchor = arch.anchor_from(copyable, "a", fisher=None)
    with pytest.raises(AnchorError, match=r"copy\.deepcopy refused it"):
        anchor.bind(Stubborn())


def test_a_refused_copy_costs_no_importance():
    """The path integral starts afresh with a new anchor, not with one that failed."""
    model = Stubborn()
    plugin = opt.path_integral()
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=plugin)
    F.cross_entropy(model(rows()[0]), rows()[1]).backward()
    optimizer.step()
    before = [w.clone() for w in plugin.state_dict()["w"]]
    assert any(w.count_nonzero() for w in before)
    with pytest.raises(AnchorError):
        arch.anchor_from(model, "a", fisher=None)
    assert all(map(torch.equal, plugin.state_dict()["w"], before))


def test_a_gradient_on_the_model_is_not_copied_and_not_lost():
    model, (x, y) = net(), rows()
    F.cross_entropy(model(x), y).backward()
    anchor = arch.anchor_from(model, "a", data=[x])
    assert all(p.grad is None for p in anchor.model.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_a_model_between_forward_and_backward_can_be_anchored():
    model, (x, y) = net(), rows()
    value = F.cross_entropy(model(x), y)
    arch.anchor_from(model, "a", data=[x])
    value.backward()
    assert model[0].weight.grad is not None


def test_an_anchor_is_freed_with_its_last_reference():
    model, (x, _) = net(), rows()
    anchor = arch.anchor_from(model, "a", data=[x])
    loss.ewc(model, anchor, lam=1.0)
    gone = weakref.ref(anchor), weakref.ref(anchor.params["0.weight"])
    del anchor
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None

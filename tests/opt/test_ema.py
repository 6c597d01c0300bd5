"""opt.ema against the weighted sum it is, written out."""

import copy
import threading

import pytest
import torch
from torch import nn

from tessera import checkpoint
from tessera import graph as tg
from tessera.errors import InputError, UnknownNameError
from tessera.opt.ema import ema


def net(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def step(model, optimizer, seed):
    g = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(5, 3, generator=g).to(dtype)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def weighted(path, decay):
    """sum decay^(t-s) theta_s / sum decay^(t-s)."""
    shares = [decay ** (len(path) - 1 - s) for s in range(len(path))]
    shares = torch.tensor(shares, dtype=torch.float64)
    shares = shares / shares.sum()
    return [sum(c * w for c, w in zip(shares, ws, strict=True)) for ws in zip(*path, strict=True)]


def close(a, b):
    torch.testing.assert_close(list(a), list(b), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("build", [tg.SGD, tg.Adam])
def test_the_average_is_the_corrected_weighted_sum(decay, build):
    model, average = net(), ema(decay)
    optimizer = build(model.parameters(), lr=0.1, plugin=average)
    path = []
    for t in range(12):
        path.append(step(model, optimizer, t))
        close(average.weights().values(), weighted(path, decay))


def test_the_first_average_is_the_weights_themselves():
    model, average = net(), ema(0.999)
    now = step(model, tg.SGD(model.parameters(), lr=0.1, plugin=average), 0)
    assert all(map(torch.equal, average.weights().values(), now))


def test_it_does_not_change_the_training():
    model, plain = net(), net()
    a = tg.Adam(model.parameters(), lr=0.1, plugin=ema())
    b = tg.Adam(plain.parameters(), lr=0.1)
    for t in range(5):
        assert all(map(torch.equal, step(model, a, t), step(plain, b, t)))


def test_each_stream_averages_its_own_steps():
    model, average = net(), ema(0.7)
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=average)
    paths = {"": [], "a": [], "b": []}
    for t, name in enumerate(["a", "b", "", "a", "a", "", "b"]):
        if name:
            with average.stream(name):
                paths[name].append(step(model, optimizer, t))
        else:
            paths[name].append(step(model, optimizer, t))
    for name, path in paths.items():
        close(average.weights(name).values(), weighted(path, 0.7))
    assert average.streams == ("a", "b", "")
    average.drop("b")
    assert average.streams == ("a", "")


def test_the_inner_scope_counts_and_another_averages_scope_does_not():
    model, average, other = net(), ema(), ema()
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=[average, other])
    with average.stream("a"), other.stream("x"), average.stream("b"):
        step(model, optimizer, 0)
    assert (average.streams, other.streams) == (("b",), ("x",))
    with pytest.raises(KeyError), average.stream("a"):
        raise KeyError
    step(model, optimizer, 1)
    assert average.streams == ("b", "")


def test_a_scope_is_of_its_thread():
    model, average = net(), ema()
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=average)
    with average.stream("a"):
        other = threading.Thread(target=step, args=(model, optimizer, 0))
        other.start()
        other.join()
    assert average.streams == ("",)


def test_applied_evaluates_with_the_average_and_restores_to_the_bit():
    model, average = net(), ema(0.5)
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=average)
    with average.stream("a"):
        for t in range(4):
            own = step(model, optimizer, t)
    with average.applied(model, "a"):
        inside = [p.detach().clone() for p in model.parameters()]
    assert all(map(torch.equal, inside, average.weights("a").values()))
    assert not any(map(torch.equal, inside, own))
    assert all(map(torch.equal, model.parameters(), own))
    with pytest.raises(KeyError), average.applied(model, "a"):
        raise KeyError
    assert all(map(torch.equal, model.parameters(), own))
    close(average.weights("a").values(), inside)  # and the average is its own memory


def test_a_step_inside_applied_is_refused_and_changes_nothing():
    model, average = net(), ema()
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=average)
    own = step(model, optimizer, 0)
    with average.applied(model), pytest.raises(InputError, match="train outside it"):
        step(model, optimizer, 1)
    assert all(map(torch.equal, model.parameters(), own))
    step(model, optimizer, 1)


def test_copy_to_a_copy_leaves_the_trained_model_alone():
    model, average = net(), ema(0.5)
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=average)
    for t in range(3):
        own = step(model, optimizer, t)
    served = copy.deepcopy(model)
    average.copy_to(served)
    assert all(map(torch.equal, served.parameters(), average.weights().values()))
    assert all(map(torch.equal, model.parameters(), own))


def test_parameters_the_optimizer_does_not_have_are_not_touched():
    model, average = net(), ema(0.5)
    optimizer = tg.SGD(model[2].parameters(), lr=0.1, plugin=average)
    first = model[0].weight.detach().clone()
    for t in range(3):
        step(model, optimizer, t)
    assert list(average.weights(model=model)) == ["2.weight", "2.bias"]
    with average.applied(model):
        assert torch.equal(model[0].weight, first)
        assert torch.equal(model[2].weight, average.weights()["0"])


def test_the_state_travels_in_the_optimizers_through_a_checkpoint(tmp_path):
    model, average = net(), ema(0.9)
    optimizer = tg.Adam(model.parameters(), lr=0.1, plugin=average)
    for t in range(3):
        with average.stream("a" if t else "b"):
            step(model, optimizer, t)
    path = tmp_path / "run.ckpt"
    state = checkpoint.State(weights=model.state_dict(), optimizer=optimizer.state_dict())
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)

    resumed, again = net(1), ema(0.9)
    resumed.load_state_dict(loaded.weights)
    other = tg.Adam(resumed.parameters(), lr=0.1, plugin=again)
    other.load_state_dict(loaded.optimizer)
    for t in range(3, 6):
        with average.stream("a"), again.stream("a"):
            step(model, optimizer, t)
            step(resumed, other, t)
    assert again.streams == average.streams == ("b", "a")
    for name in again.streams:
        assert all(map(torch.equal, again.weights(name).values(), average.weights(name).values()))


def test_a_saved_state_is_a_copy():
    model, average = net(), ema(0.9)
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=average)
    step(model, optimizer, 0)
    state = average.state_dict()
    before = state["streams"][""]["mean"][0].clone()
    step(model, optimizer, 1)
    assert torch.equal(state["streams"][""]["mean"][0], before)
    average.load_state_dict(state)
    step(model, optimizer, 2)
    assert torch.equal(state["streams"][""]["mean"][0], before)


def test_a_new_optimizer_of_the_same_parameters_goes_on():
    model, average = net(), ema(0.9)
    path = [step(model, tg.SGD(model.parameters(), lr=0.1, plugin=average), 0)]
    path.append(step(model, tg.Adam(model.parameters(), lr=0.1, plugin=average), 1))
    close(average.weights().values(), weighted(path, 0.9))


def test_bfloat16_weights_are_averaged_in_float32():
    model, average = net(dtype=torch.bfloat16), ema(0.999)
    optimizer = tg.SGD(model.parameters(), lr=0.5, plugin=average)
    path = [[w.double() for w in step(model, optimizer, t)] for t in range(20)]
    got = list(average.weights().values())
    assert {w.dtype for w in got} == {torch.float32}
    torch.testing.assert_close([w.double() for w in got], weighted(path, 0.999), rtol=0, atol=1e-6)
    own = [p.detach().clone() for p in model.parameters()]
    with average.applied(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(map(torch.equal, model.parameters(), own))


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_out_of_range(decay):
    with pytest.raises(InputError, match=r"decay in \[0, 1\]"):
        ema(decay)


def test_errors_name_what_is_wrong_and_change_nothing():
    model, average = net(), ema(0.9)
    optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=average)
    own = step(model, optimizer, 0)
    for call in (average.weights, average.drop, lambda s: average.copy_to(model, s)):
        with pytest.raises(UnknownNameError, match="'b'"):
            call("b")
    with pytest.raises(UnknownNameError, match="'b'"), average.applied(model, "b"):
        pass
    with pytest.raises(InputError, match="or a copy of it"):
        average.copy_to(nn.Linear(3, 4))
    with pytest.raises(InputError, match="none of this model's parameters"):
        average.weights(model=net())
    with pytest.raises(InputError, match="another model"):
        tg.SGD(net().parameters(), lr=0.1, plugin=average)
    with pytest.raises(InputError, match=r"write opt.ema\(0.5\)"):
        average.load_state_dict({"decay": 0.5, "streams": {}})
    foreign = {"steps": 1, "mean": [torch.zeros(1)]}
    with pytest.raises(InputError, match="other shapes"):
        average.load_state_dict({"decay": 0.9, "streams": {"": foreign}})
    assert all(map(torch.equal, average.weights().values(), own))
    assert all(map(torch.equal, model.parameters(), own))

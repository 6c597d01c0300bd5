"""Statistics by stream against closed forms, PyTorch's own layers and finite differences."""

import contextvars
import copy
import io
import sys
import threading

import pytest
import torch
from torch import nn

from tessera.arch.streaming import stream_norms
from tessera.errors import CheckpointError, InputError, NonFiniteError, UnknownNameError


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def warm(layer, x):
    """A layer with weights and running statistics of its own."""
    torch.manual_seed(1)
    layer = layer.to(x.dtype)
    for p in layer.parameters():
        nn.init.normal_(p)
    for seed in range(3):
        layer(2 * normal(*x.shape, seed=50 + seed, dtype=x.dtype) + 1)
    return layer


LAYERS = {
    "BatchNorm1d [n, c]": (lambda: nn.BatchNorm1d(3), (6, 3)),
    "BatchNorm1d [n, c, l]": (lambda: nn.BatchNorm1d(3), (4, 3, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 3)),
    "BatchNorm1d plain": (lambda: nn.BatchNorm1d(3, affine=False), (6, 3)),
    "BatchNorm1d untracked": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (6, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(5), (4, 3, 5)),
    "LayerNorm of two axes": (lambda: nn.LayerNorm((3, 5)), (4, 3, 5)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(5, bias=False), (4, 5)),
}
EACH = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def moments(x, layer):
    """E[x] and E[x^2] as the statistics see them."""
    if isinstance(layer, nn.LayerNorm):
        return x.mean(), x.square().mean()
    dims = [d for d in range(x.dim()) if d != 1]
    return x.mean(dims), x.square().mean(dims)


def normalised(x, mean, second, layer):
    one = [] if isinstance(layer, nn.LayerNorm) else [1, -1] + [1] * (x.dim() - 2)
    own = list(layer.normalized_shape) if isinstance(layer, nn.LayerNorm) else one
    y = (x - mean.reshape(one)) / (second - mean**2 + layer.eps).sqrt().reshape(one)
    y = y if layer.weight is None else y * layer.weight.reshape(own)
    return y if layer.bias is None else y + layer.bias.reshape(own)


@EACH
@pytest.mark.parametrize("betas", [(0.05,) * 6, (0.5, 0.1, 1.0, 0.01, 0.3, 0.2)])
def test_moments_are_the_decayed_sums_written_out(make, shape, betas):
    layer = warm(make(), normal(*shape))
    norms = stream_norms(layer)
    if getattr(layer, "running_mean", None) is None:
        mean = second = mass = 0.0
    else:
        mean = layer.running_mean.clone()
        second, mass = layer.running_var + mean**2, 1.0
    for t, beta in enumerate(betas):
        x = (t + 1) * normal(*shape, seed=t) - t
        a, b = moments(x, layer)
        mean, second = (1 - beta) * mean + beta * a, (1 - beta) * second + beta * b
        mass = (1 - beta) * mass + beta
        with norms.stream("a", beta=beta):
            y = layer(x)
        expected = normalised(x, mean / mass, second / mass, layer)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    layer.eval()
    with norms.stream("a"):
        y = layer(x)
        torch.testing.assert_close(layer(x), y, rtol=0, atol=0)  # nothing moves
    torch.testing.assert_close(y, normalised(x, mean / mass, second / mass, layer))


@EACH
def test_a_beta_of_one_is_batch_normalisation_with_its_gradient(make, shape):
    layer = warm(make(), normal(*shape))
    plain = copy.deepcopy(layer)
    if isinstance(layer, nn.LayerNorm):  # one position: then both have the same statistics
        shape = (1,) * (len(shape) - len(layer.normalized_shape)) + tuple(layer.normalized_shape)
    x, weight = normal(*shape, seed=7), normal(*shape, seed=8)
    norms = stream_norms(layer, beta=1.0)
    grads = []
    for model in (layer, plain):
        z = x.clone().requires_grad_()
        with norms.stream("a"):
            y = model(z)
        leaves = [z, *model.parameters()]
        grads.append([y, *torch.autograd.grad((y * weight).sum(), leaves)])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_a_small_beta_starts_as_the_model_in_eval_mode():
    x = normal(4, 3, 2, 2)
    layer = warm(nn.BatchNorm2d(3), x)
    expected = copy.deepcopy(layer).eval()(x)
    norms = stream_norms(layer)
    with norms.stream("a", beta=1e-12):
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@EACH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_gradcheck(make, shape, training, beta):
    layer = warm(make(), normal(*shape))
    norms = stream_norms(layer, beta=beta)
    with norms.stream("a"):
        layer(normal(*shape, seed=5))
    layer.train(training)
    past = norms.state_dict()

    def f(x, *params):
        norms.load_state_dict(past)  # the same past for every difference
        names = [n for n, _ in layer.named_parameters()]
        with norms.stream("a"):
            return torch.func.functional_call(layer, dict(zip(names, params, strict=True)), (x,))

    params = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(f, (normal(*shape).requires_grad_(), *params))


def test_the_past_gets_no_gradient_and_keeps_no_graph():
    layer = nn.BatchNorm1d(3)
    norms = stream_norms(layer)
    for t in range(3):  # a graph kept would be freed by the first backward
        x = normal(4, 3, seed=t, dtype=torch.float32).requires_grad_()
        with norms.stream("a"):
            layer(x).pow(3).sum().backward()
    kept = norms.state_dict()["streams"]["a"][""]
    assert not kept["mean"].requires_grad
    assert not kept["var"].requires_grad


def test_a_large_mean_does_not_cancel_the_variance():
    layer = nn.BatchNorm1d(1)
    norms = stream_norms(layer, beta=1.0)
    x = 1000 + normal(64, 1, dtype=torch.float32)
    with norms.stream("a"):
        layer(x)
        layer(x)
    var = norms.state_dict()["streams"]["a"][""]["var"].double()
    torch.testing.assert_close(var, x.double().var(0, correction=0), rtol=1e-4, atol=0)


def test_one_example_is_a_batch_and_moments_approach_the_streams():
    layer = nn.BatchNorm1d(2)
    norms = stream_norms(layer, beta=0.02)
    with norms.stream("a"):
        for t in range(600):
            layer(3 * normal(1, 2, seed=t, dtype=torch.float32) + 5)
    kept = norms.state_dict()["streams"]["a"][""]
    # Of a mean with decay b the variance is var b / (2 - b): 0.3^2 here; 4 of these.
    assert ((kept["mean"] - 5).abs() < 1.2).all()
    assert ((kept["var"] - 9).abs() < 6).all()


def model_of_all():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 6), nn.LayerNorm(6)
    )


def test_outside_a_scope_and_after_close_the_model_is_as_before_to_the_bit():
    model, plain = model_of_all(), model_of_all()
    modules = [(n, type(m)) for n, m in model.named_modules()]
    norms = stream_norms(model)
    x = normal(5, 1, 4, 4, dtype=torch.float32)
    for closed in (False, True):
        if closed:
            norms.close()
            norms.close()  # once is enough, twice does no harm
            assert not any("forward" in vars(m) for m in model.modules())
        else:
            with norms.stream("a"):
                model(3 * x)
        for training in (True, False):
            model.train(training)
            plain.train(training)
            assert torch.equal(model(x), plain(x))
        assert [(n, type(m)) for n, m in model.named_modules()] == modules
        assert list(model.state_dict()) == list(plain.state_dict())
        pairs = zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(InputError, match="closed"), norms.stream("a"):
        pass
    stream_norms(model).close()


def test_streams_do_not_see_each_other_and_the_inner_scope_wins():
    model = model_of_all()
    norms = stream_norms(model, beta=0.3)
    x, z = normal(5, 1, 4, 4, dtype=torch.float32), normal(2, 1, 4, 4, seed=1, dtype=torch.float32)
    with norms.stream("alone"):
        model(x)
        expected = model(x)
    with norms.stream("a"):
        model(x)
        with norms.stream("b", beta=0.9):
            model(z)
        with pytest.raises(KeyError), norms.stream("c"):
            raise KeyError
        assert torch.equal(model(x), expected)
    assert norms.streams == ("alone", "a", "b")
    norms.drop("a")
    assert norms.streams == ("alone", "b")


def test_scopes_of_two_models_are_apart():
    one, two = nn.LayerNorm(3), nn.LayerNorm(3)
    first, second = stream_norms(one), stream_norms(two)
    with first.stream("a"), second.stream("b"):
        one(torch.ones(1, 3))
        two(torch.ones(1, 3))
    assert (first.streams, second.streams) == (("a",), ("b",))


def test_threads_in_different_streams_never_mix():
    model, rounds = model_of_all(), 60
    batches = {n: normal(3, 1, 4, 4, seed=i, dtype=torch.float32) for i, n in enumerate("abc")}

    def work(norms, name, found, barrier=None):
        with norms.stream(name, beta=0.1):
            for _ in range(rounds):
                if barrier:
                    barrier.wait()
                y = model(batches[name])
            found[name] = y.detach()

    norms, together, alone = stream_norms(model), {}, {}
    barrier = threading.Barrier(len(batches))
    threads = [threading.Thread(target=work, args=(norms, n, together, barrier)) for n in batches]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    norms.load_state_dict({"streams": {}})
    for n in batches:
        work(norms, n, alone)
    assert set(together) == set("abc")
    assert all(torch.equal(together[n], alone[n]) for n in batches)


def test_no_update_is_lost_when_threads_share_a_stream():
    layer = nn.LayerNorm(2)
    norms = stream_norms(layer, beta=1e-4)

    def work():
        with norms.stream("a"):
            for _ in range(500):
                layer(torch.ones(1, 2))

    threads = [threading.Thread(target=work) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns within an update, were it not for the lock
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    mass = norms.state_dict()["streams"]["a"][""]["mass"]
    assert mass == pytest.approx(1 - (1 - 1e-4) ** 2000, rel=1e-10)


def test_another_threads_model_is_plain():
    model, plain = model_of_all().eval(), model_of_all().eval()
    norms, x = stream_norms(model), normal(2, 1, 4, 4, dtype=torch.float32)
    with norms.stream("a"):
        assert torch.equal(contextvars.Context().run(model, x), plain(x))


def test_the_state_goes_on_where_it_was_and_is_a_copy():
    model = model_of_all()
    norms = stream_norms(model, beta=0.2)
    x = normal(5, 1, 4, 4, dtype=torch.float32)
    with norms.stream("a"):
        model(x)
    state = norms.state_dict()
    with norms.stream("a"):
        expected = [model(x), model(x)]
    assert set(state["streams"]["a"]) == {"1", "4"}

    other = model_of_all()
    resumed = stream_norms(other, beta=0.2)
    resumed.load_state_dict(state)
    with resumed.stream("a"):
        assert all(torch.equal(other(x), y) for y in expected)
    resumed.load_state_dict(state)
    with resumed.stream("a"):
        assert torch.equal(other(x), expected[0])


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_under_no_grad_keeps_its_statistics_in_float32(training):
    model, exact = model_of_all().bfloat16(), model_of_all().bfloat16().float()
    x = normal(5, 1, 4, 4).bfloat16()
    results = []
    for m, batch in ((model, x), (exact, x.float())):
        norms = stream_norms(m, beta=0.1)
        with torch.no_grad(), norms.stream("a"):
            m(batch)
            m.train(training)
            results.append(m(batch))
        kept = norms.state_dict()["streams"]["a"]["1"]
        assert (kept["mean"].dtype, kept["var"].dtype) == (torch.float32, torch.float32)
    assert results[0].dtype == torch.bfloat16
    torch.testing.assert_close(results[0].float(), results[1], rtol=0.05, atol=0.05)


def test_copies_of_the_model_have_no_streams_and_their_own_weights():
    model = model_of_all()
    norms = stream_norms(model)
    x = normal(5, 1, 4, 4, dtype=torch.float32)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].weight.fill_(3.0)
    plain = model_of_all()
    with torch.no_grad():
        plain[1].weight.fill_(3.0)
    with norms.stream("a"):
        assert torch.equal(twin(x), plain(x))
    assert norms.streams == ()
    torch.save(model, io.BytesIO())
    norms.close()
    stream_norms(twin).close()


def test_an_empty_batch_changes_nothing():
    layer = nn.LayerNorm(3)
    norms = stream_norms(layer)
    with norms.stream("a"):
        assert layer(torch.zeros(0, 3)).shape == (0, 3)
    assert norms.streams == ()


def test_a_batch_that_is_not_finite_leaves_the_statistics():
    model = nn.Sequential(nn.BatchNorm1d(2))
    norms = stream_norms(model)
    with norms.stream("a"):
        model(torch.ones(1, 2))
        before = norms.state_dict()["streams"]["a"]["0"]
        for bad in (float("nan"), float("inf")):
            with pytest.raises(NonFiniteError, match="stream 'a': the input of '0'"):
                model(torch.tensor([[1.0, bad]]))
        torch.testing.assert_close(norms.state_dict()["streams"]["a"]["0"], before, rtol=0, atol=0)


def test_a_stream_without_statistics_is_refused_in_eval_mode():
    model = model_of_all()
    norms, x = stream_norms(model), normal(2, 1, 4, 4, dtype=torch.float32)
    with norms.stream("a"):
        model(x)
    model.eval()
    with norms.stream("b"), pytest.raises(UnknownNameError, match=r"'b' has no statistics of '1'"):
        model(x)
    assert norms.streams == ("a",)
    with pytest.raises(UnknownNameError, match="there is no stream 'b'; choose one of: 'a'"):
        norms.drop("b")


@pytest.mark.parametrize("beta", [0.0, -0.1, 1.5, float("nan")])
def test_a_beta_out_of_range(beta):
    with pytest.raises(InputError, match=r"beta in \(0, 1\]"):
        stream_norms(nn.LayerNorm(2), beta=beta)
    norms = stream_norms(nn.LayerNorm(2))
    with pytest.raises(InputError, match=r"beta in \(0, 1\]"), norms.stream("a", beta=beta):
        pass


def test_other_errors():
    with pytest.raises(InputError, match="got Linear without one"):
        stream_norms(nn.Linear(2, 2))
    model = nn.Sequential(nn.BatchNorm1d(1), nn.LayerNorm(3))
    norms = stream_norms(model)
    with pytest.raises(InputError, match="'0' has streams already"):
        stream_norms(model)
    with norms.stream("a"):
        with pytest.raises(InputError, match=r"\[n, 1, ...\] of 2 or 3 axes, got shape \[2, 3\]"):
            model[0](torch.ones(2, 3))
        with pytest.raises(InputError, match=r"\[..., 3\], got shape \[2, 1\]"):
            model[1](torch.ones(2, 1))
        model[1](torch.ones(2, 3))
    state = norms.state_dict()
    for layer, shape in (("1", (3,)), ("7", ())):
        values = {"mean": torch.zeros(shape), "var": torch.zeros(shape), "mass": 1.0}
        with pytest.raises(CheckpointError, match=f"'{layer}' has shape"):
            norms.load_state_dict({"streams": {"z": {layer: values}}})
    assert norms.state_dict()["streams"].keys() == state["streams"].keys() == {"a"}

"""The diagonal Fisher against a per-example loop, over the layers and tricks models are made of."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from tessera import arch, trees
from tessera.arch import fisher as internals
from tessera.arch.anchor import shadow
from tessera.arch.labels import _sampled
from tessera.errors import AnchorError

N, C = 5, 3  # more examples than the estimator's own probe looks at


def loop(model, x, estimator, y=None):
    """Mean over examples of the squared gradient of log p, one example and label at a time."""
    twin = copy.deepcopy(model).eval() if copyable(model) else model.eval()
    named = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}
    for i in range(len(x)):
        p = twin(x[i : i + 1]).reshape(1, -1).softmax(1)[0].detach().double()
        for c in range(len(p)) if estimator == "exact" else [int(y[i])]:
            log_p = twin(x[i : i + 1]).reshape(1, -1).log_softmax(1)[0, c]
            if not log_p.requires_grad:
                continue
            grads = torch.autograd.grad(log_p, list(named.values()), allow_unused=True)
            weight = p[c] if estimator == "exact" else 1.0
            for n, g in zip(named, grads, strict=True):
                if g is not None:
                    sums[n] += weight * g.to_dense().double().square()
    return {n: s / len(x) for n, s in sums.items()}


def copyable(model):
    tensors = [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    return all(t.is_leaf for t in tensors)


def assert_same(got, want, rtol=1e-5):
    assert set(got) == set(want)
    overall = max(w.max().item() for w in want.values())
    for n in want:
        # atol: what is rounding noise beside the largest entry of its tensor, or of the model.
        atol = max(1e-10 * want[n].max().item(), 1e-20 * overall)
        torch.testing.assert_close(got[n].double(), want[n], rtol=rtol, atol=atol, msg=n)


def paths(model, x):
    """Parameter name -> "rule", "vmap" or "loop": how the estimator goes about it."""
    live = trees.parameters(model)
    twin = shadow(model, trees.clone(live), trees.clone(dict(model.named_buffers())))
    trainable = {n: p for n, p in trees.parameters(twin).items() if p.requires_grad}
    with torch.enable_grad():
        plan = internals._plan(twin, twin, trainable, x[: internals._PROBE])
    found = {full: "rule" for names in plan.layers.values() for full in names.values()}
    return found | dict.fromkeys(plan.vmapped, "vmap") | dict.fromkeys(plan.looped, "loop")


class Fn(nn.Module):
    """A module around a function of (its parts, x)."""

    def __init__(self, fn, **parts):
        super().__init__()
        self._fn = fn
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self._fn(self, x)


class Scaled(nn.Linear):
    """A subclass that computes something else than its base."""

    def forward(self, x):
        return 2.0 * F.linear(x, self.weight.square(), self.bias)


class Mixture(nn.Module):
    """Every token goes to one of two experts, by a boolean index."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, C)

    def forward(self, x):
        tokens = x.reshape(-1, 4)
        out = torch.zeros_like(tokens)
        for k, expert in enumerate(self.experts):
            mine = (tokens[:, 0] > 0) == bool(k)
            if mine.any():
                out[mine] = expert(tokens[mine]).tanh()
        return self.head(out.reshape(len(x), -1, 4).sum(1))


def images(*shape):
    return torch.randn(N, *shape)


def after(layer, x):
    """`layer`, a smooth bend, and a linear read-out of everything."""
    width = layer(x).flatten(1).shape[1]
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, C)), x


def conv1d(**kwargs):
    return lambda: after(nn.Conv1d(4, 6, **{"kernel_size": 3, **kwargs}), images(4, 9))


def conv2d(**kwargs):
    return lambda: after(nn.Conv2d(4, 6, **{"kernel_size": 3, **kwargs}), images(4, 7, 6))


def norm(make, *shape):
    def build():
        layer = make()
        for p in layer.parameters():
            nn.init.normal_(p)
        for name, b in layer.named_buffers():
            if name.startswith("running"):
                nn.init.uniform_(b, 0.5, 2.0)
        return after(layer.eval(), images(*shape))

    return build


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)), images(4)


def sequence():
    body = Fn(lambda m, x: m.b(m.a(x).tanh()).mean(1), a=nn.Linear(4, 6), b=nn.Linear(6, C))
    return body, images(3, 4)


def embedding():
    ids = torch.tensor([[1, 1, 2, 0], [3, 1, 3, 0], [0, 0, 4, 4], [2, 2, 2, 2], [5, 1, 0, 3]])
    emb = nn.Embedding(7, 4, padding_idx=0)
    return Fn(lambda m, i: m.head(m.emb(i).tanh().sum(1)), emb=emb, head=nn.Linear(4, C)), ids


def sparse_embedding():
    model, ids = embedding()
    model.emb.sparse = True
    return model, ids


def tied(**options):
    def build():
        def forward(m, i):
            return m.out(m.emb(i).tanh().mean(1))

        model = Fn(forward, emb=nn.Embedding(C, 4), out=nn.Linear(4, C, bias=False))
        model.out.weight = model.emb.weight
        return model, torch.randint(0, C, (N, 3))

    return build


def functional_weight():
    def forward(m, i):
        return F.linear(m.emb(i).tanh().mean(1), m.emb.weight)

    return Fn(forward, emb=nn.Embedding(C, 4)), torch.randint(0, C, (N, 3))


def used_twice():
    def forward(m, x):
        return m.head(m.lin(m.lin(x).tanh()))

    return Fn(forward, lin=nn.Linear(4, 4), head=nn.Linear(4, C)), images(4)


def flat_and_sequence():
    def forward(m, x):
        return m.head(m.lin(x.mean(1)).tanh() + m.lin(x).tanh().sum(1))

    return Fn(forward, lin=nn.Linear(4, 4), head=nn.Linear(4, C)), images(3, 4)


def attention():
    def forward(m, x):
        return m.head(m.mha(x, x, x, need_weights=False)[0].mean(1))

    mha = nn.MultiheadAttention(4, 2, batch_first=True)
    return Fn(forward, mha=mha, head=nn.Linear(4, C)), images(3, 4)


def transformer(batch_first):
    def build():
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=batch_first)

        def forward(m, x):
            h = x if batch_first else x.transpose(0, 1)
            return m.head(m.layer(h).mean(1 if batch_first else 0))

        return Fn(forward, layer=layer, head=nn.Linear(4, C)), images(N, 4)

    return build


def attention_by_hand():
    """A bias on the keys shifts all scores alike, so its gradient is rounding noise."""

    def forward(m, x):
        h = F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))
        return m.head(h.mean(1))

    parts = {name: nn.Linear(4, 4) for name in "qkv"}
    return Fn(forward, **parts, head=nn.Linear(4, C)), images(6, 4)


def recurrent(kind, **options):
    def build():
        def forward(m, x):
            return m.head(m.rnn(x)[0][:, -1])

        rnn = kind(4, 5, batch_first=True, **options)
        width = 10 if options.get("bidirectional") else 5
        return Fn(forward, rnn=rnn, head=nn.Linear(width, C)), images(3, 4)

    return build


def bare_parameter():
    def forward(m, x):
        return m.lin(x * m.scale) + m.offset

    return Fn(
        forward,
        lin=nn.Linear(4, C),
        scale=nn.Parameter(torch.randn(4)),
        offset=nn.Parameter(torch.randn(C)),
    ), images(4)


def frozen():
    model, x = mlp()
    model[0].weight.requires_grad_(False)
    return model, x


def unused():
    return Fn(lambda m, x: m.lin(x), lin=nn.Linear(4, C), spare=nn.Linear(4, 4)), images(4)


def residual():
    def forward(m, x):
        h = x + m.a(x)
        h = h + F.relu(m.b(h), inplace=True)
        return m.head(m.norm(h))

    parts = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
    return Fn(forward, **parts, head=nn.Linear(4, C)), images(4)


def inplace_relu():
    parts = [nn.Linear(4, 16), nn.ReLU(inplace=True), nn.Linear(16, 8), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts, nn.Linear(8, C)), images(4)


def inplace_input():
    def forward(m, x):
        return m.lin(x.mul_(3.0).sub_(1.0))

    return Fn(forward, lin=nn.Linear(4, C)), images(4)


def squeezing():
    """Forgets that a batch may hold one example."""

    def forward(m, x):
        h = F.adaptive_avg_pool2d(m.conv(x).tanh(), 1).squeeze()
        return m.head(h)

    return Fn(forward, conv=nn.Conv2d(2, 4, 3), head=nn.Linear(4, C)), images(2, 5, 5)


def batch_dim_one():
    def forward(m, x):
        return m.head(m.lin(x.transpose(0, 1)).tanh().mean(0))

    return Fn(forward, lin=nn.Linear(4, 4), head=nn.Linear(4, C)), images(3, 4)


def flattened_tokens():
    def forward(m, x):
        return m.head(m.lin(x.reshape(-1, 4)).tanh().reshape(len(x), -1, 4).mean(1))

    return Fn(forward, lin=nn.Linear(4, 4), head=nn.Linear(4, C)), images(3, 4)


def by_keyword():
    return Fn(lambda m, x: m.lin(input=x), lin=nn.Linear(4, C)), images(4)


def mixture():
    return Mixture(), images(3, 4)


def expert_unseen_by_the_probe():
    """The first examples never reach the second expert; the others reach it with N of 3 N tokens,
    which are not one of each example."""
    x = images(3, 4)
    x[..., 0] = -1.0
    for example, token in ((3, 0), (3, 1), (3, 2), (4, 0), (4, 2)):
        x[example, token, 0] = 1.0
    return Mixture(), x


def branch_late():
    """All of the probe goes one way, later examples the other: a rule that stops to fit."""
    x = images(1, 4)
    x[..., 0] = 1.0
    x[4, :, 0] = -1.0
    return Mixture(), x


def hooked():
    model, x = mlp()
    model[0].register_forward_hook(lambda module, args, out: out * out)
    return model, x


def extra_parameter():
    model, x = mlp()
    gain = nn.Parameter(torch.tensor(1.5))
    model[0].register_parameter("gain", gain)
    return Fn(lambda m, x: m.net(x * m.net[0].gain), net=model), x


def weight_normed():
    model, x = mlp()
    parametrizations.weight_norm(model[0])
    return model, x


def old_spectral_norm():
    model, x = mlp()
    model.eval()
    nn.utils.spectral_norm(model[0])
    return model, x


def checkpointed():
    def forward(m, x):
        return m.head(checkpoint(m.body, x, use_reentrant=False))

    body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    return Fn(forward, body=body, head=nn.Linear(6, C)), images(4)


def masked():
    model, x = mlp()
    mask = torch.zeros(C)
    mask[1] = -math.inf
    return Fn(lambda m, x: m.net(x) + mask.to(x.dtype), net=model), x


def pruned():
    model, x = mlp()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    model(x)  # leaves a weight with a history behind
    return model, x


def remembering():
    def forward(m, x):
        m.last = m.a(x).tanh()  # as one does to look at features
        return m.head(m.last)

    model, x = Fn(forward, a=nn.Linear(4, 4), head=nn.Linear(4, C)), images(4)
    model(x)
    return model, x


ZOO = {
    "mlp": mlp,
    "linear on sequences": sequence,
    "linear without bias": lambda: (nn.Linear(4, C, bias=False), images(4)),
    "conv1d": conv1d(),
    "conv1d stride dilation": conv1d(stride=2, dilation=2, padding=3),
    "conv1d groups": conv1d(groups=2),
    "conv1d same": conv1d(padding="same", kernel_size=5),
    "conv1d valid": conv1d(padding="valid"),
    "conv1d reflect": conv1d(padding=2, padding_mode="reflect"),
    "conv1d circular": conv1d(padding=1, padding_mode="circular", stride=2),
    "conv1d no bias": conv1d(bias=False),
    "conv2d": conv2d(),
    "conv2d stride dilation": conv2d(stride=(2, 1), dilation=(1, 2), padding=(2, 3)),
    "conv2d groups": conv2d(groups=2, kernel_size=(3, 2)),
    "conv2d depthwise": lambda: after(nn.Conv2d(4, 8, 3, groups=4), images(4, 6, 5)),
    "conv2d same": conv2d(padding="same", dilation=2),
    "conv2d same even": conv2d(padding="same", kernel_size=(2, 3), dilation=2),
    "conv2d reflect": conv2d(padding=(1, 2), padding_mode="reflect"),
    "conv2d replicate": conv2d(padding=(1, 2), padding_mode="replicate"),
    "conv2d circular": conv2d(padding=2, padding_mode="circular", bias=False),
    "conv3d": lambda: after(nn.Conv3d(2, 3, 2), images(2, 3, 3, 3)),
    "transposed conv": lambda: after(nn.ConvTranspose1d(2, 3, 2), images(2, 4)),
    "embedding": embedding,
    "sparse embedding": sparse_embedding,
    "layer norm": norm(lambda: nn.LayerNorm(4), 3, 4),
    "layer norm flat": norm(lambda: nn.LayerNorm(4), 4),
    "layer norm 2-d": norm(lambda: nn.LayerNorm((3, 4)), 2, 3, 4),
    "layer norm no bias": norm(lambda: nn.LayerNorm(4, bias=False), 3, 4),
    "rms norm": norm(lambda: nn.RMSNorm(4), 3, 4),
    "group norm": norm(lambda: nn.GroupNorm(2, 4), 4, 3, 3),
    "group norm flat": norm(lambda: nn.GroupNorm(2, 4), 4),
    "batch norm 1d": norm(lambda: nn.BatchNorm1d(4), 4),
    "batch norm 1d sequence": norm(lambda: nn.BatchNorm1d(4), 4, 3),
    "batch norm 2d": norm(lambda: nn.BatchNorm2d(4), 4, 3, 2),
    "batch norm 3d": norm(lambda: nn.BatchNorm3d(4), 4, 2, 2, 2),
    "used twice": used_twice,
    "flat and sequence": flat_and_sequence,
    "tied": tied(),
    "functional weight": functional_weight,
    "attention": attention,
    "attention by hand": attention_by_hand,
    "transformer": transformer(True),
    "transformer, batch second": transformer(False),
    "lstm": recurrent(nn.LSTM),
    "gru": recurrent(nn.GRU, num_layers=2),
    "bidirectional rnn": recurrent(nn.RNN, bidirectional=True),
    "bare parameter": bare_parameter,
    "subclass": lambda: (nn.Sequential(Scaled(4, 5), nn.Tanh(), nn.Linear(5, C)), images(4)),
    "weight norm": weight_normed,
    "old spectral norm": old_spectral_norm,
    "frozen": frozen,
    "unused": unused,
    "residual": residual,
    "inplace relu": inplace_relu,
    "inplace input": inplace_input,
    "squeezing": squeezing,
    "batch dim one": batch_dim_one,
    "flattened tokens": flattened_tokens,
    "by keyword": by_keyword,
    "mixture": mixture,
    "expert unseen by the probe": expert_unseen_by_the_probe,
    "branch late": branch_late,
    "forward hook": hooked,
    "extra parameter": extra_parameter,
    "checkpointed": checkpointed,
    "pruned": pruned,
    "remembering": remembering,
    "masked": masked,
}


def build(name, dtype=torch.float64):
    torch.manual_seed(3)
    model, x = ZOO[name]()
    if dtype is not None:
        model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    return model.train(), x


@pytest.mark.parametrize("name", ZOO)
def test_exact_fisher_equals_the_loop_over_examples_and_labels(name):
    model, x = build(name)
    if name == "inplace input":
        truth = loop(model.lin, x * 3.0 - 1.0, "exact")
        truth = {f"lin.{n}": f for n, f in truth.items()}
    else:
        truth = loop(model, x, "exact")
    given = x.clone()
    got = arch.anchor_from(model, "a", data=[(x, None)])
    assert torch.equal(x, given)
    assert got.stats["estimator"] == "exact"
    assert_same(got.fisher, truth)
    assert set(got.params) == set(dict(model.named_parameters()))


@pytest.mark.parametrize("estimator", ["empirical", "sampled"])
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("inplace input", "masked")])
def test_one_label_fisher_equals_the_loop_over_examples(name, estimator):
    model, x = build(name)
    y = torch.randint(0, C, (len(x),))
    labels = y
    if estimator == "sampled":
        p = model.eval()(x).softmax(1).float()
        labels = _sampled(p.detach(), 0, 7)
        model.train()
    got = arch.anchor_from(model, "a", data=[(x, y)], estimator=estimator, seed=7)
    assert got.stats["estimator"] == estimator
    assert_same(got.fisher, loop(model, x, estimator, labels))


@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer", "lstm", "embedding", "tied"])
def test_float32_is_right_to_1e_5_of_each_tensors_largest_entry(name):
    model, x = build(name, torch.float32)
    want = loop(model.double(), x.double() if x.is_floating_point() else x, "exact")
    got = arch.anchor_from(model.float(), "a", data=[(x, None)]).fisher
    for n in want:
        assert got[n].dtype == torch.float32
        assert (got[n] - want[n]).abs().max() <= 1e-5 * want[n].max(), n


@pytest.mark.parametrize("name", ["mlp", "linear on sequences", "conv2d", "attention", "mixture"])
def test_bfloat16_is_right_to_its_own_resolution(name):
    torch.manual_seed(0)
    model, x = ZOO[name]()
    x = torch.randn(300, *x.shape[1:]).bfloat16()
    model = model.bfloat16()
    want = loop(copy.deepcopy(model).double(), x.double(), "exact")
    got = arch.anchor_from(model, "a", data=[(x, None)]).fisher
    for n in want:
        assert got[n].dtype == torch.bfloat16
        # Activations and gradients of 8 bits, squared; an accumulator of 8 bits would be off by 20.
        assert (got[n].double() - want[n]).abs().max() <= 0.03 * want[n].max(), n


def test_float64_models_keep_their_precision():
    model, x = build("mlp")
    got = arch.anchor_from(model, "a", data=[(x, None)]).fisher
    assert all(f.dtype == torch.float64 for f in got.values())


def test_softmax_regression_has_its_closed_form():
    torch.manual_seed(0)
    x, model = torch.randn(300, 6), nn.Linear(6, 5)
    # E_y (delta_yc - p_c)^2 = p_c (1 - p_c)^2 + (1 - p_c) p_c^2 = p_c (1 - p_c)
    p = model(x).softmax(1).detach().double()
    spread = p * (1 - p)
    want = spread.T @ x.double().square() / len(x)
    got = arch.anchor_from(model, "a", data=[(x, None)]).fisher
    torch.testing.assert_close(got["weight"].double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(got["bias"].double(), spread.mean(0), rtol=1e-5, atol=0)


def test_the_square_of_a_batch_mean_gradient_is_another_thing():
    """The mistake the field makes; the oracle must be able to tell."""
    model, x = build("mlp")
    truth = loop(model, x, "exact")
    y = torch.randint(0, C, (len(x),))
    F.cross_entropy(model(x), y).backward()
    wrong = {n: p.grad.square() for n, p in model.named_parameters()}
    with pytest.raises(AssertionError):
        assert_same(wrong, truth)


def test_layers_with_a_rule_take_it():
    for name in ("mlp", "linear on sequences", "conv1d reflect", "conv2d groups", "embedding",
                 "layer norm 2-d", "rms norm", "group norm", "batch norm 3d", "used twice",
                 "flat and sequence", "inplace relu", "frozen", "residual"):  # fmt: skip
        assert set(paths(*build(name)).values()) == {"rule"}, name


@pytest.mark.parametrize(
    ("name", "parameter", "path"),
    [
        ("tied", "emb.weight", "vmap"),
        ("functional weight", "emb.weight", "vmap"),
        ("attention", "mha.in_proj_weight", "vmap"),
        ("attention", "head.weight", "rule"),
        ("transformer", "layer.linear1.weight", "rule"),
        ("transformer", "layer.self_attn.in_proj_weight", "vmap"),
        ("transformer, batch second", "layer.linear1.weight", "vmap"),
        ("bare parameter", "scale", "vmap"),
        ("bare parameter", "lin.weight", "rule"),
        ("subclass", "0.weight", "vmap"),
        ("subclass", "2.weight", "rule"),
        ("weight norm", "0.parametrizations.weight.original0", "vmap"),
        ("batch dim one", "lin.weight", "vmap"),
        ("flattened tokens", "lin.weight", "vmap"),
        ("by keyword", "lin.weight", "vmap"),
        ("forward hook", "0.weight", "vmap"),
        ("mixture", "experts.0.weight", "loop"),
        ("mixture", "head.weight", "rule"),
        ("conv3d", "0.weight", "vmap"),
    ],
)
def test_unusual_uses_are_demoted_and_the_rest_is_not(name, parameter, path):
    assert paths(*build(name))[parameter] == path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gradient_of_rounding_noise_does_not_demote_its_layer(dtype):
    assert paths(*build("attention by hand", dtype))["k.weight"] == "rule"


@pytest.mark.parametrize("name", ["mlp", "conv2d", "linear on sequences", "residual"])
def test_half_precision_layers_take_their_rule_too(name):
    model, x = build(name, torch.bfloat16)
    assert set(paths(model, x).values()) == {"rule"}


def test_as_many_tokens_as_examples_do_not_fool_the_rule():
    """A layer that sees [T, n, d] with T = n looks like one that sees [n, T, d]."""
    model, _ = build("batch dim one")
    for n in (2, 3, 4):
        x = torch.randn(n, n, 4, dtype=torch.float64)
        assert_same(arch.anchor_from(model, "a", data=[(x, None)]).fisher, loop(model, x, "exact"))


def test_a_frozen_parameter_is_remembered_without_a_fisher():
    model, x = build("frozen")
    anchor = arch.anchor_from(model, "a", data=[x])
    assert "0.weight" in anchor.params
    assert set(anchor.fisher) == {"0.bias", "2.weight", "2.bias"}


def test_a_model_without_a_gradient_is_refused_instead_of_given_a_fisher_of_zeros():
    frozen, x = build("mlp")
    frozen.requires_grad_(False)
    head_only, _ = build("unused")
    head_only.lin.requires_grad_(False)
    blind = Fn(torch.no_grad()(lambda m, x: m.net(x)), net=build("mlp")[0])
    for model in (frozen, head_only, blind):
        with pytest.raises(AnchorError, match="no trainable parameter reaches the logits of"):
            arch.anchor_from(model, "a", data=[x])
    model, x = build("mlp")
    with torch.inference_mode(), pytest.raises(AnchorError, match="no trainable parameter"):
        arch.anchor_from(model, "a", data=[x])
    assert len(arch.anchor_from(frozen, "a", fisher=None).params) == 4


def test_reentrant_checkpoints_are_refused_instead_of_given_a_fisher_of_zeros():
    def forward(m, x):
        return m.head(checkpoint(m.body, x.requires_grad_(), use_reentrant=True))

    x = images(4)
    model = Fn(forward, body=nn.Linear(4, 4), head=nn.Linear(4, C))
    with pytest.raises(AnchorError, match=r"'body\.weight' has a .*use_reentrant=False"):
        arch.anchor_from(model, "a", data=[x])
    upstream = Fn(lambda m, x: m.rest(m.first(x)), first=nn.Linear(4, 4), rest=model)
    with pytest.raises((AnchorError, RuntimeError), match="use_reentrant=False"):
        arch.anchor_from(upstream, "a", data=[x])


def test_an_unused_parameter_has_importance_zero():
    model, x = build("unused")
    anchor = arch.anchor_from(model, "a", data=[x])
    assert anchor.fisher["spare.weight"].count_nonzero() == 0
    assert anchor.fisher["lin.weight"].count_nonzero() > 0


def test_the_padding_row_of_an_embedding_has_importance_zero():
    model, ids = build("embedding")
    fisher = arch.anchor_from(model, "a", data=[ids]).fisher["emb.weight"]
    assert fisher[0].count_nonzero() == 0
    assert fisher[6].count_nonzero() == 0  # a token that never occurs
    assert bool((fisher[1:6] > 0).all())


def test_a_last_block_of_one_example_is_like_any_other():
    for name in ("squeezing", "mlp", "attention"):
        model, x = build(name)
        x = torch.randn(internals.BLOCK + 1, *x.shape[1:], dtype=torch.float64)
        got = arch.anchor_from(model, "a", data=[x]).fisher
        parts = [arch.anchor_from(model, "a", data=[part]).fisher for part in (x[:-1], x[-2:])]
        last = loop(model, x[-1:], "exact")
        for n in got:
            want = (parts[0][n] * internals.BLOCK + last[n]) / len(x)
            torch.testing.assert_close(got[n], want, rtol=1e-5, atol=1e-12)

"""The bottom row: errors, counter-based randomness, and named tensors."""

import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from tessera import errors, random, trees

# --- errors -----------------------------------------------------------------------------------


def classes():
    found = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    return [c for c in found if issubclass(c, errors.TesseraError)]


def test_every_error_is_caught_by_the_base_and_by_the_builtin_one_expects():
    expected = {
        "InputError": ValueError,
        "UnknownNameError": LookupError,
        "AnchorError": ValueError,
        "DeltaError": ValueError,
        "AccessError": PermissionError,
        "ConflictError": RuntimeError,
        "BusyError": RuntimeError,
        "GraphError": ValueError,
        "MetricError": ValueError,
        "NonFiniteError": FloatingPointError,
        "MissingDataError": FileNotFoundError,
        "CheckpointError": ValueError,
        "StorageError": OSError,
    }
    assert {c.__name__ for c in classes()} == {"TesseraError", *expected}
    for name, builtin in expected.items():
        error = getattr(errors, name)
        assert issubclass(error, errors.TesseraError)
        with pytest.raises(builtin, match="why"):
            raise error("why")


def test_every_error_is_exported_and_drawn_in_the_tree():
    for c in classes():
        assert c.__name__ in errors.__all__
        assert c.__name__ in errors.__doc__
        for base in c.__bases__:
            if base is not Exception:
                assert base.__name__ in errors.__doc__


def test_an_unknown_name_is_answered_with_the_known_ones():
    error = errors.unknown_name("policy", 3, iter(["ring", "reservoir"]))
    assert isinstance(error, errors.UnknownNameError)
    assert str(error) == "there is no policy 3; choose one of: ring, reservoir"


# --- random -----------------------------------------------------------------------------------


def test_the_stream_is_the_one_of_the_first_release():
    """A change of these numbers is a change of every run ever recorded."""
    assert random.key(0, "order", 1) == 4004135407344543170
    assert random.key(-5) == 10679508885902638142
    far = random.bits(random.key(0, "demo"), 10**12, 2)
    assert far.tolist() == [16068170152098862530, 5478143321778337792]
    assert random.permutation(8, 0, "order", 1).tolist() == [2, 6, 3, 4, 5, 1, 7, 0]
    drawn = torch.rand(2, generator=random.generator(0, "init")).tolist()
    assert drawn == [0.0653502345085144, 0.5059787034988403]


def splitmix64(seed, count):
    """The published generator, in Python's own integers."""
    mask, state, out = (1 << 64) - 1, seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


@pytest.mark.parametrize("key", [0, 1, 1234567, 2**64 - 1])
def test_bits_are_splitmix64(key):
    assert random.bits(key, 0, 20).tolist() == splitmix64(key, 20)


def test_bits_do_not_depend_on_how_they_are_asked_for():
    key = random.key(3, "x")
    whole = random.bits(key, 0, 1000)
    assert whole.dtype == np.uint64
    for start, count in ((0, 1), (999, 1), (17, 300), (500, 0)):
        assert np.array_equal(random.bits(key, start, count), whole[start : start + count])
    far = random.bits(key, 2**40, 4)
    assert np.array_equal(random.bits(key, 2**40 + 2, 2), far[2:])


def test_bits_are_uniform_in_every_part_of_the_word():
    """Chi-squared over 256 cells of the top, the middle and the bottom byte: 5 sigma."""
    for seed in range(3):
        raw = random.bits(random.key(seed, "chi"), 0, 200_000)
        for shift in (56, 28, 0):
            cells = np.bincount(
                ((raw >> np.uint64(shift)) & np.uint64(255)).astype(int), minlength=256
            )
            expected = len(raw) / 256
            chi2 = ((cells - expected) ** 2 / expected).sum()
            assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    lopsided = np.bincount((raw >> np.uint64(57)).astype(int), minlength=256)
    assert ((lopsided - expected) ** 2 / expected).sum() > 10_000


def test_neighbouring_keys_and_positions_are_independent():
    streams = [random.bits(random.key(s, "a", t), 0, 4000) for s in range(3) for t in range(3)]
    numbers = np.array([(b >> np.uint64(11)).astype(float) * 2.0**-53 for b in streams])
    off = np.corrcoef(numbers) - np.eye(len(streams))
    assert np.abs(off).max() < 5 / math.sqrt(4000)
    lagged = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in numbers]
    assert np.abs(lagged).max() < 5 / math.sqrt(4000)


def test_components_do_not_share_a_key():
    paths = [(), ("a",), ("a", 1), ("a", "1"), ("a1",), (1, "a"), ("a", 1, 0), ("a", 10), ("a,1",)]
    keys = [random.key(s, *p) for s in (0, 1, -1, 2**70) for p in paths]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**64 for k in keys)


def test_generators_are_their_own_and_leave_the_global_one_alone():
    before = torch.random.get_rng_state()
    a, b = random.generator(0, "a"), random.generator(0, "b")
    one = torch.rand(5, generator=a)
    torch.rand(100, generator=b)
    two = torch.rand(5, generator=a)
    again = random.generator(0, "a")
    assert torch.equal(torch.rand(10, generator=again), torch.cat([one, two]))
    assert not torch.equal(one, torch.rand(5, generator=random.generator(1, "a")))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_permutations_are_permutations_of_their_path():
    for n in (0, 1, 2, 100):
        p = random.permutation(n, 7, "order", n)
        assert p.dtype == torch.int64
        assert sorted(p.tolist()) == list(range(n))
        assert torch.equal(p, random.permutation(n, 7, "order", n))
    assert not torch.equal(random.permutation(100, 7, "a"), random.permutation(100, 7, "b"))


# --- trees ------------------------------------------------------------------------------------


def test_parameters_go_by_their_first_name_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert list(trees.parameters(model)) == ["0.weight", "0.bias"]
    assert trees.parameters(model)["0.weight"] is model[0].weight


def test_clones_share_nothing():
    w = torch.ones(2, requires_grad=True)
    copies = trees.clone({"w": w})
    assert not copies["w"].requires_grad
    copies["w"].add_(1)
    assert w.tolist() == [1.0, 1.0]


BASE = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([5, 6])}


def test_a_digest_is_of_the_content():
    want = trees.sha256(BASE)
    assert want == "6f946ed035fdcefefe074ba26eb65d5d97a0824189263b2a7993d695f856bc7c"
    copies = {n: t.clone() for n, t in BASE.items()}
    assert trees.sha256(copies) == want
    assert trees.sha256(dict(reversed(copies.items()))) == want
    assert trees.sha256({**BASE, "a": nn.Parameter(BASE["a"])}) == want
    spread = torch.zeros(4, 2)
    spread[:, 0] = BASE["a"]
    assert trees.sha256({**BASE, "a": spread[:, 0]}) == want


@pytest.mark.parametrize(
    "other",
    [
        {"a": BASE["a"]},
        {**BASE, "c": torch.zeros(0)},
        {"a2": BASE["a"], "b": BASE["b"]},
        {"b": BASE["a"], "a": BASE["b"]},
        {**BASE, "a": BASE["a"].reshape(2, 2)},
        {**BASE, "a": BASE["a"].reshape(1, 4)},
        {**BASE, "a": BASE["a"].double()},
        {**BASE, "a": BASE["a"].view(torch.int32)},
        {**BASE, "a": BASE["a"].flip(0)},
        {**BASE, "a": torch.nextafter(BASE["a"], torch.tensor(9.0))},
        {**BASE, "b": BASE["b"].int()},
    ],
)
def test_a_digest_sees_every_difference(other):
    assert trees.sha256(other) != trees.sha256(BASE)


def test_a_digest_sees_signs_of_zero_and_takes_every_dtype():
    assert trees.sha256({"a": torch.tensor([0.0])}) != trees.sha256({"a": torch.tensor([-0.0])})
    dtypes = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.complex64]
    digests = {trees.sha256({"a": torch.ones(3, dtype=d)}) for d in dtypes}
    digests |= {trees.sha256({}), trees.sha256({"a": torch.tensor(1.0)})}
    assert len(digests) == len(dtypes) + 2


def test_importing_the_package_does_not_bring_pytorchs_tracer():
    code = (
        "import torch, sys; before = set(sys.modules); import tessera;"
        "print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] == 'sympy'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

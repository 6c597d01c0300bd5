"""The thin functions: PyTorch's values, and errors that say what to do."""

import pytest
import torch
import torch.nn.functional as F

from tessera import ops as T
from tessera.errors import InputError


def drawn(*shape):
    g = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def test_softmax_and_its_logarithm_are_over_the_last_dimension():
    z = drawn(3, 4)
    e = z.exp()
    torch.testing.assert_close(T.softmax(z), e / e.sum(1, keepdim=True))
    torch.testing.assert_close(T.softmax(z, 0), e / e.sum(0, keepdim=True))
    torch.testing.assert_close(T.log_softmax(z), T.softmax(z).log())
    torch.testing.assert_close(T.log_softmax(z, dim=0), T.softmax(z, 0).log())


def test_softmax_bears_large_logits():
    z = torch.tensor([[1e4, 0.0, -1e4]])
    assert T.softmax(z).tolist() == [[1.0, 0.0, 0.0]]
    assert T.log_softmax(z).tolist() == [[0.0, -1e4, -2e4]]


def test_cross_entropy_is_the_mean_of_the_negative_log_likelihood():
    z, y = drawn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    want = -sum(z[i].log_softmax(0)[c] for i, c in enumerate(y.tolist())) / 5
    torch.testing.assert_close(T.cross_entropy(z, y), want)


def test_cross_entropy_over_positions_and_ignored_labels():
    z, y = drawn(2, 4, 3), torch.tensor([[0, 3, -100], [1, -100, 2]])
    kept = [(0, 0), (0, 1), (1, 0), (1, 2)]
    want = -sum(z[i, :, t].log_softmax(0)[y[i, t]] for i, t in kept) / 4
    torch.testing.assert_close(T.cross_entropy(z, y), want)


def test_cross_entropy_names_what_does_not_fit():
    with pytest.raises(InputError, match=r"got logits \(5, 4\) and labels \(4,\)"):
        T.cross_entropy(drawn(5, 4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InputError, match=r"got logits \(4,\) and labels \(\)"):
        T.cross_entropy(drawn(4), torch.tensor(0))
    with pytest.raises(InputError, match=r"needs int64 .*got torch\.int32; use labels\.long\(\)"):
        T.cross_entropy(drawn(5, 4), torch.zeros(5, dtype=torch.int32))
    with pytest.raises(InputError, match=r"needs int64 .*got torch\.float64"):
        T.cross_entropy(drawn(5, 4), torch.zeros(5).double())
    with pytest.raises(InputError, match=r"outside 0 \.\. 3: labels span 0 \.\. 4"):
        T.cross_entropy(drawn(2, 4), torch.tensor([0, 4]))
    with pytest.raises(InputError, match=r"labels span -1 \.\. 2"):
        T.cross_entropy(drawn(2, 4), torch.tensor([2, -1]))


def test_cross_entropy_works_under_vmap_and_grad():
    z, y = drawn(3, 5, 4), torch.randint(0, 4, (3, 5), generator=torch.Generator().manual_seed(1))
    got = torch.func.vmap(torch.func.grad(T.cross_entropy))(z, y)
    each = [torch.func.grad(F.cross_entropy)(a, b) for a, b in zip(z, y, strict=True)]
    torch.testing.assert_close(got, torch.stack(each))


def test_concat_joins_along_the_batch():
    a, b = drawn(2, 3), drawn(1, 3)
    assert torch.equal(T.concat([a, b]), torch.cat([a, b]))
    assert torch.equal(T.concat((a, a), dim=1), torch.cat([a, a], 1))
    assert torch.equal(T.concat([torch.zeros(0).double(), a]), a)


def test_concat_names_the_shapes_that_do_not_fit():
    with pytest.raises(InputError, match=r"along dim 0 needs .*got \(2, 3\), \(2, 4\)"):
        T.concat([drawn(2, 3), drawn(2, 4)])
    with pytest.raises(InputError, match=r"along dim 5 needs"):
        T.concat([drawn(2, 3)], dim=5)
    with pytest.raises(InputError, match=r"concat along dim 0"):
        T.concat([])


def test_kl_divergence_names_the_shapes_that_do_not_fit():
    with pytest.raises(InputError, match=r"of one shape, got \(2, 3\) and \(3,\)"):
        T.kl_divergence(drawn(2, 3), drawn(3))
    with pytest.raises(InputError, match=r"of one shape, got \(\) and \(\)"):
        T.kl_divergence(torch.tensor(0.0), torch.tensor(1.0))


def test_kl_divergence_of_sequences_sums_positions_and_averages_the_batch():
    p, q = T.softmax(drawn(2, 3, 4)), T.softmax(2 * drawn(2, 3, 4))
    want = (q * (q.log() - p.log())).sum() / 2
    torch.testing.assert_close(T.kl_divergence(p.log(), q), want)

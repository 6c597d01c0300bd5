"""The faiss backend, from a few hundred entries on here: what it looks into it ranks exactly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessera.errors import CheckpointError, MissingDataError
from tessera.retrieval import Hits, Index, store
from tessera.retrieval import index as module

pytest.importorskip("faiss", reason="faiss is not installed: pip install 'tessera-lifelong[faiss]'")

ALL = 10_000  # more lists than there are


@pytest.fixture(autouse=True)
def from_500_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_APPROXIMATE_FROM", 500)


def clustered(rows: int, dim: int = 16, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, dim, generator=g)
    of = torch.randint(0, 20, (rows,), generator=g)
    return centres[of] + 0.4 * torch.randn(rows, dim, generator=g)


def pair(vectors: Tensor, *, probes: int, metric: str = "cosine") -> tuple[Index, Index]:
    """The same entries, in a faiss index and in an exact one."""
    both = (
        Index(dim=vectors.shape[1], metric=metric, backend="faiss", probes=probes),
        Index(dim=vectors.shape[1], metric=metric),
    )
    for index in both:
        half = len(vectors) // 2
        index.add(vectors[:half], range(half), namespace="a")
        index.add(vectors[half:], range(half, len(vectors)), namespace="b")
    return both


def same(a: Hits, b: Hits) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.scores, b.scores) and a[2] == b[2]


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_looking_into_every_list_is_exact_to_the_bit(metric: str) -> None:
    vectors = clustered(1500)
    near, exact = pair(vectors, probes=ALL, metric=metric)
    assert near._lists is not None
    for step in range(3):
        for q in clustered(10, seed=step + 1):
            for k in (1, 10, 40):
                for space in (None, "a", "b"):
                    for threshold in (-1.0, 0.8):
                        got, want = (
                            i.query(q, k, namespace=space, threshold=threshold)
                            for i in (near, exact)
                        )
                        assert same(got, want)
            assert same(near.query_batch(q[None], 10)[0], exact.query(q, 10))
        gone = range(200 * step, 200 * step + 150)
        near.delete(gone)
        exact.delete(gone)


def test_few_lists_find_most_and_never_less_than_asked_for() -> None:
    *vectors, queries = clustered(4100).split([2000, 2000, 100])
    near, exact = pair(torch.cat(vectors), probes=8)
    found = 0
    for q in queries:
        got, want = near.query(q, 10), exact.query(q, 10)
        found += len(set(got.ids.tolist()) & set(want.ids.tolist()))
        assert len(got.ids) == 10
        # The scores are the exact ones, also of what is not among the ten best.
        known = dict(zip(*(x.tolist() for x in exact.query(q, 4000)[:2]), strict=True))
        assert [known[i] for i in got.ids.tolist()] == got.scores.tolist()
    assert 0.95 < found / 1000 < 1.0  # an approximate search it is
    # More than the lists hold: then it is a scan.
    assert same(near.query(queries[0], 3000), exact.query(queries[0], 3000))


def test_a_search_among_few_is_exact() -> None:
    vectors = clustered(1200)
    near = Index(dim=16, backend="faiss", probes=1)
    exact = Index(dim=16)
    for index in (near, exact):
        index.add(vectors[:1000], range(1000))
        index.add(vectors[1000:], range(200), namespace="few")
    far = 0
    for q in torch.randn(30, 16):
        assert same(near.query(q, 10, namespace="few"), exact.query(q, 10, namespace="few"))
        far += not same(near.query(q, 10), exact.query(q, 10))
    assert far
    small = Index(dim=16, backend="faiss", probes=1)
    small.add(vectors[:499], range(499))
    assert small._lists is None
    small.add(vectors[499:500], [499])
    assert small._lists is not None
    small.delete([7])  # 499 again
    exact = Index(dim=16)
    exact.add(vectors[:500], range(500))
    exact.delete([7])
    for q in torch.randn(30, 16):
        assert same(small.query(q, 10), exact.query(q, 10))


def test_of_many_equal_entries_the_smaller_ids_come_first() -> None:
    vectors = clustered(1000)
    vectors[300:800] = vectors[300]  # far more than are fetched at first
    near = Index(dim=16, backend="faiss", probes=4)
    near.add(vectors, range(1000))
    assert near.query(vectors[300], 10).ids.tolist() == list(range(300, 310))
    near.delete(range(300, 305))
    assert near.query(vectors[300], 10).ids.tolist() == list(range(305, 315))


def test_what_float32_cannot_tell_apart_is_ranked_exactly() -> None:
    g = torch.Generator().manual_seed(3)
    base = torch.randn(64, generator=g)
    vectors = base + 3e-7 * torch.randn(1000, 64, generator=g)
    near, exact = pair(vectors, probes=ALL, metric="dot")
    for _ in range(10):
        q = base + 1e-3 * torch.randn(64, generator=g)
        assert same(near.query(q, 10), exact.query(q, 10))


def test_saved_and_loaded_it_looks_into_the_same_lists(tmp_path: Path) -> None:
    near, exact = pair(clustered(1200), probes=1)
    late = clustered(100, seed=9)
    for index in (near, exact):
        index.add(late, range(100), namespace="late")
        index.delete(range(0, 300, 3))
    near.save(tmp_path / "near")
    again = Index.load(tmp_path / "near")
    plain = Index.load(tmp_path / "near", backend="exact")
    exact.save(tmp_path / "exact")
    made = Index.load(tmp_path / "exact", backend="faiss")
    assert plain._lists is None
    assert made._lists is not None
    differ = 0
    for q in torch.randn(40, 16):
        assert same(near.query(q, 10), again.query(q, 10))
        assert same(exact.query(q, 10), plain.query(q, 10))
        assert made.query(q, 10).scores[0] <= exact.query(q, 10).scores[0]
        differ += not same(near.query(q, 10), exact.query(q, 10))
    assert differ  # so that the first of these says something
    for index in (near, again):
        index.add(late + 1, range(100))
    assert same(near.query(late[0] + 1, 5), again.query(late[0] + 1, 5))


def test_a_loaded_index_has_the_lists_of_the_file_not_new_ones(tmp_path: Path) -> None:
    near = Index(dim=2, backend="faiss")
    near.add(clustered(500, dim=2), range(500))
    near.save(tmp_path / "a")
    held = store.read(tmp_path / "a")
    parts = {name: getattr(held, name) for name in held.__dataclass_fields__}
    parts["homes"] = torch.full((500,), 3, dtype=torch.int32)
    store.write(tmp_path / "b", store.Stored(**parts))
    lists = Index.load(tmp_path / "b")._lists
    assert lists is not None
    assert lists._index.invlists.list_size(3) == 500
    assert (lists.centres == held.centres.numpy()).all()


def test_lists_are_made_anew_when_the_entries_outgrow_them_and_deletions_close_gaps() -> None:
    near, exact = pair(clustered(600), probes=ALL)
    lists = len(near._lists.centres)
    assert lists == int(4 * 600**0.5)
    for index in (near, exact):
        index.add(clustered(700, seed=3), range(700))
    assert len(near._lists.centres) == lists  # 1,300 entries are 2.2 times as many
    for index in (near, exact):
        index.add(clustered(200, seed=4), range(200))
    assert len(near._lists.centres) == int(4 * 1500**0.5)
    for index in (near, exact):
        index.add(clustered(1600, seed=6), range(1600))
        index.delete(range(100, 2000))
    assert near._rows.dead == 0
    for q in clustered(20, seed=8):
        assert same(near.query(q, 10), exact.query(q, 10))


def test_damage_in_the_lists_is_refused(tmp_path: Path) -> None:
    near = Index(dim=2, backend="faiss")
    near.add(clustered(500, dim=2), range(500))
    near.save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    held = store.read(tmp_path / "a")
    parts = {name: getattr(held, name) for name in held.__dataclass_fields__}
    assert held.homes is not None
    at = whole.index(held.homes.numpy().tobytes()) + 4 * 77
    (tmp_path / "b").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(CheckpointError, match="its checksum differs"):
        Index.load(tmp_path / "b")
    for forged in (
        {"homes": held.homes + len(held.centres)},
        {"homes": held.homes - 1000},
        {"homes": held.homes[1:]},
        {"homes": held.homes.long()},
        {"centres": held.centres[:, :1]},
        {"centres": held.centres[:0]},
        {"centres": held.centres / 0},
        {"centres": held.centres[0]},
    ):
        store.write(tmp_path / "b", store.Stored(**(parts | forged)))
        with pytest.raises(CheckpointError, match="its parts do not fit together"):
            Index.load(tmp_path / "b")


def test_without_faiss_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    near, _ = pair(clustered(600), probes=1)
    near.save(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "faiss", None)
    need = r"needs faiss: pip install 'tessera-lifelong\[faiss\]'; backend='exact' does without"
    with pytest.raises(MissingDataError, match=need):
        Index(dim=2, backend="faiss")
    with pytest.raises(MissingDataError, match=need):
        Index.load(tmp_path / "a")
    assert len(Index.load(tmp_path / "a", backend="exact")) == 600
    assert Index(dim=2).query(torch.ones(2)).payloads == []

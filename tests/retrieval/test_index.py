"""The exact index: against brute force in float64, by law, by damage and by message."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tessera.errors import CheckpointError, InputError, MissingDataError, UnknownNameError
from tessera.retrieval import Index, scan, store


def brute(vectors: Tensor, q: Tensor, k: int, metric: str) -> tuple[list[int], list[float]]:
    """The k best by (score falling, id rising), in float64 all the way."""
    v, w = vectors.double(), q.double()
    if metric == "cosine":
        v, w = v / v.norm(dim=1, keepdim=True), w / w.norm()
        v, w = v.float().double(), w.float().double()  # kept as float32
    else:
        v, w = vectors.float().double(), q.float().double()
    scores = (v * w).sum(1).tolist()
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    return order, [scores[i] for i in order]


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("rows", [1, 3, 500])
def test_it_finds_what_brute_force_finds(
    metric: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_CHUNK_ROWS", 64)
    vectors = torch.randn(rows, 24) * torch.rand(rows, 1) * 10
    index = Index(dim=24, metric=metric)
    index.add(vectors, range(rows))
    for q in torch.randn(40, 24):
        for k in (1, 10, rows + 5):
            hits = index.query(q, k)
            ids, scores = brute(vectors, q, k, metric)
            assert hits.ids.tolist() == ids == hits.payloads
            torch.testing.assert_close(hits.scores, torch.tensor(scores, dtype=torch.float64))


def test_recall_at_10_is_one_where_float32_cannot_tell_apart() -> None:
    # 2,000 copies of a direction, each off by less than float32's own error.
    torch.manual_seed(3)
    base = torch.randn(64)
    vectors = base + 3e-7 * torch.randn(2000, 64)
    index = Index(dim=64, metric="dot")
    index.add(vectors, range(2000))
    for _ in range(20):
        q = base + 1e-3 * torch.randn(64)
        assert index.query(q, 10).ids.tolist() == brute(vectors, q, 10, "dot")[0]


def test_ties_go_to_the_smaller_id_and_answers_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(1)
    some = torch.randn(7, 33)
    index = Index(dim=33)
    index.add(some.repeat(30, 1), range(210))
    queries = torch.randn(9, 33)
    together = index.query_batch(queries, 12)
    for q, hits in zip(queries, together, strict=True):
        alone = index.query(q, 12)
        assert torch.equal(alone.ids, hits.ids)
        assert torch.equal(alone.scores, hits.scores)
        for a, b in zip(range(11), range(1, 12), strict=True):
            if hits.scores[a] == hits.scores[b]:
                assert hits.ids[a] < hits.ids[b]
        # The best is a tie of thirty.
        assert len(set(hits.scores.tolist())) == 1
        assert hits.ids.tolist() == sorted(hits.ids.tolist())


@given(st.lists(st.sampled_from(["add", "delete", "query"]), max_size=40), st.integers(0, 99))
def test_deleted_entries_are_gone_and_ids_are_never_used_again(ops: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    index, held, given_ids = Index(dim=4), {}, []
    for op in ops:
        if op == "add":
            rows = torch.from_numpy(rng.normal(size=(3, 4)))
            ids = index.add(rows, [f"p{len(given_ids) + i}" for i in range(3)])
            assert not set(ids) & set(given_ids)
            given_ids += ids
            held |= dict(zip(ids, rows, strict=True))
        elif op == "delete" and held:
            gone = int(rng.choice(sorted(held)))
            index.delete([gone])
            del held[gone]
        hits = index.query(torch.ones(4), 100)
        assert sorted(hits.ids.tolist()) == sorted(held)
        assert hits.payloads == [f"p{i}" for i in hits.ids.tolist()]
        assert len(index) == len(held)


def test_many_deletions_close_the_gaps() -> None:
    index = Index(dim=3)
    ids = index.add(torch.randn(5000, 3), range(5000))
    index.delete(ids[:4000])
    assert (len(index), index._rows.count) == (1000, 1000)
    assert sorted(index.query(torch.ones(3), 2000).payloads) == list(range(4000, 5000))
    index.delete([4500])
    with pytest.raises(UnknownNameError, match="no entry 4500"):
        index.delete([4600, 4500])
    assert len(index) == 999
    assert index.add(torch.ones(1, 3), ["new"]) == [5000]


def test_payloads_are_found_by_id_in_any_order_where_they_are() -> None:
    index = Index(dim=2)
    index.add(torch.eye(2), ["ax", "ay"], namespace="a")
    index.add(torch.eye(2), ["bx", "by"], namespace="b")
    index.delete([1])
    assert index.payloads([3, 0, 3]) == ["by", "ax", "by"]
    assert index.payloads([3, 2], namespace="b") == ["by", "bx"]
    assert index.holds([0, 1, 2, 3, 4, -1]) == [True, False, True, True, False, False]
    assert index.holds([0, 2], namespace="b") == [False, True]
    assert index.holds([0, 2], namespace="c") == [False, False]
    assert index.deletions == 1
    for ids, namespace in (([0, 1], None), ([4], None), ([0, 2], "a"), ([0], "c")):
        with pytest.raises(UnknownNameError, match="there is no entry"):
            index.payloads(ids, namespace=namespace)


def test_namespaces_keep_to_themselves() -> None:
    index = Index(dim=2)
    index.add(torch.eye(2), ["ax", "ay"], namespace="a")
    index.add(torch.eye(2), ["bx", "by"], namespace="b")
    q = torch.tensor([1.0, 0.1])
    assert index.query(q, 1, namespace="a").payloads == ["ax"]
    assert index.query(q, 9, namespace="b").payloads == ["bx", "by"]
    assert index.query(q, 9).payloads == ["ax", "bx", "ay", "by"]
    nothing = index.query(q, 9, namespace="c")
    assert (nothing.payloads, nothing.weights.tolist()) == ([], [])


def test_a_threshold_may_leave_nothing_and_weights_are_a_softmax() -> None:
    index = Index(dim=2)
    index.add(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), "abc")
    q = torch.tensor([1.0, 0.0])
    assert index.query(q, 3, threshold=0.5).payloads == ["a", "b"]
    assert index.query(q, 3, threshold=1.1).payloads == []
    hits = index.query(q, 3, temperature=0.5)
    torch.testing.assert_close(hits.weights, torch.softmax(hits.scores / 0.5, 0))
    assert hits.weights.sum().item() == pytest.approx(1.0)
    assert index.query(q, 1, temperature=1e-9).weights.tolist() == [1.0]


def letters(words: Sequence[str]) -> Tensor:
    return torch.eye(26)[[ord(word[0]) - 97 for word in words]]


def test_an_encoder_takes_items_in_and_asks_for_them() -> None:
    index = Index(encoder=letters, dim=26)
    words = [f"{chr(97 + i % 26)}{i}" for i in range(200)]
    assert index.encode(words, payloads=range(200)) == list(range(200))
    assert index.query("c", 3).payloads == [2, 28, 54]
    assert [h.payloads for h in index.query_batch(["a", "b"], 1)] == [[0], [1]]
    assert index.encode([]) == []


def test_an_encoder_gets_at_most_256_at_once_and_its_gradient_stays_behind() -> None:
    sizes: list[int] = []
    weight = torch.ones(1, requires_grad=True)

    def encode(items: Sequence[float]) -> Tensor:
        sizes.append(len(items))
        return weight * torch.tensor([[float(i), 1.0] for i in items])

    index = Index(encoder=encode, dim=2)
    index.encode([float(i) for i in range(600)])
    assert sizes == [256, 256, 88]
    assert index.query(3.0, 1).payloads == [3.0]


def test_an_empty_index_gives_no_hits() -> None:
    assert Index(dim=3).query(torch.ones(3)).payloads == []


def test_saved_and_loaded_it_answers_alike(tmp_path: Path) -> None:
    index = Index(encoder=letters, dim=26, metric="dot")
    index.add(torch.randn(300, 26), [{"n": i} for i in range(300)], namespace="x")
    index.add(torch.randn(300, 26), list(range(300)), namespace="y")
    index.delete(range(50, 100))
    index.save(tmp_path / "a")
    again = Index.load(tmp_path / "a", encoder=letters)
    for q in torch.randn(10, 26):
        for space in (None, "x", "y"):
            a, b = (i.query(q, 9, namespace=space) for i in (index, again))
            assert torch.equal(a.ids, b.ids)
            assert torch.equal(a.scores, b.scores)
            assert a.payloads == b.payloads
    assert again.add(torch.ones(1, 26), ["new"], namespace="x") == [600]
    assert again.query("b", 1).payloads


def test_damage_is_refused(tmp_path: Path) -> None:
    index = Index(dim=4)
    index.add(torch.randn(3, 4), ["one", "two", "three"])
    index.save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    want = Index.load(tmp_path / "a").query(torch.ones(4))
    for at in range(len(whole)):
        (tmp_path / "b").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            got = Index.load(tmp_path / "b").query(torch.ones(4))
        except CheckpointError:
            continue
        # A flip that changes nothing: in the padding of the header.
        assert torch.equal(got.scores, want.scores)
        assert got.payloads == want.payloads
    (tmp_path / "b").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="no whole file of an index"):
        Index.load(tmp_path / "b")
    with pytest.raises(MissingDataError, match="there is no index"):
        Index.load(tmp_path / "none")


def test_many_ask_while_one_adds() -> None:
    index = Index(dim=8)
    first = torch.randn(100, 8)
    index.add(first, range(100))
    wrong: list[object] = []
    done = threading.Event()

    def ask(seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        while not done.is_set():
            n = int(torch.randint(0, 100, (1,), generator=g))
            hits = index.query(first[n], 1)
            if hits.payloads != [n]:
                wrong.append((n, hits))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for _ in range(100):
        # None of these has the very direction that is asked for.
        index.add(torch.randn(30, 8), ["other"] * 30, namespace="late")
    done.set()
    for t in threads:
        t.join()
    assert not wrong


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="whole dim >= 1, got 0"):
        Index(dim=0)
    with pytest.raises(UnknownNameError, match="choose one of: cosine, dot"):
        Index(dim=2, metric="l2")
    with pytest.raises(UnknownNameError, match="choose one of: exact, faiss"):
        Index(dim=2, backend="annoy")
    with pytest.raises(InputError, match="whole probes >= 1, got True"):
        Index(dim=2, probes=True)
    index = Index(dim=2)
    for bad, message in (
        (torch.ones(2), r"vectors \[n, 2\], got \(2,\)"),
        (torch.ones(1, 3), r"vectors \[n, 2\], got \(1, 3\)"),
        (torch.tensor([[1.0, 1.0], [float("nan"), 1.0]]), "vector 1 has NaN or infinite"),
        (torch.tensor([[1.0, 1.0], [0.0, 0.0]]), "vector 1 is zero"),
    ):
        with pytest.raises(InputError, match=message):
            index.add(bad, range(len(bad)))
    with pytest.raises(InputError, match="a payload for each of 2 vectors, got 1"):
        index.add(torch.ones(2, 2), ["one"])
    with pytest.raises(InputError, match="no encoder"):
        index.encode(["word"])
    with pytest.raises(InputError, match="whole k >= 1, got 0"):
        index.query(torch.ones(2), 0)
    with pytest.raises(InputError, match="temperature > 0"):
        index.query(torch.ones(2), temperature=0.0)
    assert len(index) == 0
    with pytest.raises(InputError, match=r"vectors \[1, 3\] for 1 items, got \(1, 26\)"):
        Index(encoder=letters, dim=3).encode(["word"])
    index.add(torch.ones(1, 2), [object()])
    with pytest.raises(InputError, match="plain values, as JSON has them"):
        index.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


FORGED = {
    "metric": {"metric": "l3"},
    "payloads": {"payloads": ["one"]},
    "ids that fall": {"ids": torch.tensor([2, 1, 0])},
    "an id to come": {"next_id": 1},
    "a namespace that is not there": {"spaces": torch.tensor([0, 0, 7])},
    "too few ids": {"ids": torch.tensor([0, 1])},
    "a dtype": {"vectors": torch.eye(3, 4).double()},
    "an axis too many": {"vectors": torch.ones(3, 4, 1)},
    "no number": {"vectors": torch.full((3, 4), float("nan"))},
    "names": {"names": "a"},
    "a backend": {"backend": "annoy"},
    "probes": {"probes": 0},
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_file_with_its_checksum_is_refused(what: str, tmp_path: Path) -> None:
    index = Index(dim=4)
    index.add(torch.eye(3, 4), ["one", "two", "three"])
    index.save(tmp_path / "a")
    held = store.read(tmp_path / "a")
    parts = {name: getattr(held, name) for name in held.__dataclass_fields__}
    store.write(tmp_path / "b", store.Stored(**(parts | FORGED[what])))
    with pytest.raises(CheckpointError, match="is no index of Tessera's"):
        Index.load(tmp_path / "b")


def test_vectors_too_large_for_float32_are_refused() -> None:
    index = Index(dim=2, metric="dot")
    with pytest.raises(InputError, match="vector 0 has NaN or infinite"):
        index.add(torch.tensor([[1e300, 0.0]], dtype=torch.float64), ["huge"])
    assert len(index) == 0

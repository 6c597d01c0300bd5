"""The adapter's folder: kept to the bit, replaced in one step, and safe to read from anyone."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tessera.arch import Delta, folder_swap
from tessera.arch.peft_names import layer_types, reader
from tessera.errors import (
    CheckpointError,
    DeltaError,
    InputError,
    MissingDataError,
    StorageError,
    TesseraError,
)

CONFIG, ADAPTER, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "tessera.json"
P = "base_model.model."


def lora(seed: int = 0, **more: Any) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        "block.0.fc.A": torch.randn(2, 4, generator=draw),
        "block.0.fc.B": torch.randn(3, 2, generator=draw),
        "block.1.fc.A": torch.randn(1, 4, generator=draw),
        "block.1.fc.B": torch.randn(3, 1, generator=draw),
    }
    return Delta(kind="lora", tensors=tensors, scales={"block.0.fc": 0.1, "block.1.fc": 3}, **more)


def every_kind() -> dict[str, Delta]:
    full = {"head.weight.full": torch.randn(2, 3), "head.bias.full": torch.randn(2)}
    some = torch.tensor([[True, False], [False, True]])
    return {
        "lora": lora(base_hash="ab" * 32, info={"labels": ["a", "b"], "note": None}),
        "lora, head": Delta(kind="lora", tensors={**lora().tensors, **full}, scales=lora().scales),
        "lora, conv": Delta(
            kind="lora",
            tensors={"c.A": torch.randn(2, 4, 3, 3), "c.B": torch.randn(5, 2, 1, 1)},
            scales={"c": 1.0},
        ),
        "lora, embedding": Delta(
            kind="lora",
            tensors={"e.A": torch.randn(2, 9), "e.B": torch.randn(5, 2)},
            scales={"e": 1.0},
            info={"layer_types": {"e": "Embedding"}},
        ),
        "lora, attention": Delta(
            kind="lora",
            tensors={
                "a.A": torch.randn(2, 4),
                "a.B": torch.randn(12, 2),
                "a.out_proj.A": torch.randn(2, 4),
                "a.out_proj.B": torch.randn(4, 2),
            },
            scales={"a": 1.0, "a.out_proj": 1.0},
        ),
        "lora, the model itself": Delta(
            kind="lora", tensors={"A": torch.randn(1, 3), "B": torch.randn(2, 1)}, scales={"": 2.0}
        ),
        "lora over what is also replaced": Delta(
            kind="lora",
            tensors={**lora().tensors, "block.0.fc.weight.full": torch.randn(3, 4)},
            scales=lora().scales,
        ),
        "lora inside what is also replaced": Delta(
            kind="lora",
            tensors={**lora().tensors, "block.0.gain.full": torch.randn(3)},
            scales=lora().scales,
        ),
        "a head alone": Delta(kind="lora", tensors=full),
        "ia3": Delta(
            kind="ia3", tensors={"f.gain_in": torch.randn(4), "g.h.gain_out": torch.randn(3)}
        ),
        "ia3, conv": Delta(
            kind="ia3",
            tensors={"c.gain_in": torch.randn(4), "d.gain_out": torch.randn(1)},
            info={"layer_types": {"c": "Conv2d", "d": "Conv3d"}},
        ),
        "ia3 before and after": Delta(
            kind="ia3", tensors={"f.gain_in": torch.randn(4), "f.gain_out": torch.randn(3)}
        ),
        "ia3 of one feature": Delta(
            kind="ia3", tensors={"f.gain_in": torch.randn(1), "g.gain_out": torch.randn(1)}
        ),
        "prefix": Delta(
            kind="prefix", tensors={"prefix": torch.randn(3, 16)}, info={"layers": 2, "heads": 2}
        ),
        "prefix over attention": Delta(
            kind="prefix",
            tensors={"prefix": torch.randn(3, 16)},
            info={"layers": 2, "heads": 2, "sites": ["a", "b"]},
        ),
        "prompt, head": Delta(kind="prompt", tensors={"prompt": torch.randn(3, 4), **full}),
        "mask": Delta(
            kind="mask",
            tensors={
                "w.values": torch.randn(2),
                "w.mask": some,
                "v.values": torch.randn(2, 2),
            },
        ),
        "doubles and halves": Delta(
            kind="lora",
            tensors={"f.A": torch.randn(1, 3).double(), "f.B": torch.randn(2, 1).bfloat16()},
            scales={"f": 1 / 3},
        ),
    }


@pytest.mark.parametrize("case", list(every_kind()))
def test_what_is_saved_comes_back_to_the_bit(case: str, tmp_path: Path) -> None:
    delta = every_kind()[case]
    delta.save(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == [CONFIG, ADAPTER, MANIFEST]
    back = Delta.load(tmp_path / "a")
    assert back.tensors.keys() == delta.tensors.keys()
    for name, tensor in delta.tensors.items():
        assert torch.equal(back.tensors[name], tensor)
        assert back.tensors[name].dtype == tensor.dtype
        assert back.tensors[name].requires_grad == (tensor.dtype != torch.bool)
    said = (back.kind, back.scales, back.base_hash, back.info, back.hash)
    assert said == (delta.kind, delta.scales, delta.base_hash, delta.info, delta.hash)


PLAIN = ["lora", "lora, head", "lora, conv", "lora, embedding", "ia3", "ia3, conv", "prefix"]


@pytest.mark.parametrize(
    "case", [*PLAIN, "lora over what is also replaced", "ia3 of one feature", "prompt, head"]
)
def test_peft_s_two_files_alone_say_the_same_but_whose_delta_it_is(
    case: str, tmp_path: Path
) -> None:
    delta = every_kind()[case]
    delta.save(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    back = Delta.load(tmp_path / "a")
    assert back.base_hash == ""
    assert back.scales == pytest.approx(delta.scales, rel=1e-15)
    assert back.kind == delta.kind
    assert back.tensors.keys() == delta.tensors.keys()
    assert all(torch.equal(back.tensors[n], t) for n, t in delta.tensors.items())


@pytest.mark.parametrize(
    "case",
    [
        "lora, attention",
        "lora, the model itself",
        "lora inside what is also replaced",
        "a head alone",
        "ia3 before and after",
        "prefix over attention",
        "mask",
    ],
)
def test_what_peft_has_no_word_for_is_under_our_own_names(case: str, tmp_path: Path) -> None:
    delta = every_kind()[case]
    delta.save(tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    assert said == {"peft_type": f"TESSERA_{delta.kind.upper()}"}
    assert safetensors.torch.load_file(tmp_path / ADAPTER).keys() == delta.tensors.keys()
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"without its tessera\.json; copy the whole folder"):
        Delta.load(tmp_path)


def test_tensors_that_share_memory_or_are_views_are_saved_as_what_they_hold(
    tmp_path: Path,
) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"f.A": whole[::2, ::2], "f.B": whole[:3, :2], "g.A": whole[::2, ::2]}
    tensors["g.B"] = whole[:3, :2]
    delta = Delta(kind="lora", tensors=tensors, scales={"f": 1.0, "g": 1.0})
    delta.save(tmp_path / "a")
    back = Delta.load(tmp_path / "a")
    assert all(torch.equal(back.tensors[n], t) for n, t in tensors.items())


def test_info_that_json_cannot_say_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for info, why in (
        ({"f": float("nan")}, "Out of range float values"),
        ({"f": {1: 2}}, r"keys \[1\]"),
        ({"f": torch.ones(1)}, "Tensor is not JSON serializable"),
        ({"f": "x" * (1 << 20)}, "up to 1048576 bytes"),
    ):
        with pytest.raises(InputError, match=why):
            lora(info=info).save(tmp_path / "a")
        assert os.listdir(tmp_path) == []
    lora(info={"labels": ("a", "b")}).save(tmp_path / "a")  # a tuple is a list
    assert Delta.load(tmp_path / "a").info == {"labels": ["a", "b"]}


# Replacing a folder


def test_a_folder_is_replaced_and_what_else_peft_keeps_there_stays(tmp_path: Path) -> None:
    place = tmp_path / "a"
    lora(0).save(place)
    (place / "README.md").write_text("mine")
    place.chmod(0o700)
    (tmp_path / "link").symlink_to(place)
    lora(1).save(tmp_path / "link")
    assert Delta.load(place).hash == lora(1).hash
    assert (place / "README.md").read_text() == "mine"
    assert place.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["a", "link"]


def test_an_empty_folder_is_taken_and_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "x" / "y"):
        lora().save(place)
        assert Delta.load(place).hash == lora().hash


def test_what_is_no_adapter_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("dear diary")
    with pytest.raises(StorageError, match=r"holds 'notes\.txt', which is no part of an adapter"):
        lora().save(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(StorageError, match=r"notes\.txt is a file, and an adapter is a folder"):
        lora().save(tmp_path / "notes.txt")
    with pytest.raises(StorageError, match=r"could not write .*notes\.txt/a"):
        lora().save(tmp_path / "notes.txt" / "a")
    assert (tmp_path / "notes.txt").read_text() == "dear diary"


def no_exchange(_fresh: Path, _target: Path) -> bool:
    return False


@pytest.mark.parametrize(
    ("call", "swaps"), [("fsync", True), ("fsync", False), ("mkdir", True), ("rename", False)]
)
def test_after_any_failure_the_old_one_stands_or_the_new(
    call: str, swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora(0).save(tmp_path / "a")
    if not swaps:
        monkeypatch.setattr(folder_swap, "_exchange", no_exchange)
    original, failures, stood = getattr(os, call), 0, set()
    for fail_at in range(8):
        calls = 0

        def failing(*args: Any, at: int = fail_at, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                lora(1).save(tmp_path / "a")
            except StorageError:
                failures += 1
        stood.add(Delta.load(tmp_path / "a").hash)
        lora(0).save(tmp_path / "a")
        assert os.listdir(tmp_path) == ["a"]
    assert failures > 0
    assert stood == {lora(0).hash, lora(1).hash}


def test_a_replacement_cut_short_is_read_as_the_old_one_and_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_swap, "_exchange", no_exchange)
    place = tmp_path / "a"
    lora(0).save(place)
    os.rename(place, folder_swap.aside(place))  # killed between the two renames
    assert Delta.load(place).hash == lora(0).hash
    lora(1).save(place)
    assert Delta.load(place).hash == lora(1).hash
    # Killed before the old one was removed.
    lora(0).save(folder_swap.aside(place))
    assert Delta.load(place).hash == lora(1).hash
    lora(2).save(place)
    assert Delta.load(place).hash == lora(2).hash
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    place = tmp_path / "a"
    lora(0).save(place)
    prefix = folder_swap._prefix(place)
    for name, age in ((f"{prefix}old0.tmp", 7200), (f"{prefix}new0.tmp", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / ADAPTER).write_bytes(b"half")
        if age:
            os.utime(tmp_path / name, (1, 1))
    lora(1).save(place)
    assert sorted(os.listdir(tmp_path)) == [f"{prefix}new0.tmp", "a"]


def test_readers_beside_writers_see_one_writing_or_the_other(tmp_path: Path) -> None:
    place = tmp_path / "a"
    known = {lora(seed).hash for seed in range(3)}
    lora(0).save(place)
    stop, seen, wrong = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add(Delta.load(place).hash)
            except StorageError as error:
                if "replaced faster" not in str(error):
                    wrong.append(error)
            except Exception as error:
                wrong.append(error)

    def write(seed: int) -> None:
        try:
            for _ in range(60):
                lora(seed).save(place)
        except Exception as error:
            wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert wrong == []
    assert seen <= known
    assert len(seen) > 1
    assert os.listdir(tmp_path) == ["a"]


# Reading what anyone may have written


def damaged(place: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change one of the JSON files, or the tensors."""
    if name == ADAPTER:
        tensors = change(safetensors.torch.load_file(place / name))
        safetensors.torch.save_file(tensors, place / name)
    else:
        said = change(json.loads((place / name).read_text()))
        (place / name).write_text(json.dumps(said))


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"no adapter folder .*nowhere; Delta\.save\(path\)"):
        Delta.load(tmp_path / "nowhere")
    for name in (CONFIG, ADAPTER):
        lora().save(tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(MissingDataError, match=f"is no adapter folder: it has no {name}"):
            Delta.load(tmp_path / name)


def test_a_pickled_adapter_is_refused_unread(tmp_path: Path) -> None:
    lora().save(tmp_path)
    (tmp_path / ADAPTER).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, a pickle.*save_pretrained"):
        Delta.load(tmp_path)
    assert not Path("ran").exists()


def test_links_and_other_things_are_not_followed(tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "a", tmp_path / "secret"
    for name in (CONFIG, ADAPTER, MANIFEST):
        lora().save(place)
        os.rename(place / name, elsewhere)
        (place / name).symlink_to(elsewhere)
        with pytest.raises(CheckpointError, match=rf"{name} is a link.*cp -rL"):
            Delta.load(place)
        (place / name).unlink()
        os.mkfifo(place / name)
        with pytest.raises(CheckpointError, match=f"{name} is no file of up to"):
            Delta.load(place)
        (place / name).unlink()
    with pytest.raises(CheckpointError, match="secret is no folder"):
        Delta.load(elsewhere)
    # The folder itself may be a link: the caller named it.
    lora().save(place)
    (tmp_path / "link").symlink_to(place)
    assert Delta.load(tmp_path / "link").hash == lora().hash


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        (ADAPTER, b"", "no whole adapter"),
        (ADAPTER, b"\xff" * 100, "no whole adapter"),
        (CONFIG, b"{", "adapter_config.json is no JSON"),
        (CONFIG, b"[1]", "adapter_config.json is no mapping"),
        (CONFIG, b'{"r": NaN}', "adapter_config.json holds NaN"),
        (CONFIG, b'{"r": 1, "r": 2}', "adapter_config.json has 'r' twice"),
        (CONFIG, b"[" * 100_000, "no whole adapter"),
        (CONFIG, b"1" * 5000, "no whole adapter"),
        (CONFIG, b"\xff\xfe\x00", "no whole adapter"),
        (CONFIG, b" " * (1 << 20) + b"{}", "adapter_config.json is no file of up to 1048576"),
        (MANIFEST, b"null", "tessera.json is no mapping"),
        (MANIFEST, b'{"format": 2}', r"newer Tessera \(format 2, .*pip install -U"),
        (MANIFEST, b'{"format": "1"}', "tessera.json has the format '1'"),
        (MANIFEST, b'{"format": true}', "tessera.json has the format 'True'"),
        (MANIFEST, b'{"format": 1, "kind": 3}', "tessera.json has no kind"),
    ],
)
def test_a_damaged_file_is_a_damaged_checkpoint(
    name: str, content: bytes, why: str, tmp_path: Path
) -> None:
    lora().save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=why):
        Delta.load(tmp_path)


def test_a_manifest_of_another_adapter_is_seen(tmp_path: Path) -> None:
    lora().save(tmp_path)
    damaged(tmp_path, ADAPTER, lambda ts: {n: t + 1 for n, t in ts.items()})
    with pytest.raises(CheckpointError, match=r"hashes differ.*Delete tessera\.json"):
        Delta.load(tmp_path)
    for field, value in (
        ("scales", {"block.0.fc": 0.1, "block.1.fc": 4}),
        ("scales", {"block.0.fc": 0.1}),
        ("kind", "ia3"),
    ):
        lora().save(tmp_path)
        damaged(tmp_path, MANIFEST, lambda said, f=field, v=value: {**said, f: v})
        with pytest.raises(CheckpointError, match=rf"differ in {field}.*delete tessera\.json"):
            Delta.load(tmp_path)
    lora().save(tmp_path)
    damaged(tmp_path, MANIFEST, lambda said: {**said, "scales": {"block.0.fc": 10**400}})
    with pytest.raises(CheckpointError, match=r"no scale of 'block\.0\.fc'"):
        Delta.load(tmp_path)
    place = tmp_path / "prefix"
    every_kind()["prefix"].save(place)
    damaged(place, MANIFEST, lambda said: {**said, "info": {"layers": 4, "heads": 2}})
    with pytest.raises(CheckpointError, match="differ in info"):
        Delta.load(place)


FIELDS = [
    ("peft_type", "ADALORA", "peft_type is 'ADALORA'; Tessera reads LORA, IA3"),
    ("peft_type", None, "peft_type is 'None'"),
    ("use_dora", True, "use_dora is True"),
    ("lora_bias", True, "lora_bias is True"),
    ("bias", "lora_only", "bias is 'lora_only'"),
    ("trainable_token_indices", [1], r"trainable_token_indices is \[1\]"),
    ("layer_replication", [[0, 4]], "layer_replication is"),
    ("alora_invocation_tokens", [1], "alora_invocation_tokens is"),
    ("target_parameters", ["w"], "target_parameters is"),
    ("use_qalora", True, "use_qalora is True"),
    ("arrow_config", {"top_k": 1}, "arrow_config is"),
    ("use_what_comes_next", True, "use_what_comes_next is True"),
    ("what_comes_next_config", {"a": 1}, "what_comes_next_config is"),
    ("init_lora_weights", "pissa", "init_lora_weights is 'pissa', with which PEFT changes"),
    ("init_lora_weights", "olora", "init_lora_weights is 'olora'"),
    ("r", 3, r"'block\.1\.fc' has rank 1, but adapter_config.json says 3"),
    ("r", True, "says True"),
    ("rank_pattern", {"fc": 2}, r"'block\.1\.fc' has rank 1, but adapter_config.json says 2"),
    ("rank_pattern", [1], r"rank_pattern must be a mapping, it is \[1\]"),
    ("rank_pattern", {"(a+)+x": 2}, r"rank_pattern has a pattern that may take too long"),
    ("rank_pattern", {"[": 2}, r"rank_pattern has no valid pattern, '\['"),
    ("lora_alpha", "1", "lora_alpha of 'block.0.fc' must be a number, it is '1'"),
    ("lora_alpha", 10**400, "lora_alpha of 'block.0.fc' must be a number"),
    ("target_modules", ["block.1.fc"], "'block.0.fc', which target_modules"),
    ("target_modules", "(?:x)", "'block.0.fc', which target_modules"),
    ("target_modules", 3, "target_modules must be a list of names or a pattern, it is '3'"),
    ("base_model_name_or_path", 3, "base_model_name_or_path must be a name, it is 3"),
]


@pytest.mark.parametrize(("field", "value", "why"), FIELDS)
def test_a_configuration_we_cannot_follow_is_refused_by_its_field(
    field: str, value: Any, why: str, tmp_path: Path
) -> None:
    lora().save(tmp_path)
    (tmp_path / MANIFEST).unlink()
    damaged(tmp_path, CONFIG, lambda said: {**said, "alpha_pattern": {}, field: value})
    with pytest.raises(DeltaError, match=why) as caught:
        Delta.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


A0, B0 = f"{P}block.0.fc.lora_A.weight", f"{P}block.0.fc.lora_B.weight"
NAN = torch.tensor([[1.0, float("nan"), 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
Tensors = dict[str, Tensor]
BY_TENSORS: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (lambda ts: {n: t for n, t in ts.items() if n != B0}, "'block.0.fc' has a lora_A without its"),
    (lambda ts: {n: t for n, t in ts.items() if n != A0}, "'block.0.fc' has a lora_B without its"),
    (lambda ts: {**ts, B0: torch.ones(3, 1)}, "rank 2 in lora_A .* and rank 1 in lora_B"),
    (lambda ts: {**ts, A0: torch.ones(2, 0)}, r"lora_A \(2, 0\)"),
    (lambda ts: {**ts, A0: torch.ones(2)}, r"lora_A \(2,\)"),
    (lambda ts: {**ts, A0: NAN}, f"{A0}' holds NaN or infinite"),
    (lambda ts: {**ts, A0: torch.full((2, 4), torch.inf)}, f"{A0}' holds NaN or infinite"),
    (
        lambda ts: {**ts, A0: torch.ones(2, 4).long()},
        r"lora_A.weight' must be floating \(.*it is torch.int64",
    ),
    (lambda ts: {**ts, A0: torch.ones(2, 4).to(torch.float8_e4m3fn)}, "must be floating"),
    (lambda ts: {**ts, f"{P}x.y": torch.ones(1)}, f"{P}x.y' is no tensor of a LORA adapter"),
    (lambda ts: {**ts, "x.y": torch.ones(1)}, "'x.y' is no tensor of a LORA adapter"),
    (lambda ts: {**ts, f"{P}block.0.fc.lora_A.bias": torch.ones(2)}, "lora_A.bias' is no tensor"),
    (
        lambda ts: {**ts, f"{P}block.0.fc.lora_magnitude_vector": torch.ones(2)},
        "lora_magnitude_vector' is no tensor",
    ),
    (
        lambda ts: {**ts, f"{P}block.0.fc.lora_embedding_A": torch.ones(2, 4)},
        "lora_embedding_A' is a second tensor|lora_A.weight' is a second tensor",
    ),
    (
        lambda ts: {**ts, f"{P}z.fc.lora_A.weight": torch.ones(1, 4)},
        "'z.fc', which target_modules",
    ),
    (lambda ts: {**ts, "a\nb": torch.ones(1)}, r"'a\\nb' is no name of a tensor"),
    (lambda ts: {**ts, "a" * 300: torch.ones(1)}, "is no name of a tensor"),
    (lambda ts: {}, "has no tensor of a lora adapter"),
    (
        lambda ts: {
            **ts,
            A0: torch.ones(2, 8, 3, 3),
            B0: torch.ones(3, 1, 1, 1),
        },
        "'block.0.fc' lies over a grouped convolution",
    ),
]


@pytest.mark.parametrize("case", range(len(BY_TENSORS)))
def test_tensors_that_are_no_adapter_are_refused_by_their_names(case: int, tmp_path: Path) -> None:
    change, why = BY_TENSORS[case]
    lora().save(tmp_path)
    (tmp_path / MANIFEST).unlink()
    damaged(tmp_path, ADAPTER, change)
    with pytest.raises(DeltaError, match=why):
        Delta.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "change", "why"),
    [
        ("ia3", ADAPTER, {f"{P}f.ia3_l": torch.ones(2, 3)}, r"f\.ia3_l' is \(2, 3\)"),
        ("ia3", ADAPTER, {f"{P}f.ia3_l": torch.ones(4, 1)}, "not what feedforward_modules"),
        ("ia3", CONFIG, {"feedforward_modules": ["h"]}, "not what feedforward_modules"),
        ("prefix", CONFIG, {"num_layers": 3}, r"is \(3, 16\), but .* \(3, 24\).*num_layers"),
        ("prefix", CONFIG, {"num_layers": None}, "num_layers must be a count >= 1, it is None"),
        ("prefix", CONFIG, {"num_attention_heads": 3}, "no multiple of num_attention_heads 3"),
        ("prefix", CONFIG, {"num_virtual_tokens": True}, "num_virtual_tokens must be a count"),
        ("prefix", CONFIG, {"num_transformer_submodules": 2}, "num_transformer_submodules is 2"),
        ("prefix", ADAPTER, {"more": torch.ones(1)}, "'more' is no tensor of a PREFIX_TUNING"),
        ("prompt, head", CONFIG, {"token_dim": 5}, r"is \(3, 4\), but .* \(3, 5\)"),
        ("prompt, head", CONFIG, {"modules_to_save": None}, r"head\.\w+' is no tensor of a PROMPT"),
        ("prompt, head", CONFIG, {"modules_to_save": "head"}, "modules_to_save must be a list"),
        ("lora, head", CONFIG, {"modules_to_save": ["tail"]}, r"head\.\w+' is no tensor of a LORA"),
    ],
)
def test_other_kinds_are_refused_by_field_or_tensor(
    kind: str, name: str, change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    every_kind()[kind].save(tmp_path)
    (tmp_path / MANIFEST).unlink()
    damaged(tmp_path, name, lambda said: {**said, **change})
    if (name, "feedforward_modules") in [(CONFIG, k) for k in change]:
        damaged(tmp_path, CONFIG, lambda said: {**said, "target_modules": ["f", "h"]})
    with pytest.raises(DeltaError, match=why):
        Delta.load(tmp_path)


def test_a_prompt_without_its_tensor_is_refused(tmp_path: Path) -> None:
    every_kind()["prompt, head"].save(tmp_path)
    (tmp_path / MANIFEST).unlink()
    damaged(tmp_path, ADAPTER, lambda ts: {n: t for n, t in ts.items() if "prompt" not in n})
    with pytest.raises(DeltaError, match="has no tensor 'prompt_embeddings'"):
        Delta.load(tmp_path)


JUNK = [None, True, 0, -1, 1.5, 10**30, 1e300, "x", "(" * 9, "a" * 600, [], {}, [1], {"a": 1}]


@pytest.mark.parametrize("kind", ["lora", "ia3", "ia3, conv", "prefix", "prompt, head"])
def test_whatever_stands_in_a_field_it_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    every_kind()[kind].save(tmp_path)
    (tmp_path / MANIFEST).unlink()
    said = json.loads((tmp_path / CONFIG).read_text())
    refused = []
    for field in [*said, "feedforward_modules", "use_rslora"]:
        for junk in JUNK:
            (tmp_path / CONFIG).write_text(json.dumps({**said, field: junk}))
            try:
                Delta.load(tmp_path)
            except TesseraError as error:
                refused.append(str(error))
    assert len(refused) > len(JUNK)
    assert all(str(tmp_path) in message for message in refused)


@given(st.sampled_from([CONFIG, ADAPTER, MANIFEST]), st.integers(0, 10**6), st.integers(1, 255))
def test_one_wrong_byte_is_refused_or_changes_nothing_that_counts(
    tmp_path_factory: pytest.TempPathFactory, name: str, at: int, flip: int
) -> None:
    place = tmp_path_factory.mktemp("byte") / "a"
    lora().save(place)
    data = bytearray((place / name).read_bytes())
    data[at % len(data)] ^= flip
    (place / name).write_bytes(data)
    try:
        found = Delta.load(place)
    except TesseraError:
        return
    assert found.hash == lora().hash


@given(st.sampled_from([CONFIG, ADAPTER]), st.integers(0, 10**6), st.integers(1, 255))
def test_one_wrong_byte_without_our_manifest_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, name: str, at: int, flip: int
) -> None:
    place = tmp_path_factory.mktemp("byte") / "a"
    lora().save(place)
    (place / MANIFEST).unlink()
    data = bytearray((place / name).read_bytes())
    data[at % len(data)] ^= flip
    (place / name).write_bytes(data)
    try:
        found = Delta.load(place)
    except TesseraError:
        return
    assert found.kind == "lora"


def test_patterns_are_read_as_peft_reads_them() -> None:
    read = reader(
        "alpha_pattern", {"^a.fc": 1, "b.*fc": 2, "fc": 3, "layer\\.[02]\\.q": 4, "a.fc": 5}, 0
    )
    names = ["a.fc", "x.a.fc", "b.c.fc", "fc", "xfc", "layer.0.q", "layer.1.q", "m.layer.2.q"]
    assert [read(name) for name in names] == [1, 3, 2, 3, 0, 4, 0, 4]


def test_a_pattern_costs_little_whatever_it_says() -> None:
    for pattern in ("(a|a)(a|a)b", "(.*)*x", "a*a*a*b", "(?=a)", "(a)\\1", "x" * 600 + "[0]"):
        with pytest.raises(DeltaError, match="take too long to match"):
            reader("rank_pattern", {pattern: 1}, 0)


def test_the_types_that_peft_s_names_depend_on() -> None:
    class Odd(nn.Conv2d):
        pass

    model = nn.Sequential(
        nn.Linear(1, 1), nn.Embedding(2, 1), Odd(1, 1, 1), nn.MultiheadAttention(2, 1)
    )
    assert layer_types(model, ["0", "1", "2", "3", "3.out_proj"]) == {
        "1": "Embedding",
        "2": "Conv2d",
        "3": "MultiheadAttention",
        "3.out_proj": "NonDynamicallyQuantizableLinear",
    }


def test_layer_types_that_are_none_change_nothing(tmp_path: Path) -> None:
    for junk in (3, ["Embedding"], {"block.0.fc": 3}):
        lora(info={"layer_types": junk}).save(tmp_path / "a")
        assert Delta.load(tmp_path / "a").hash == lora().hash

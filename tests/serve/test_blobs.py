"""Blobs and the one file of a delta: round trips, damage, fuzz, a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import struct
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.arch import Delta
from tessera.errors import CheckpointError, InputError, MissingDataError, StorageError
from tessera.serve.blobs import Blobs, pack, unpack

LORA = Delta(
    kind="lora",
    tensors={"fc.A": torch.arange(6.0).reshape(2, 3), "fc.B": torch.ones(4, 2)},
    scales={"fc": 0.5},
    base_hash="ab" * 32,
    info={"note": "caf\u00e9", "n": [1, 2.5, None, {"a": True}]},
)
MASK = Delta(
    kind="mask",
    tensors={
        "w.values": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
        "w.mask": torch.tensor([[True, False], [False, True]]),
        "head.weight.full": torch.ones(2, 2, dtype=torch.float64),
    },
)


def same(a: Delta, b: Delta) -> bool:
    return (
        a.hash == b.hash
        and (a.kind, a.base_hash, dict(a.scales)) == (b.kind, b.base_hash, dict(b.scales))
        and json.dumps(dict(a.info), sort_keys=True) == json.dumps(dict(b.info), sort_keys=True)
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())
    )


# --- the file of a delta ---------------------------------------------------------------------


def test_the_layout_by_hand() -> None:
    # Written out once, so that a file of today is read by the Tessera of tomorrow.
    delta = Delta(kind="prompt", tensors={"prompt": torch.tensor([[1.0, 2.0]])})
    said = (
        '{"base_hash":"",%s"format":1,"hash":"' + delta.hash + '","info":{},"kind":"prompt",'
        '"scales":{}}'
    )
    check = hashlib.sha256((said % "").encode()).hexdigest()
    words = json.dumps(
        {
            "__metadata__": {"tessera": said % f'"check":"{check}",'},
            "prompt": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        },
        separators=(",", ":"),
    ).encode()
    words += b" " * (-len(words) % 8)
    by_hand = struct.pack("<Q", len(words)) + words + struct.pack("<2f", 1.0, 2.0)
    assert pack(delta) == by_hand
    assert same(unpack(by_hand), delta)


@pytest.mark.parametrize("delta", [LORA, MASK], ids=["lora", "mask"])
def test_a_round_trip_keeps_all_and_is_safetensors(delta: Delta) -> None:
    data = pack(delta)
    found = unpack(data)
    assert same(found, delta)
    assert pack(found) == data == pack(delta.trainable())
    assert not found.parameters()
    by_others = safetensors.torch.load(data)
    assert all(torch.equal(t, by_others[n]) for n, t in delta.tensors.items())
    with pytest.raises(CheckpointError, match="not " + "0" * 64):
        unpack(data, expect="0" * 64)
    assert unpack(data, expect=delta.hash).hash == delta.hash


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda s: "." not in s
)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    tensors, scales = {}, {}
    for site in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)):
        r, width, out = (draw(st.integers(1, 3)) for _ in range(3))
        values = torch.tensor(
            draw(st.lists(st.floats(width=16), min_size=r * width, max_size=r * width))
        )
        tensors[f"{site}.A"] = values.reshape(r, width).to(draw(DTYPES))
        tensors[f"{site}.B"] = torch.ones(out, r, dtype=draw(DTYPES))
        scales[site] = draw(st.floats(-1e20, 1e20))
    if draw(st.booleans()):
        tensors["head.full"] = torch.zeros(draw(st.integers(0, 3)), 2)
    info = draw(st.dictionaries(st.text(max_size=6), PLAIN, max_size=3))
    base = draw(st.sampled_from(["", "cd" * 32]))
    return Delta(kind="lora", tensors=tensors, scales=scales, base_hash=base, info=info)


@given(deltas())
@settings(max_examples=60)
def test_whatever_a_delta_holds_comes_back(delta: Delta) -> None:
    data = pack(delta)
    found = unpack(data)
    # NaN is kept bit by bit, and is not equal to itself; the hash is over bits.
    assert found.hash == delta.hash
    assert pack(found) == data


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_flipped_cut_and_longer_files_are_refused(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([pack(LORA), pack(MASK)]))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 2))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    match data.draw(st.sampled_from(["keep", "cut", "longer", "twice"])):
        case "cut":
            damaged = damaged[: data.draw(st.integers(0, len(whole)))]
        case "longer":
            damaged += data.draw(st.binary(max_size=9))
        case "twice":
            damaged += whole
    if damaged == whole:
        return
    with pytest.raises(CheckpointError, match="delta") as caught:
        unpack(bytes(damaged))
    assert not isinstance(caught.value, StorageError)
    assert len(str(caught.value)) < 500


def test_every_single_flip_is_refused() -> None:
    whole = pack(MASK)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(CheckpointError):
            unpack(bytes(damaged))


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(CheckpointError):
        unpack(noise)
    with pytest.raises(CheckpointError):
        unpack(struct.pack("<Q", len(noise)) + noise)


def forged(change: dict[str, object], entries: dict[str, object], tail: bytes = b"") -> bytes:
    """A file whose check is right, whatever else it says."""
    said = {
        "base_hash": "",
        "hash": "0" * 64,
        "info": {},
        "kind": "prompt",
        "scales": {},
        "format": 1,
        **change,
    }
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    said["check"] = hashlib.sha256(text.encode()).hexdigest()
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    header = {"__metadata__": {"tessera": text}, **entries}
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    return struct.pack("<Q", len(words)) + words + tail


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short"),
        (struct.pack("<Q", 1 << 60) + b"{}", "announces a header of"),
        (struct.pack("<Q", 4) + b"[1] ", "no JSON object"),
        (struct.pack("<Q", 4) + b"{}  ", "no delta of Tessera's"),
        (forged({"format": 2}, {}), "newer Tessera"),
        (forged({"format": True}, {}), "other entries"),
        (forged({"kind": "lora2"}, {"prompt": entry([1, 1], 0, 4)}, b"1234"), "no kind"),
        (forged({}, {"prompt": entry([1 << 40, 1 << 40], 0, 4)}, b"1234"), "makes no sense"),
        (forged({}, {"prompt": entry([0, 1 << 62], 0, 0)}), "makes no sense"),
        (forged({}, {"prompt": entry([0, *[1 << 30] * 7], 0, 0)}), "no delta's file"),
        (forged({}, {"prompt": entry([1, 1], 4, 8)}, b"12345678"), "makes no sense"),
        (forged({}, {"prompt": entry([1, 1], 0, 4)}, b"12345678"), "8 follow the header"),
        (forged({}, {"prompt": entry([1, 1], 0, 4, "I32")}, b"1234"), "makes no sense"),
        (forged({}, {"prompt": entry([1, 1], 0, 4)}, b"1234"), "another hash than it says"),
        (forged({"scales": {"a": 1e300}}, {}), "no number to multiply with"),
        (forged({"scales": {"a": 1}}, {}), "no number to multiply with"),
        (forged({"info": []}, {}), "no mapping"),
        (forged({}, {f"t{i}": entry([0], 0, 0) for i in range(20_001)}), "may have 20000"),
        (struct.pack("<Q", 200_000) + b'{"a":' * 40_000, "no delta's file"),
        (
            forged({"kind": "mask"}, {"w.mask": entry([2], 0, 2, "BOOL")}, b"\x01\x02"),
            "of bools, and holds other bytes",
        ),
    ],
)
def test_what_is_no_delta_says_why(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        unpack(data)


def test_the_same_said_twice_is_refused() -> None:
    words = b'{"__metadata__":{"tessera":"{}"},"__metadata__":{"tessera":"{}"}}'
    with pytest.raises(CheckpointError, match="says something twice"):
        unpack(struct.pack("<Q", len(words)) + words)


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (Delta(kind="prompt", tensors={"prompt": torch.ones(1, 1)}, info={"a": {1}}), "plain"),
        (Delta(kind="prompt", tensors={"prompt": torch.ones(1, 1)}, info={"a": {1: 2}}), "text"),
        (
            Delta(kind="prompt", tensors={"prompt": torch.ones(1, 1)}, info={"a": float("nan")}),
            "fin",
        ),
        (Delta(kind="mask", tensors={f"{'x' * 600}.values": torch.ones(1)}), "512 characters"),
        (Delta(kind="mask", tensors={"w.values": torch.ones([1] * 9)}), "8 dimensions"),
        (
            Delta(kind="mask", tensors={"w.values": torch.ones(1), "w.mask": torch.ones(1).int()}),
            "w.mask is torch.int32",
        ),
        (
            Delta(
                kind="lora",
                tensors={"f.A": torch.ones(1, 1), "f.B": torch.ones(1, 1)},
                scales={"f": float("inf")},
            ),
            "f has inf",
        ),
    ],
)
def test_what_cannot_be_packed_says_why(delta: Delta, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack(delta)


# --- blobs -----------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "file://", "memory://", "s3://"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """On a disk, and in obstore, which speaks to object stores."""
    if request.param == "memory://":
        return Blobs("memory:///")
    if request.param == "s3://":
        return Blobs(f"s3://{request.getfixturevalue('s3').BUCKET}/{tmp_path.name}")
    return Blobs(f"{'file://' if '/' in request.param else ''}{tmp_path}/deep/down")


def test_what_was_put_is_found_by_its_hash(blobs: Blobs) -> None:
    name = blobs.put(b"content")
    assert name == hashlib.sha256(b"content").hexdigest()
    assert blobs.put(b"content") == name
    assert (blobs.get(name), blobs.has(name)) == (b"content", True)
    assert blobs.get(blobs.put(b"")) == b""
    assert not blobs.has("0" * 64)
    with pytest.raises(MissingDataError, match="no blob 0000"):
        blobs.get("0" * 64)


@pytest.mark.parametrize("name", ["../" * 21 + "x", "A" * 64, "0" * 63, "0" * 64 + "\n", "", None])
def test_a_name_that_is_no_hash_leads_nowhere(blobs: Blobs, name: str) -> None:
    for act in (blobs.get, blobs.has):
        with pytest.raises(InputError, match="64 of 0-9 and a-f"):
            act(name)


def test_a_place_of_no_known_kind() -> None:
    with pytest.raises(InputError, match="folder or at s3://"):
        Blobs("ftp://host/x")


def test_damage_is_found_and_mended_by_putting_again(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "b")
    name = blobs.put(b"content")
    file = tmp_path / "b" / "sha256" / name[:2] / name
    for damage in (b"Content", b"", b"content and more"):
        file.write_bytes(damage)
        with pytest.raises(CheckpointError, match=f"{name} .* is damaged"):
            blobs.get(name)
        blobs.put(b"content")
        assert blobs.get(name) == b"content"
    assert [p.name for p in file.parent.iterdir()] == [name]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="could not be made"):
        Blobs(tmp_path / "file" / "b")


def test_a_full_disk_leaves_no_part_of_a_blob(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "b")
    content = os.urandom(1 << 16)
    name = hashlib.sha256(content).hexdigest()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
    try:
        with pytest.raises(StorageError, match="could not write"):
            blobs.put(content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not blobs.has(name)
    assert not list((tmp_path / "b" / "sha256" / name[:2]).iterdir())
    blobs.put(content)
    assert blobs.get(name) == content


def test_each_new_folder_is_flushed_with_the_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    name = Blobs(tmp_path / "a" / "b").put(b"x")
    top = str(tmp_path)
    assert [p for p in flushed if not p.endswith(".tmp")] == [
        top,
        f"{top}/a",
        f"{top}/a/b",
        f"{top}/a/b/sha256",
        f"{top}/a/b/sha256/{name[:2]}",
    ]
    assert sum(p.endswith(".tmp") for p in flushed) == 1


# --- what nobody needs -----------------------------------------------------------------------


def test_what_is_set_aside_is_found_until_it_is_deleted(blobs: Blobs) -> None:
    name, other = blobs.put(b"content"), blobs.put(b"other")
    [found] = [one for one in blobs.stored() if one.name == name]
    assert (found.aside, found.bytes) == (False, 7)
    assert abs(found.written_s - time.time()) < 60
    with pytest.raises(InputError, match=f"{name} is in use; set it aside first"):
        blobs.delete(found)
    for _ in range(2):
        blobs.set_aside(name)
        assert (blobs.get(name), blobs.has(name)) == (b"content", True)
        assert {(s.name, s.aside) for s in blobs.stored()} == {(name, True), (other, False)}
    for _ in range(2):
        blobs.restore(name)
        assert blobs.get(name) == b"content"
        assert {(s.name, s.aside) for s in blobs.stored()} == {(name, False), (other, False)}
    blobs.set_aside(name)
    assert blobs.put(b"content") == name  # needed again, whatever becomes of the old one
    [aside] = [one for one in blobs.stored() if one.aside]
    for _ in range(2):
        blobs.delete(aside)
        assert blobs.get(name) == b"content"
    blobs.set_aside(name)
    blobs.delete(aside)
    assert not blobs.has(name)
    with pytest.raises(MissingDataError, match=name):
        blobs.get(name)
    blobs.set_aside(name)
    blobs.restore(name)
    assert [one.name for one in blobs.stored()] == [other]


def test_what_is_not_ours_is_not_listed_and_what_a_kill_left_is(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "b")
    name = blobs.put(b"content")
    beside = tmp_path / "b" / "sha256" / name[:2]
    for own in ("notes.txt", ".tessera-0a1b2c3d-00ff.tmp", f"{name}.bak", name[:63]):
        (beside / own).write_bytes(b"12345")
    (tmp_path / "b" / "README").touch()
    found = sorted((one.name, one.bytes) for one in blobs.stored())
    assert found == [("", 5), (name, 7)]


def test_what_is_set_aside_is_as_old_as_that(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "b")
    name = blobs.put(b"content")
    file = tmp_path / "b" / "sha256" / name[:2] / name
    for move in (blobs.set_aside, blobs.restore):
        [before] = blobs.stored()
        os.utime(tmp_path / "b" / before.key, (time.time() - 1e6,) * 2)
        move(name)
        [found] = blobs.stored()
        assert time.time() - found.written_s < 60
    assert file.exists()

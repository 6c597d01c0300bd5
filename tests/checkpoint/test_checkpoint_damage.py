"""Loading bytes that nobody vouches for: the exact content, or a CheckpointError."""

import contextlib
import copy
import json
import os
import pickle
import random
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.arch.anchor import Anchor
from tessera.checkpoint import State, file, load, save
from tessera.errors import CheckpointError, MissingDataError, StorageError


@pytest.fixture(scope="module")
def state():
    anchor = Anchor("t", {"w": torch.ones(2)}, {"fisher": {"w": torch.ones(2)}})
    return State(
        weights={"w": torch.tensor([1.5, -2.0]), "b": torch.tensor(True)},
        anchors=(anchor,),
        counters={3: (1.5, float("nan"), 2**60, None)},
        step=12,
    )


@pytest.fixture(scope="module")
def good(state, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "f"
    save(path, state)
    return path.read_bytes()


def parts(raw: bytes) -> tuple[dict, bytes]:
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def assemble(header: object, body: bytes, *, sign: bool = True) -> bytes:
    """A file with this header; signed, its own checksum is put right."""
    if sign:
        header["__metadata__"].pop("header_crc32", None)
        header["__metadata__"]["header_crc32"] = file._fingerprint(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def load_bytes(tmp_path, raw: bytes) -> State:
    (tmp_path / "f").write_bytes(raw)
    return load(tmp_path / "f")


def refused_or(tmp_path, raw: bytes, exact, expected: object) -> bool:
    """Whether `raw` is refused; if it loads, it must be as expected."""
    try:
        got = load_bytes(tmp_path, raw)
    except CheckpointError as error:
        return "damaged" in str(error) or "newer Tessera" in str(error)
    assert exact(got) == expected
    return False


def test_every_truncation_is_refused(tmp_path, good, exact):
    for end in range(len(good)):
        assert refused_or(tmp_path, good[:end], exact, None)
    assert refused_or(tmp_path, good + b"\0", exact, None)


def test_every_changed_byte_is_refused_or_changes_nothing(tmp_path, good, state, exact):
    rng = random.Random(0)
    expected = exact(state)
    accepted = 0
    for at in range(len(good)):
        for mask in (0x01, 0x20, 0xFF, rng.randrange(1, 256)):
            raw = bytearray(good)
            raw[at] ^= mask
            accepted += not refused_or(tmp_path, bytes(raw), exact, expected)
    assert accepted < 100  # blanks, and the case of hexadecimal digits


def test_swapped_and_zeroed_stretches_are_refused(tmp_path, good, state, exact):
    rng = random.Random(1)
    for _ in range(300):
        at, size = rng.randrange(len(good)), rng.randrange(1, 64)
        zeroed = good[:at] + bytes(len(good[at : at + size])) + good[at + size :]
        moved = good[:at] + good[at + size :] + good[at : at + size]
        refused_or(tmp_path, zeroed, exact, exact(state))
        refused_or(tmp_path, moved, exact, exact(state))


def nodes_of(value: object, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items:
        found.append((*path, key))
        if isinstance(inner, dict | list):
            found += nodes_of(inner, (*path, key))
    return found


KEYS = ["$tensor", "$tuple", "$dict", "$int", "$float", "$anchor", "$what"]
KEYS += ["name", "params", "stats", "fisher"]

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "w", "weights/w", "0x1g", "7ff8", "F32", "F64", "$tuple", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_forged_file_with_valid_checksums_never_crashes_the_loader(tmp_path, good, data):
    header, body = parts(good)
    metadata = header["__metadata__"]
    opened = {key: json.loads(metadata[key]) for key in ("tree", "crc32")}
    forged = {**opened, "entries": {k: v for k, v in header.items() if k != "__metadata__"}}
    forged = copy.deepcopy(forged)
    *path, last = data.draw(st.sampled_from(nodes_of(forged)))
    node = forged
    for step in path:
        node = node[step]
    node[last] = data.draw(junk)
    for key in ("tree", "crc32"):
        metadata[key] = json.dumps(forged[key])
    entries = forged["entries"] if isinstance(forged["entries"], dict) else {"x": 1}
    with contextlib.suppress(CheckpointError):
        load_bytes(tmp_path, assemble({"__metadata__": metadata, **entries}, body))


@pytest.mark.parametrize(
    ("entry", "change"),
    [
        ("shape", [2**62, 2**62]),
        ("shape", [0, 2**63 - 1, 2**63 - 1]),
        ("shape", [1] * 1000),
        ("shape", [-2]),
        ("shape", [True, 2]),
        ("shape", [2.0]),
        ("dtype", "F4"),
        ("dtype", "I32x"),
        ("data_offsets", [0, 2**60]),
        ("data_offsets", [4, 12]),
        ("data_offsets", [0]),
    ],
    ids=str,
)
def test_a_forged_entry_is_refused_before_memory_is_asked_for(tmp_path, good, entry, change):
    header, body = parts(good)
    header["weights/w"][entry] = change
    with pytest.raises(CheckpointError, match="damaged"):
        load_bytes(tmp_path, assemble(header, body))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "damaged"),
        ("[" * 500 + "]" * 500, "damaged.*deeper than 64"),
        ("1" * 5000, "damaged"),
        ("NaN", "damaged.*NaN"),
        ("{}", "damaged.*nothing in its tree refers to"),
        ('{"$tensor": "nowhere"}', "damaged.*'nowhere' that is not there"),
        ('{"$pickle": "cos"}', "damaged.*unknown node"),
    ],
    ids=["very deep", "deep", "digits", "nan", "empty", "dangling", "tag"],
)
def test_a_forged_tree_is_refused(tmp_path, good, tree, message):
    header, body = parts(good)
    header["__metadata__"]["tree"] = tree
    with pytest.raises(CheckpointError, match=message):
        load_bytes(tmp_path, assemble(header, body))


def test_a_tree_that_is_no_state_is_refused(tmp_path):
    file.write(tmp_path / "f", {"weights": {}}, {})
    with pytest.raises(CheckpointError, match=r"damaged.*not a mapping of weights, optimizer"):
        load(tmp_path / "f")


def test_an_announced_header_is_not_believed(tmp_path):
    for length in (2**64 - 1, 2**40, 100):
        with pytest.raises(CheckpointError, match=r"damaged.*header"):
            load_bytes(tmp_path, struct.pack("<Q", length) + b"{}")


def test_a_flipped_bit_of_a_tensor_is_reported_by_name(tmp_path, good):
    header, _ = parts(good)
    at = len(good) - header_size_from_end(header, "weights/w")
    raw = bytearray(good)
    raw[at] ^= 4
    with pytest.raises(CheckpointError, match=r"damaged.*checksum of the tensor 'weights/w'"):
        load_bytes(tmp_path, bytes(raw))


def header_size_from_end(header: dict, name: str) -> int:
    end = max(e["data_offsets"][1] for key, e in header.items() if key != "__metadata__")
    return end - header[name]["data_offsets"][0]


def test_a_newer_version_says_upgrade(tmp_path, good):
    header, body = parts(good)
    header["__metadata__"] = {"format": "tessera", "version": "2", "other": "things"}
    with pytest.raises(CheckpointError, match=r"newer Tessera.*pip install -U tessera-lifelong"):
        load_bytes(tmp_path, assemble(header, body, sign=False))


@pytest.mark.parametrize("version", ["0", "-1", "", "one", "9" * 5000])
def test_a_version_that_never_was_is_damage(tmp_path, good, version):
    header, body = parts(good)
    header["__metadata__"]["version"] = version
    with pytest.raises(CheckpointError, match="damaged"):
        load_bytes(tmp_path, assemble(header, body))


class Trap:
    def __reduce__(self) -> tuple:
        return os.abort, ()


def test_foreign_files_are_refused_and_never_unpickled(tmp_path):
    for raw in (b"", b"\0" * 64, b"PK\x03\x04" + b"x" * 99, pickle.dumps(Trap())):
        with pytest.raises(CheckpointError, match="damaged"):
            load_bytes(tmp_path, raw)
    torch.save({"w": Trap()}, tmp_path / "f")
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "f")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "f", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no Tessera checkpoint.*load_file"):
        load(tmp_path / "f")


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(MissingDataError, match=r"no checkpoint at .*checkpoint\.save") as caught:
        load(tmp_path / "f")
    assert isinstance(caught.value, FileNotFoundError)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(CheckpointError, match="is not a file"):
            load(path)
    (tmp_path / "f").touch()
    with pytest.raises(StorageError, match=r"could not read .*Not a directory"):
        load(tmp_path / "f" / "g")

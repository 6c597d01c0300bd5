"""Shards in every format: the rows that were written, and one clear error for what is damaged."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from tessera.data import tables
from tessera.data.batch import Batch
from tessera.data.shards import MemoryShard, Shard
from tessera.data.sources import items_of
from tessera.data.stream import Stream
from tessera.data.tables import DatasetShard, ParquetShard
from tessera.data.tar import TarShard
from tessera.errors import CheckpointError, InputError, MissingDataError

X = np.random.default_rng(0).integers(0, 255, (23, 4, 3)).astype(np.uint8)
Y = np.random.default_rng(1).integers(0, 9, 23).astype(np.uint8)
F = X.reshape(23, 12).astype(np.float32)


def as_safetensors(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    save_file({"x": torch.from_numpy(x), "y": torch.from_numpy(y)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def as_npz(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.savez(folder / "a.npz", x=x, y=y)
    return folder / "a.npz"


def as_small_npz(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.savez_compressed(folder / "a.npz", x=x, y=y)
    return folder / "a.npz"


def as_npy(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.save(folder / "x-0.npy", x)
    np.save(folder / "y-0.npy", y)
    return folder / "x-0.npy"


def as_fortran_npy(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    return as_npy(folder, np.asfortranarray(x), y.astype(">i4"))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def as_idx(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    (folder / "t-labels-idx1-ubyte").write_bytes(idx(y))
    (folder / "t-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x)))
    return folder / "t-images-idx3-ubyte.gz"


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def pack(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def as_tar(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    members = []
    for i in range(len(x)):
        members += [(f"d/{i:03d}.npy", npy(x[i])), (f"d/{i:03d}.cls", str(y[i]).encode()),
                    (f"d/{i:03d}.notes.md", b"?")]  # fmt: skip
    return pack(folder / "a.tar", members)


def as_parquet(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(x[:, :, 0].reshape(-1)), x.shape[1])
    table = pa.table({"x": flat, "label": pa.array(y), "other": pa.array(["a"] * len(y))})
    parquet.write_table(table, folder / "a.parquet", row_group_size=5)
    return folder / "a.parquet"


WRITERS: dict[str, Callable[[Path, np.ndarray, np.ndarray], Path]] = {
    f.__name__: f
    for f in (
        *(as_safetensors, as_npz, as_small_npz, as_npy, as_fortran_npy, as_idx),
        *(as_tar, as_parquet),
    )
}


def opened(path: Any) -> Shard:
    (item,) = items_of(path, follow=False)
    shard = item.open()
    assert item.fingerprint() == shard.fingerprint()
    return shard


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_rows_that_were_written(name, tmp_path):
    path = WRITERS[name](tmp_path, X, Y)
    x = torch.from_numpy(X[:, :, 0].copy() if name == "as_parquet" else X)
    shard = opened(path)
    assert isinstance(shard, Shard)
    assert len(shard) == 23
    for start, stop in ((0, 23), (0, 1), (4, 6), (22, 23), (3, 17)):
        rows = shard.read(start, stop)
        assert rows.x.dtype == torch.uint8, "stored dtypes are kept"
        assert rows.y.dtype == torch.int64
        assert torch.equal(rows.x, x[start:stop])
        assert rows.y.tolist() == Y[start:stop].tolist()
    # By its folder and by a glob it is the same shard, and its other half is not one more.
    for given in (tmp_path, str(tmp_path / f"*{path.suffix}")):
        batches = list(Stream(given, 1, batch_size=10))
        assert torch.equal(torch.cat([b.x for b in batches]), x)
    batches = list(Stream([path], 5, batch_size=4))
    assert sorted(torch.cat([b.y for b in batches]).tolist()) == sorted(Y.tolist())


@pytest.mark.parametrize("name", WRITERS)
def test_a_fingerprint_is_that_of_the_content(name, tmp_path):
    found = set()
    other = X.copy()
    other[22] += 1
    for folder, x in (("a", X), ("b", X), ("c", X[:20]), ("d", other)):
        (tmp_path / folder).mkdir()
        shard = opened(WRITERS[name](tmp_path / folder, x, Y[: len(x)]))
        found.add((folder in "ab", shard.fingerprint()))
    assert len(found) == 3


@pytest.mark.parametrize("name", WRITERS)
def test_a_truncated_file_is_one_clear_error(name, tmp_path):
    path = WRITERS[name](tmp_path, X, Y)
    whole = path.read_bytes()
    for size in sorted({0, 1, 7, 100, len(whole) // 2, len(whole) - 1}):
        if name == "as_tar" and size >= len(whole) - 1024:
            continue  # a tar file ends in kilobytes of nothing
        path.write_bytes(whole[:size])
        with pytest.raises((InputError, MissingDataError)) as caught:
            list(Stream(path, 1, batch_size=8))
        assert path.name in str(caught.value), size
    path.unlink()
    with pytest.raises(MissingDataError, match="there are no shards at"):
        Stream(path, 1, batch_size=8)


def test_nothing_is_unpickled(tmp_path):
    evil = np.array([{"a": 1}, {"b": 2}], dtype=object)
    np.savez(tmp_path / "a.npz", x=evil, y=np.zeros(2))
    np.save(tmp_path / "x.npy", evil, allow_pickle=True)
    np.save(tmp_path / "y.npy", np.zeros(2))
    file = io.BytesIO()
    np.save(file, evil, allow_pickle=True)
    pack(tmp_path / "a.tar", [("1.npy", file.getvalue()), ("1.cls", b"1")])
    for name in ("a.npz", "x.npy", "a.tar"):
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            list(Stream(tmp_path / name, 1, batch_size=1))


def test_rows_in_memory_keep_their_dtypes():
    for x in (torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bool),
              torch.zeros(3, 2, dtype=torch.float64)):  # fmt: skip
        batch = next(Stream((x, np.array([1, 0, 2], np.int8)), 1, batch_size=3))
        assert batch.x.dtype == x.dtype
        assert torch.equal(batch.x, x)
        assert batch.y.dtype == torch.int64
    targets = next(Stream((torch.zeros(2, 1), torch.tensor([0.5, 1.5])), 1, batch_size=2)).y
    assert targets.tolist() == [0.5, 1.5]
    assert len(MemoryShard([[1.0]], [2])) == 1


def test_files_are_read_in_sorted_order_and_others_are_left_alone(tmp_path):
    for i in (2, 0, 1):
        np.savez(tmp_path / f"p{i}.npz", x=F[i : i + 1], y=Y[i : i + 1])
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / ".p0.npz").write_bytes(b"half")
    (tmp_path / "p9.npz.tmp").write_bytes(b"half")
    assert torch.cat([b.y for b in Stream(tmp_path, 1, batch_size=2)]).tolist() == Y[:3].tolist()
    with pytest.raises(MissingDataError, match="no file is called"):
        Stream(tmp_path / "q*.npz", 1, batch_size=2)
    with pytest.raises(InputError, match=r"README.md is no shard of a known format"):
        Stream(tmp_path / "README.md", 1, batch_size=2)


@pytest.mark.parametrize(
    ("names", "given", "error", "words"),
    [
        (["x.npy"], "", MissingDataError, r"y\.npy is not there"),
        (["y.npy"], "", InputError, "neither x nor y"),
        (["t-images-idx3-ubyte"], "", MissingDataError, "labels-idx1-ubyte is not there"),
        (["t-labels-idx1-ubyte"], "", InputError, "the images to them"),
    ],
)
def test_half_a_pair_is_named(names, given, error, words, tmp_path):
    for name in names:
        if name.endswith(".npy"):
            np.save(tmp_path / name, F)
        else:
            (tmp_path / name).write_bytes(idx(X))
    with pytest.raises(error, match=words):
        list(Stream(tmp_path, 1, batch_size=2))
    assert list(Stream(tmp_path, 1, batch_size=2, follow=0.001)) == []  # it may be on its way


def test_x_and_y_of_different_lengths_are_named(tmp_path):
    for name in ("as_safetensors", "as_npz", "as_npy", "as_idx"):
        (tmp_path / name).mkdir()
        path = WRITERS[name](tmp_path / name, X, Y[:-1])
        with pytest.raises(InputError, match=r"as many|differ"):
            next(Stream(path, 1, batch_size=2))
    save_file({"z": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"needs tensors x and y, it holds \['z'\]"):
        next(Stream(tmp_path / "a.safetensors", 1, batch_size=2))


# --- tar -----------------------------------------------------------------------------------------


def test_samples_of_a_tar_file(tmp_path):
    path = pack(tmp_path / "a.tar", [
        ("a/1.x.npy", npy(F[0])), ("a/1.y.npy", npy(np.float32(0.5))),
        ("b/1.x.npy", npy(F[1])), ("b/1.y.npy", npy(np.float32(1.5))),
    ])  # fmt: skip
    rows = TarShard(path).read(0, 2)
    assert torch.equal(rows.x, torch.from_numpy(F[:2]))
    assert rows.y.tolist() == [0.5, 1.5]
    other = pack(tmp_path / "b.tar", [("1.json", b"[1, 2]"), ("1.txt", b" 7\n")])
    assert [t.tolist() for t in TarShard(other).read(0, 1)] == [[[1, 2]], [7]]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("1.npy", npy(F[0]))], r"holds \.npy"),
        ([("1.npy", npy(F[0])), ("1.cls", b"1"), ("2.npy", npy(F[0]))],
         r"sample '/2' has no \.cls"),
        ([("1.npy", npy(F[0])), ("1.cls", b"one")], r"1\.cls cannot be read"),
        ([("1.npy", b"no array"), ("1.cls", b"1")], r"1\.npy cannot be read"),
        ([("1.json", b"[1, "), ("1.cls", b"1")], r"1\.json cannot be read"),
        ([("1.json", b'{"a": 1}'), ("1.cls", b"1")], "numbers"),
        ([("1.npy", npy(F[0])), ("2.npy", npy(F[0])), ("1.cls", b"1")], "not neighbours"),
        ([("1.npy", npy(F[0])), ("1.npy", npy(F[0])), ("1.cls", b"1")], "there twice"),
        ([("1.npy", npy(F[0])), ("1.cls", b"1"), ("2.npy", npy(X[0])), ("2.cls", b"1")],
         "shape"),
    ],
)  # fmt: skip
def test_a_bad_tar_file_says_what_is_wrong(members, words, tmp_path):
    path = pack(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match=words):
        list(Stream(path, 1, batch_size=2))


def test_a_compressed_tar_file_says_how_to_unpack_it(tmp_path):
    path = as_tar(tmp_path, X, Y)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="gunzip"):
        next(Stream(path, 1, batch_size=2))
    with pytest.raises(InputError, match=r"not \.jpg"):
        TarShard(pack(tmp_path / "b.tar", [("1.jpg", b""), ("1.cls", b"1")]), x="jpg")


# --- tables --------------------------------------------------------------------------------------


def parquet_of(path: Path, columns: dict[str, Any], group: int = 5) -> Path:
    parquet.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_columns_of_a_parquet_file(tmp_path):
    path = parquet_of(tmp_path / "a.parquet", {"b": F[:, 1], "a": F[:, 0], "k": Y, "n": F.tolist()})
    assert torch.equal(
        ParquetShard(path, x="n", y="k").read(3, 17).x, torch.tensor(F[3:17]).double()
    )
    shard = ParquetShard(path, x=["a", "b"], y="k")
    assert torch.equal(shard.read(4, 11).x, torch.from_numpy(F[4:11, :2].copy()))
    plain = parquet_of(tmp_path / "b.parquet", {"b": F[:, 1], "a": F[:, 0], "target": F[:, 2]})
    (batch,) = Stream(plain, 1, batch_size=99)
    assert torch.equal(batch.x, torch.from_numpy(F[:, [1, 0]].copy()))
    assert batch.y.dtype == torch.float32
    assert Stream([shard], 4, batch_size=2).position == 0


def test_the_one_column_beside_the_labels_is_the_input(tmp_path):
    lists = parquet_of(tmp_path / "a.parquet", {"pixels": F.tolist(), "label": Y})
    assert next(Stream(lists, 1, batch_size=23)).x.tolist() == F.tolist()
    numbers = parquet_of(tmp_path / "b.parquet", {"price": F[:, 0], "label": Y})
    assert next(Stream(numbers, 1, batch_size=23)).x.tolist() == F[:, :1].tolist()


def test_a_group_of_rows_is_read_once(tmp_path):
    shard = ParquetShard(parquet_of(tmp_path / "a.parquet", {"x": F[:, 0], "y": Y}))
    read: list[int] = []
    real = shard._file

    class Counting:
        def read_row_group(self, group: int, columns: list[str]) -> Any:
            read.append(group)
            return real.read_row_group(group, columns=columns)

    shard._file = Counting()
    for i in range(23):
        assert shard.read(i, i + 1).y.tolist() == [Y[i]]
    assert read == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("columns", "x", "y", "words"),
    [
        ({"a": [1.0], "b": [1]}, None, None, r"which has the labels\? Name it: y='...'"),
        ({"a": [1.0], "y": [1]}, "z", None, r"no columns \['z'\], it has \['a', 'y'\]"),
        ({"y": [1]}, None, None, "no columns but the label"),
        ({"x": ["text"], "y": [1]}, None, None, "numbers"),
        ({"x": [1.0, None], "y": [1, 2]}, None, None, "1 empty values"),
        ({"x": [[1.0], [1.0, 2.0]], "y": [1, 2]}, None, None, "different lengths"),
        ({"a": [[1.0], [2.0]], "b": [1.0, 1.0], "y": [1, 2]}, None, None, "one number a row"),
    ],
)
def test_a_bad_parquet_file_says_what_is_wrong(columns, x, y, words, tmp_path):
    path = parquet_of(tmp_path / "a.parquet", columns)
    with pytest.raises(InputError, match=words):
        ParquetShard(path, x=x, y=y).read(0, len(next(iter(columns.values()))))


def test_without_pyarrow_the_message_names_the_extra(tmp_path, monkeypatch):
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(tables.importlib, "import_module", absent)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingDataError, match=r"pip install tessera-lifelong\[parquet\]"):
        next(Stream(tmp_path, 1, batch_size=1))


class Rows:
    """In the shape of a Hugging Face `Dataset`."""

    column_names = ("image", "label", "text")
    _fingerprint = "1234"

    def __init__(self, image: list[Any]) -> None:
        self.image = image

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: slice) -> dict[str, Any]:
        numbers = range(len(self))[rows]
        return {
            "image": [self.image[i] for i in numbers],
            "label": [i % 3 for i in numbers],
            "text": ["?" for _ in numbers],
        }


@pytest.mark.parametrize("image", [F.tolist(), list(F), [torch.tensor(f) for f in F]])
def test_a_data_set_with_columns_is_a_shard(image):
    (batch,) = Stream(Rows(image), 1, batch_size=50)
    assert torch.equal(batch.x, torch.from_numpy(F))
    assert batch.y.tolist() == [i % 3 for i in range(23)]
    assert DatasetShard(Rows(image)).fingerprint() != DatasetShard(Rows(image[1:])).fingerprint()


def test_a_bad_data_set_says_what_is_wrong():
    with pytest.raises(InputError, match=r"no columns \['pixels'\]"):
        DatasetShard(Rows([]), x="pixels")
    with pytest.raises(InputError, match="IterableShard"):
        DatasetShard(iter([]))
    with pytest.raises(InputError, match=r"numbers of one shape|one shape"):
        next(Stream(Rows([[1.0], [1.0, 2.0]]), 1, batch_size=2))
    with pytest.raises(InputError, match="numbers"):
        next(Stream([DatasetShard(Rows([[1.0]]), x="text")], 1, batch_size=2))


def test_shards_of_several_kinds_in_one_stream(tmp_path):
    np.savez(tmp_path / "a.npz", x=F[:9], y=Y[:9])
    shards = [tmp_path / "a.npz", Batch(torch.tensor(F[9:12]), torch.tensor(Y[9:12]).long()),
              (F[12:], Y[12:])]  # fmt: skip
    batches = list(Stream(shards, 1, batch_size=5))
    assert torch.equal(torch.cat([b.x for b in batches]), torch.from_numpy(F))
    state = json.dumps(Stream(shards, 3, batch_size=2).state_dict())
    assert json.loads(state)["of"] == 3


def test_columns_that_were_named_are_in_the_fingerprint(tmp_path: Path) -> None:
    # Else a stream resumed with other columns would go on as if nothing had happened.
    table = pa.table({"a": [1.0, 2.0], "b": [3.0, 4.0], "y": [0, 1]})
    parquet.write_table(table, tmp_path / "t.parquet")
    kinds = [ParquetShard(tmp_path / "t.parquet", x=x) for x in (None, "a", ["a"], "b")]
    assert len({shard.fingerprint() for shard in kinds}) == 4
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, raw in (("1.json", b"[1]"), ("1.cls", b"7"), ("1.txt", b"8")):
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    samples = [TarShard(tmp_path / "t.tar", y=y) for y in (None, "cls", "txt")]
    assert len({shard.fingerprint() for shard in samples}) == 3
    one, other = (Stream([shard], 1, batch_size=1) for shard in samples[1:])
    next(one)
    with pytest.raises(CheckpointError, match="is not what it was"):
        other.load_state_dict(one.state_dict())


def test_an_array_in_a_tar_file_is_measured_before_it_is_read(tmp_path: Path) -> None:
    honest = io.BytesIO()
    np.save(honest, np.ones(4))
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        huge, {"descr": "<f8", "fortran_order": False, "shape": (1 << 45,)}
    )
    packed = io.BytesIO()
    np.savez(packed, x=np.ones(3))
    for raw in (huge.getvalue() + bytes(32), honest.getvalue() + b"more", packed.getvalue()):
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            for name, content in (("1.npy", raw), ("1.cls", b"7")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        with pytest.raises(InputError, match=r"1\.npy cannot be read"):
            TarShard(tmp_path / "t.tar").read(0, 1)

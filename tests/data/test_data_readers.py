import contextlib
import gzip
import hashlib
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tessera.data import readers
from tessera.data.readers import read_folder, read_idx, read_npz, read_stream
from tessera.errors import InputError, MissingDataError, UnknownNameError

IMAGES = np.arange(6 * 3 * 2, dtype=np.uint8).reshape(6, 3, 2)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def idx_bytes(array: np.ndarray) -> bytes:
    array = array.astype(np.uint8)
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def write_idx(folder: Path, *, gz: bool = False) -> Path:
    for name, array in zip(
        readers._IDX_NAMES, (IMAGES, LABELS, IMAGES[:3], LABELS[:3]), strict=True
    ):
        data = idx_bytes(array)
        (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(data) if gz else data)
    return folder


def write_npz(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.savez(folder / "train.npz", x=x, y=y)
    np.savez(folder / "test.npz", x=np.ones((2, *np.shape(x)[1:])), y=np.array([0, 1]))
    return folder


# --- what is read


def test_the_bundled_digits_are_the_1797_of_uci():
    x, y = read_npz(readers._DIGITS, "xy")
    assert (x.shape, x.dtype, y.shape) == ((1797, 8, 8), np.uint8, (1797,))
    # Over contents, not over the file: another zlib packs the same numbers differently.
    assert hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest() == (
        "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    )


def test_digits_split_the_same_way_whatever_happens():
    train, test = read_stream("digits", None)
    assert (train.x.shape, test.x.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (float(train.x.min()), float(train.x.max()), train.x.dtype) == (0.0, 1.0, torch.float32)
    assert train.y.dtype == torch.int64
    assert test.y[:12].tolist() == [4, 5, 2, 8, 9, 2, 8, 5, 0, 7, 0, 0]
    whole, _ = read_npz(readers._DIGITS, "xy")
    rows = torch.cat([train.x, test.x]).mul(16).to(torch.uint8).flatten(1).tolist()
    assert sorted(rows) == sorted(whole.reshape(-1, 64).tolist())


@pytest.mark.parametrize("gz", [False, True])
def test_idx_folders_are_read_plain_and_gzipped(tmp_path, gz):
    train, test = read_folder(write_idx(tmp_path, gz=gz))
    assert torch.equal(train.x, torch.tensor(IMAGES / 255, dtype=torch.float32)[:, None])
    assert (train.y.tolist(), test.y.tolist()) == (LABELS.tolist(), [0, 1, 2])


def test_two_npz_files_are_read(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 5))
    train, test = read_folder(write_npz(tmp_path, x, LABELS.astype(np.uint8)))
    assert torch.equal(train.x, torch.tensor(x, dtype=torch.float32))
    assert (train.y.dtype, test.x.shape) == (torch.int64, (2, 5))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_one_npz_file_is_read(tmp_path, save, order):
    x = np.asarray(IMAGES, order=order).astype(">f4" if order == "F" else "f2")
    save(tmp_path / "a.npz", x_train=x, y_train=LABELS, x_test=x[:2], y_test=LABELS[:2])
    train, test = read_folder(tmp_path)
    assert torch.equal(train.x, torch.tensor(IMAGES.astype(np.float32))[:, None])
    assert test.x.shape == (2, 1, 3, 2)


def test_colour_images_keep_their_channels(tmp_path):
    x = np.zeros((6, 3, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=LABELS, x_test=x, y_test=LABELS)
    assert read_folder(tmp_path)[0].x.shape == (6, 3, 4, 4)


# --- damaged files


GOOD_IDX = idx_bytes(IMAGES)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD_IDX[:-1], "header promises 36 bytes .* holds fewer"),
        (GOOD_IDX + b"x", "header promises 36 bytes .* holds more"),
        (GOOD_IDX[:9], "truncated inside its header"),
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x03" + GOOD_IDX[4:], "not an IDX file of uint8: it starts with '00000d03'"),
        (b"\x00\x00\x08\x00" + GOOD_IDX[4:], "not an IDX file"),
        (b"\x00\x00\x08\xff" + GOOD_IDX[4:], "not an IDX file"),
        (b"PK\x03\x04" + GOOD_IDX[4:], "not an IDX file"),
        (bytes([0, 0, 8, 4]) + b"\xff" * 16, "header promises 3402823"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, data, message, gz):
    path = tmp_path / "labels"
    path.write_bytes(gzip.compress(data) if gz else data)
    with pytest.raises(InputError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_a_damaged_gzip_is_named(tmp_path):
    path, good = tmp_path / "labels.gz", gzip.compress(GOOD_IDX)
    for data in (good[:-1], good[: len(good) // 2], good[:-8] + bytes(8), good[:3]):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"labels.gz is truncated or damaged"):
            read_idx(path)


def test_every_truncation_and_every_flipped_bit_of_a_gzip_is_refused_or_harmless(tmp_path):
    path, good = tmp_path / "labels.gz", gzip.compress(GOOD_IDX, mtime=0)
    for i in range(len(good)):
        path.write_bytes(good[:i])
        with pytest.raises(InputError):
            read_idx(path)
        path.write_bytes(good[:i] + bytes([good[i] ^ 16]) + good[i + 1 :])
        with contextlib.suppress(InputError):
            assert read_idx(path).tolist() == IMAGES.tolist()


def test_a_gzip_is_unpacked_no_further_than_its_header_promises(tmp_path, monkeypatch):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(50_000_000)))
    asked = []
    real = gzip.GzipFile.read

    def read(self, size=-1):
        asked.append(size)
        return real(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read", read)
    with pytest.raises(InputError, match="promises 9 bytes"):
        read_idx(path)
    assert max(asked) == 10


def npy_header(shape: str, descr: str = "'|u1'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npz_of(path: Path, x: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", x)
    return path


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy_header("(1000000000000,)") + b"abc", "x.npy promises 1000000000128 bytes"),
        (npy_header("(4,)") + b"abc", r"promises 132 bytes \(shape \(4,\), uint8\)"),
        (npy_header("(2,)") + b"abc", "promises 130 bytes"),
        (npy_header("(-1, -3)") + b"abc", "not a readable npz"),
        (npy_header("(3,)", "'|O'") + b"abc", "pickled objects"),
        (npy_header("oops") + b"abc", "not a readable npz"),
        (b"abc", "not a readable npz"),
        (b"\x93NUMPY\x03\x00" + npy_header("(3,)")[8:] + b"abc", "structured columns"),
    ],
)
def test_a_damaged_npz_member_is_refused_before_memory_is_taken(tmp_path, member, message):
    path = npz_of(tmp_path / "a.npz", member)
    with pytest.raises(InputError, match=message) as caught:
        read_npz(path, "x")
    assert str(path) in str(caught.value)


def test_an_npz_packed_in_a_foreign_way_is_refused(tmp_path):
    path = npz_of(tmp_path / "a.npz", npy_header("(3,)") + b"abc", zipfile.ZIP_LZMA)
    with pytest.raises(InputError, match="save it anew"):
        read_npz(path, "x")


def test_every_truncation_of_an_npz_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.arange(5))
    path = tmp_path / "a.npz"
    for i in range(len(buffer.getvalue())):
        path.write_bytes(buffer.getvalue()[:i])
        with pytest.raises(InputError):
            read_npz(path, "x")


def test_a_pickle_in_an_npz_is_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}, 1], dtype=object))
    with pytest.raises(InputError, match="pickled objects, which are never loaded"):
        read_npz(tmp_path / "a.npz", "x")


def test_a_missing_array_is_named_with_what_there_is(tmp_path):
    np.savez(tmp_path / "a.npz", x=IMAGES, labels=LABELS)
    with pytest.raises(InputError, match=r"it has no y \(it holds: labels, x\)"):
        read_npz(tmp_path / "a.npz", "xy")


# --- bad values


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.array([[1.0], [np.nan]]), np.array([0, 1]), "NaN or infinite .* first in example 1"),
        (np.array([[1.0], [-np.inf]]), np.array([0, 1]), "NaN or infinite"),
        (np.array([[1e300], [0]]), np.array([0, 1]), "NaN or infinite values .as float32."),
        (np.ones((2, 3)), np.array([0.0, 1.0]), "labels must be integers, y is float64"),
        (np.ones((2, 3)), np.array([True, False]), "labels must be integers, y is bool"),
        (np.ones((2, 3)), np.array(["a", "b"]), "labels must be integers"),
        (np.ones((2, 3)), np.array([0, -1]), "labels count from 0, the smallest in y is -1"),
        (np.ones((2, 3)), np.array([0, 1, 1]), r"differ in length: x has 2 .* y has shape \(3,\)"),
        (np.ones((2, 3)), np.array([[0], [1]]), r"differ in length: .* y has shape \(2, 1\)"),
        (np.ones((2, 3), np.int64), np.array([0, 1]), "x must be uint8 images or floats"),
        (np.ones(2), np.array([0, 1]), r"x needs examples and features"),
        (np.ones((0, 3)), np.array([], np.int64), r"x needs examples and features"),
    ],
)
def test_values_that_cannot_be_learned_from_are_refused(tmp_path, x, y, message):
    with pytest.raises(InputError, match=message) as caught:
        read_folder(write_npz(tmp_path, x, y))
    assert "train.npz" in str(caught.value)


def test_training_and_test_examples_have_one_shape(tmp_path):
    np.savez(
        tmp_path / "a.npz",
        x_train=IMAGES,
        y_train=LABELS,
        x_test=np.ones((2, 7)),
        y_test=LABELS[:2],
    )
    with pytest.raises(InputError, match=r"differ in shape: \(1, 3, 2\) and \(7,\)"):
        read_folder(tmp_path)


# --- missing files


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(MissingDataError, match=r"there is no folder .*nowhere"):
        read_stream(tmp_path / "nowhere", None)


def test_an_empty_folder_says_what_it_should_hold(tmp_path):
    with pytest.raises(MissingDataError, match=r"train-images-idx3-ubyte.*train.npz.*x_train"):
        read_folder(tmp_path)


def test_a_missing_idx_file_is_named(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingDataError, match="lacks t10k-labels-idx1-ubyte"):
        read_folder(tmp_path)


@pytest.mark.parametrize("exists", [False, True])
def test_absent_fashion_mnist_names_the_package_and_the_way_around(tmp_path, monkeypatch, exists):
    monkeypatch.setattr(readers, "FASHION_MNIST", tmp_path if exists else tmp_path / "absent")
    with pytest.raises(
        MissingDataError,
        match=r"apt install dataset-fashion-mnist.*path=DIR, on the command line --data DIR",
    ):
        read_stream("fashion_mnist", None)


def test_fashion_mnist_is_read_from_where_path_says(tmp_path):
    assert len(read_stream("fashion_mnist", write_idx(tmp_path, gz=True))[0].y) == 6


def test_an_unknown_stream_is_told_the_known_ones():
    with pytest.raises(UnknownNameError, match="no stream 'mnist'; choose one of: digits, fashion"):
        read_stream("mnist", None)


def test_a_path_beside_a_stream_that_has_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="leave it out"):
        read_stream("digits", tmp_path)

"""A small file of examples: CSV, JSON lines or npz; texts or numbers, each with a label."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from tessera.data.readers import read_npz
from tessera.errors import InputError, MissingDataError
from tessera.random import permutation

__all__ = ["Examples", "numbers_of", "read_examples", "split_examples"]

_MAX_BYTES = 1 << 28
_FORMS = (
    "a .csv with a header and the columns text,label (or numbers and label), a .jsonl with "
    '{"text": ..., "label": ...} or {"x": [...], "label": ...} a line, or an .npz with x and y'
)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """What a file of examples holds.

    Attributes:
        path: Where it was read, for messages.
        texts: n texts; None where the file has numbers.
        x: Numbers [n, ...], float32 or int64; None where it has texts.
        labels: n labels, as they are written.

    Example:
        >>> Examples(path="a.csv", texts=["hello"], x=None, labels=["greeting"]).labels
        ['greeting']
    """

    path: str
    texts: list[str] | None
    x: Tensor | None
    labels: list[str]


def read_examples(path: str) -> Examples:
    """The examples in a file, told by its ending.

    Raises:
        MissingDataError: There is no such file.
        InputError: It is of no known form; the message names the line.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "shots.csv"
        >>> _ = path.write_text("text,label\\nhello,greeting\\nsee you,farewell\\n")
        >>> read_examples(str(path)).labels
        ['greeting', 'farewell']
    """
    file = Path(path)
    if not file.is_file():
        raise MissingDataError(f"there is no file {path}; examples are {_FORMS}")
    if file.stat().st_size > _MAX_BYTES:
        raise InputError(f"{path} has {file.stat().st_size:,} bytes; shots are a few examples")
    kinds = {".csv": _csv, ".jsonl": _jsonl, ".npz": _npz}
    if file.suffix not in kinds:
        raise InputError(f"{path}: examples are {_FORMS}")
    try:
        found = kinds[file.suffix](file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    if not found.labels:
        raise InputError(f"{path} holds no example")
    if found.x is not None and not bool(torch.isfinite(found.x).all()):
        row = int((~torch.isfinite(found.x.flatten(1))).any(1).nonzero()[0])
        raise InputError(f"{path}: example {row + 1} has NaN or infinite numbers")
    return found


def _csv(file: Path) -> Examples:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.reader(lines))
    header = [name.strip() for name in rows[0]] if rows else []
    if "label" not in header or len(header) < 2 or len(set(header)) < len(header):
        raise InputError(
            f"{file}: the first line must name the columns, one of them label, e.g. text,label; "
            f"it is {','.join(header)[:80]!r}"
        )
    features = ["text"] if "text" in header else [n for n in header if n != "label"]
    found: list[tuple[list[str], Any]] = []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != len(header):
            raise InputError(
                f"{file}, line {number}: {len(row)} cells, the header has {len(header)}; put "
                'texts that hold commas in "quotes"'
            )
        cells = dict(zip(header, row, strict=True))
        found.append(([cells[n] for n in features], cells["label"]))
    texts = [cells[0] for cells, _ in found] if "text" in header else None
    x = None if texts is not None else _numbers(file, [cells for cells, _ in found])
    return _examples(file, texts, x, [label for _, label in found])


def _jsonl(file: Path) -> Examples:
    texts: list[str] = []
    arrays: list[Any] = []
    labels: list[Any] = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            match json.loads(line):
                case {"text": str(text), "label": str() | int() as label}:
                    texts.append(text)
                case {"x": list(values), "label": str() | int() as label}:
                    arrays.append(values)
                case _:
                    raise ValueError('it is not {"text": ..., "label": ...}, nor with "x": [...]')
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}, line {number}: {error}") from error
        labels.append(label)
    if texts and arrays:
        raise InputError(f'{file}: some lines have "text" and some "x"; make it two files')
    return _examples(file, texts or None, _numbers(file, arrays) if arrays else None, labels)


def _npz(file: Path) -> Examples:
    x, y = read_npz(file, ["x", "y"])
    if y.ndim != 1 or x.ndim < 2 or len(x) != len(y):
        raise InputError(f"{file} needs x [n, ...] and y [n], got {x.shape} and {y.shape}")
    if y.dtype.kind not in "iuU":
        raise InputError(f"{file}: y must hold whole numbers or names, it holds {y.dtype}")
    return _examples(file, None, _numbers(file, x), y.tolist())


def _numbers(file: Path, values: Any) -> Tensor:
    try:
        array = np.asarray(values)
        whole = array.dtype.kind in "iu"
        return torch.from_numpy(array.astype(np.int64 if whole else np.float32))
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{file}: the examples are no numbers of one shape ({error})") from error


def _examples(file: Path, texts: list[str] | None, x: Tensor | None, labels: list[Any]) -> Examples:
    return Examples(path=str(file), texts=texts, x=x, labels=[str(la).strip() for la in labels])


def numbers_of(examples: Examples, names: Sequence[str]) -> Tensor:
    """The number int64 [n] of each label among `names`.

    Raises:
        InputError: A label is none of them.

    Example:
        >>> some = Examples(path="a.csv", texts=["x", "y"], x=None, labels=["b", "a"])
        >>> numbers_of(some, ["a", "b"])
        tensor([1, 0])
    """
    place = {name: number for number, name in enumerate(names)}
    for number, label in enumerate(examples.labels, 1):
        if label not in place:
            raise InputError(
                f"{examples.path}: example {number} has the label {label!r}, which is none of "
                f"{', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
            )
    return torch.tensor([place[label] for label in examples.labels])


def split_examples(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """The examples without, and those with, a share of each label held out.

    Args:
        examples: To split.
        share: In (0, 1); of each label at least one is left, and one held out where there are two.
        seed: Of the choice.

    Raises:
        InputError: `share` is out of range, or no label has two examples.

    Example:
        >>> some = Examples(path="a.csv", texts=list("abcd"), x=None, labels=["p", "p", "q", "q"])
        >>> kept, held = split_examples(some, 0.5, seed=0)
        >>> kept.labels, held.labels
        (['p', 'q'], ['p', 'q'])
    """
    if not 0 < share < 1:
        raise InputError(f"--held-out must lie between 0 and 1, got {share}")
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(examples.labels):
        rows.setdefault(label, []).append(row)
    held: set[int] = set()
    for label, own in rows.items():
        count = min(len(own) - 1, max(1, round(share * len(own))))
        order = permutation(len(own), seed, "held-out", label)
        held |= {own[i] for i in order[:count].tolist()}
    if not held:
        raise InputError(
            f"{examples.path} has one example of each label, so none can be held out; give "
            "--query FILE with others"
        )
    inside = [row for row in range(len(examples.labels)) if row not in held]
    return _rows(examples, inside), _rows(examples, sorted(held))


def _rows(examples: Examples, rows: list[int]) -> Examples:
    texts, x = examples.texts, examples.x
    return Examples(
        path=examples.path,
        texts=None if texts is None else [texts[row] for row in rows],
        x=None if x is None else x[torch.tensor(rows)],
        labels=[examples.labels[row] for row in rows],
    )

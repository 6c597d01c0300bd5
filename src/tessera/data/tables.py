"""Shards from tables with named columns: Parquet files and Hugging Face data sets."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.formats import file_fingerprint
from tessera.data.shards import as_rows, digest
from tessera.errors import InputError, MissingDataError

__all__ = ["DatasetShard", "ParquetShard"]

_LABELS = ("y", "label", "labels", "target")


@final
class ParquetShard:
    """A Parquet file; a group of rows is read when it is reached.

    Args:
        path: The file.
        x: A column of numbers or of lists of one length; or several columns, which become the
            features of a row, in this order. None: the column "x", or all but the label.
        y: The column of labels. None: "y", "label", "labels" or "target".

    Raises:
        MissingDataError: The file or pyarrow is not there.
        InputError: It is damaged, or has no such columns.

    Example:
        >>> import tempfile
        >>> import pyarrow as pa, pyarrow.parquet
        >>> path = Path(tempfile.mkdtemp()) / "a.parquet"
        >>> table = pa.table({"age": [31.0, 4.0], "height": [1.8, 1.0], "label": [1, 0]})
        >>> pyarrow.parquet.write_table(table, path)
        >>> ParquetShard(path, x=["height", "age"]).read(1, 2).x
        tensor([[1., 4.]], dtype=torch.float64)
    """

    def __init__(
        self,
        path: str | Path,
        x: str | Sequence[str] | None = None,
        y: str | None = None,
    ) -> None:
        try:
            pyarrow = importlib.import_module("pyarrow")
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise MissingDataError(
                f"reading {path} needs pyarrow: pip install tessera-lifelong[parquet]"
            ) from error
        self.path, self.name = Path(path), str(path)
        self._named = (x if x is None or isinstance(x, str) else list(x), y)
        if not self.path.is_file():
            raise MissingDataError(f"the shard {path} is not there; put it back, or leave it out")
        self._errors: tuple[type[Exception], ...] = (pyarrow.ArrowException, OSError)
        try:
            self._file: Any = parquet.ParquetFile(self.path, memory_map=True)
        except self._errors as error:
            raise InputError(f"{path} is no readable Parquet file ({error})") from error
        names = list(self._file.schema_arrow.names)
        self._x, self._y = _columns(self.name, names, x, y)
        meta = self._file.metadata
        counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._starts: list[int] = [0, *accumulate(counts)]
        self._group, self._rows = -1, Batch(torch.empty(0), torch.empty(0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1`.

        Raises:
            InputError: A group is damaged, or holds no numbers.
        """
        parts = []
        for group in range(len(self._starts) - 1):
            first, after = self._starts[group], self._starts[group + 1]
            if first < stop and after > start:
                rows = self._read_group(group)
                a, b = max(start, first) - first, min(stop, after) - first
                parts.append((rows.x[a:b], rows.y[a:b]))
        if len(parts) == 1:
            return Batch(*parts[0])
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        return Batch(x, y)

    def _read_group(self, group: int) -> Batch:
        if group != self._group:
            wanted = list(dict.fromkeys([*([self._x] if isinstance(self._x, str) else self._x),
                                         self._y]))  # fmt: skip
            try:
                table = self._file.read_row_group(group, columns=wanted)
                self._rows = _rows(self.name, {n: _array(table.column(n)) for n in wanted},
                                   self._x, self._y)  # fmt: skip
            except self._errors as error:
                raise InputError(f"{self.name}: row group {group} is damaged ({error})") from error
            self._group = group
        return self._rows

    def fingerprint(self) -> str:
        """Of its size and its ends, and of the columns that were named."""
        of_file = file_fingerprint("parquet", [self.path])
        if self._named == (None, None):
            return of_file
        return digest(of_file.encode(), repr(self._named).encode())


def _array(column: Any) -> Any:
    """A column of numbers as an array [n], one of lists as [n, width]."""
    if column.null_count:
        raise InputError(f"a column has {column.null_count} empty values; fill them")
    whole = column.combine_chunks()
    if not hasattr(whole, "flatten") or not hasattr(whole.type, "value_type"):
        return whole.to_numpy(zero_copy_only=False)
    flat = whole.flatten()
    if flat.null_count:
        raise InputError(f"a column of lists has {flat.null_count} empty values; fill them")
    width, rest = divmod(len(flat), max(1, len(whole)))
    fixed = hasattr(whole.type, "list_size")
    if rest or not (fixed or (np.diff(whole.offsets.to_numpy()) == width).all()):
        raise InputError("a column of lists has rows of different lengths; pad them")
    inner = _array(flat) if hasattr(flat.type, "value_type") else None
    values = flat.to_numpy(zero_copy_only=False) if inner is None else inner
    return values.reshape(len(whole), width, *values.shape[1:])


@final
class DatasetShard:
    """A Hugging Face `Dataset`, or anything with a length, slices of columns and `column_names`.

    Args:
        dataset: `dataset[start:stop]` gives a dictionary of columns.
        x: As for `ParquetShard`; None: "x", "image", "pixel_values", "input_ids", or all columns
            but the label.
        y: As for `ParquetShard`.

    Raises:
        InputError: It has no such columns.

    Example:
        >>> class Rows:
        ...     column_names = ["pixels", "label"]
        ...     def __len__(self): return 4
        ...     def __getitem__(self, s):
        ...         i = range(4)[s]
        ...         return {"pixels": [[float(n), 0.0] for n in i], "label": list(i)}
        >>> DatasetShard(Rows(), x="pixels").read(1, 3).y
        tensor([1, 2])
    """

    def __init__(
        self, dataset: Any, x: str | Sequence[str] | None = None, y: str | None = None
    ) -> None:
        if not all(hasattr(dataset, name) for name in ("__len__", "__getitem__", "column_names")):
            raise InputError(
                f"DatasetShard needs an object with __len__, slices and column_names, got "
                f"{type(dataset).__name__}; of an iterable data set: data.IterableShard(rows)"
            )
        self.name = f"data set {type(dataset).__name__}"
        self._data = dataset
        self._x, self._y = _columns(self.name, list(dataset.column_names), x, y)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1`.

        Raises:
            InputError: A column holds no numbers of one shape.
        """
        wanted = [*([self._x] if isinstance(self._x, str) else self._x), self._y]
        rows = self._data[start:stop]
        return _rows(self.name, {name: rows[name] for name in wanted}, self._x, self._y)

    def fingerprint(self) -> str:
        """The data set's own, if it has one; else of its length and columns."""
        own = getattr(self._data, "_fingerprint", None)
        parts = (str(own), str(len(self)), str(self._x), self._y)
        return digest(*(part.encode() for part in parts))


def _columns(
    where: str, names: list[str], x: str | Sequence[str] | None, y: str | None
) -> tuple[str | list[str], str]:
    """The columns of inputs and labels, by name or by custom."""
    if y is None:
        found = [name for name in _LABELS if name in names]
        if not found:
            raise InputError(
                f"{where} has the columns {names}; which has the labels? Name it: y='...'"
            )
        y = found[0]
    if x is None:
        usual = [n for n in ("x", "image", "pixel_values", "input_ids") if n in names]
        x = usual[0] if usual else [n for n in names if n != y]
    chosen: str | list[str] = x if isinstance(x, str) else list(x)
    wanted = [chosen] if isinstance(chosen, str) else chosen
    lacking = [name for name in [*wanted, y] if name not in names]
    if lacking or not wanted:
        raise InputError(f"{where} has no columns {lacking or 'but the label'}, it has {names}")
    return chosen, y


def _rows(where: str, columns: dict[str, Any], x: str | list[str], y: str) -> Batch:
    if isinstance(x, str):
        return as_rows(_stacked(columns[x], where), _stacked(columns[y], where), where)
    parts = [as_rows(_stacked(columns[n], where), _stacked(columns[y], where), f"{where}, {n!r}").x
             for n in x]  # fmt: skip
    if len(parts) == 1 and parts[0].ndim > 1:
        return as_rows(parts[0], _stacked(columns[y], where), where)
    if any(part.ndim != 1 for part in parts):
        raise InputError(f"{where}: of several columns {x} each must hold one number a row")
    return as_rows(torch.stack(parts, 1), _stacked(columns[y], where), where)


def _stacked(column: Any, where: str) -> Any:
    """Rows as one array; a list of arrays, tensors or images is stacked."""
    if isinstance(column, Tensor | np.ndarray):
        return column
    try:
        return np.stack([np.asarray(v) for v in column]) if _holds_arrays(column) else list(column)
    except ValueError as error:
        raise InputError(f"{where}: rows of one shape are needed ({error})") from error


def _holds_arrays(column: Any) -> bool:
    first = column[0] if len(column) else None
    return hasattr(first, "__array_interface__") or hasattr(first, "__array__")

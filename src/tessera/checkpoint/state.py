"""The state of a run as one value, and the two functions that move it to and from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from tessera.arch.anchor import Anchor
from tessera.checkpoint import file, tree
from tessera.errors import CheckpointError, InputError

__all__ = ["State", "load", "save"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """What a run needs in order to go on as if it had never stopped.

    Plain values only: None, bool, int, float, str, tensors, anchors, and lists, tuples and
    mappings of these, nested up to 64 deep. Randomness has no entry: `tessera.random` is a
    function of the counters saved here.

    Attributes:
        weights: ``model.state_dict()``, name -> tensor.
        optimizer: ``optimizer.state_dict()``, or a collection of them.
        anchors: A sequence of `Anchor`, or a mapping name -> `Anchor`.
        deltas: A sequence or a mapping of plain values.
        replay: ``buffer.state_dict()``.
        stream: ``stream.state_dict()``.
        counters: Whatever else the run counts, e.g. ``{"epoch": 3}``.
        step: Updates made so far, >= 0.

    Raises:
        InputError: `weights` is not a state dict, `anchors` holds something else than anchors,
            `deltas` is neither a sequence nor a mapping, or `step` is not a count.

    Example:
        >>> import torch
        >>> State(weights={"w": torch.zeros(2)}, counters={"epoch": 3}).step
        0
    """

    weights: Mapping[str, Tensor]
    optimizer: Any = None
    anchors: Sequence[Anchor] | Mapping[str, Anchor] = ()
    deltas: Sequence[Any] | Mapping[str, Any] = ()
    replay: Any = None
    stream: Any = None
    counters: Any = None
    step: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping):
            raise InputError(
                "State(weights=) takes a mapping name -> tensor, got "
                f"{type(self.weights).__name__}; pass model.state_dict()"
            )
        for name, value in self.weights.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise InputError(
                    f"State(weights=) takes a mapping name -> tensor, but {name!r} is a "
                    f"{type(value).__name__}; put what is no weight into counters="
                )
        for kind in ("anchors", "deltas"):
            if not isinstance(getattr(self, kind), list | tuple | Mapping):
                raise InputError(
                    f"State({kind}=) takes a list, a tuple or a mapping, got "
                    f"{type(getattr(self, kind)).__name__}; for a single one: {kind}=[it]"
                )
        for anchor in _members(self.anchors):
            if not isinstance(anchor, Anchor):
                raise InputError(
                    f"State(anchors=) takes anchors, got a {type(anchor).__name__} among them; "
                    "make one with arch.anchor_from(model, name)"
                )
        if type(self.step) is not int or self.step < 0:
            raise InputError(f"State(step=) counts updates, an int >= 0, got {self.step!r}")


def save(path: str | os.PathLike[str], state: State) -> None:
    """Write `state` to one file, atomically and durably.

    When this returns, the file is on the disk; if it raises, or the machine dies on the way, what
    stood at `path` before is untouched. The file is plain safetensors (any safetensors reader
    gives the tensors), with the rest as JSON in its metadata. Nothing is pickled.

    Cost:
        One pass over the tensors and no second copy of them in memory, except of one at a time
        where it lies on another device or is not contiguous. A tensor held under two names (tied
        weights) is stored once, under the first.

    Args:
        path: The file to write; missing parent directories are created. A link is followed.
        state: What to keep.

    Raises:
        CheckpointError: The state holds a value that cannot be stored; nothing was written.
        StorageError: The file could not be written (disk full, read-only, no directory).

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/run.ckpt", State(weights={"w": torch.ones(2)}, step=7))
        ...     load(f"{folder}/run.ckpt").step
        7
    """
    values = {entry.name: getattr(state, entry.name) for entry in fields(state)}
    for kind in ("anchors", "deltas"):
        if not isinstance(values[kind], Mapping):
            values[kind] = tuple(values[kind])
    nodes, tensors = tree.encode(values)
    file.write(path, nodes, tensors)


def load(path: str | os.PathLike[str]) -> State:
    """Read back what `save` wrote: equal to the last bit, on the CPU, in memory of its own.

    Every byte is checked before anything is returned, and nothing in the file is ever executed,
    so a file from elsewhere is safe to try. Mappings come back as dicts, sequences of anchors and
    deltas as tuples, anchors without code (`Anchor.bind` gives it to them).

    Args:
        path: The file.

    Raises:
        MissingDataError: There is no such file.
        CheckpointError: The file is damaged, is no Tessera checkpoint, or is of a newer version.
        StorageError: The operating system refused to read it.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tied = torch.arange(2)
        ...     state = State(weights={"w": tied, "v": tied}, counters={3: (1.5, None)})
        ...     save(f"{folder}/run.ckpt", state)
        ...     back = load(f"{folder}/run.ckpt")
        >>> back.weights["v"], back.counters
        (tensor([0, 1]), {3: (1.5, None)})
    """
    try:
        values = tree.decode(*file.read(path))
        names = [entry.name for entry in fields(State)]
        if type(values) is not dict or list(values) != names:
            raise ValueError(f"its tree is not a mapping of {', '.join(names)}")
        return State(**values)
    except CheckpointError:
        raise
    except (ValueError, RuntimeError) as error:
        # What a wrong byte can cause: ValueError is ours, json's, unicode's, Anchor's and
        # State's; RuntimeError is a tree too deep for json, or a tensor torch cannot make.
        raise CheckpointError(
            f"{os.fspath(path)} is damaged, or no Tessera checkpoint: {error}. Nothing was "
            "loaded; take an earlier checkpoint or a backup"
        ) from error


def _members(collection: Sequence[Any] | Mapping[str, Any]) -> Sequence[Any]:
    return list(collection.values()) if isinstance(collection, Mapping) else collection

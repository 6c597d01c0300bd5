"""Labelled examples from the journal: what to fit to, what to rehearse, what to hold out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import sqlalchemy as sa
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from tessera import random
from tessera.errors import CheckpointError, MissingDataError
from tessera.serve import rollout_schema, schema
from tessera.serve.blobs import Blobs
from tessera.serve.learning_drift import Seen
from tessera.serve.learning_values import LearningPolicy
from tessera.serve.ledger import Ledger
from tessera.serve.rollout import BUCKETS, bucket
from tessera.serve.rollout_values import Shots

__all__ = ["Examples", "Spans", "is_held_out", "read_spans"]

_PAGE = 500
_POOL = 4096  # older examples that the rehearsed ones are drawn from
_BLOBS_KEPT = 8
_MASK = "attention_mask"


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """Examples in one piece.

    Attributes:
        inputs: Name -> [n, ...].
        labels: int64 [n].
        ids: Of each.
        slices: Of each: feature -> value.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    ids: Sequence[str]
    slices: Sequence[Mapping[str, str]]

    def shots(self, features: Sequence[str]) -> Shots:
        """For a gate that judges slices by these features; "": it was not said."""
        return Shots(
            inputs=self.inputs,
            labels=self.labels.tolist(),
            ids=self.ids,
            slices={f: [s.get(f, "") for s in self.slices] for f in features},
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spans:
    """The examples of a round; a None: there are none.

    Attributes:
        new: To fit to.
        old: To rehearse.
        held: That no fit sees.
        left_out: How many could not be used: their inputs are lost, or of another form.
    """

    new: Examples | None
    old: Examples | None
    held: Examples | None
    left_out: int


class _Place(NamedTuple):
    """A labelled example, and where its inputs are."""

    id: str
    blob: str
    start: str
    row: int
    label: int
    slices: Mapping[str, str]


_Row = tuple[dict[str, Tensor], _Place]


def is_held_out(request: str, share: float) -> bool:
    """Whether the examples of a request are kept from every fit, whenever one asks.

    Example:
        >>> sum(is_held_out(f"r-{i}", 0.25) for i in range(1000))
        241
    """
    return bucket("held out", request) < round(share * BUCKETS)


def read_spans(
    ledger: Ledger, blobs: Blobs, policy: LearningPolicy, seen: Seen, padding: Mapping[str, int]
) -> Spans:
    """The examples of a round; the same for the same journal, policy and `seen`.

    From the newest backwards: examples to fit to and held-out ones, to the change or until the
    window is full; of those before, a draw of `replay` among 4096, without the held-out ones.

    Args:
        ledger: The database.
        blobs: Where inputs are.
        policy: How many.
        seen: Up to which feedback, and since which change.
        padding: Inputs [rows, length] that may be padded, and with what; see `batch.Form`.

    Raises:
        StorageError: The database or the blobs are away.
    """
    new, held, pool = list[_Place](), list[_Place](), list[_Place]()
    inside = True
    for seq, request, places in _newest(ledger, policy, seen.at):
        inside = inside and len(new) < policy.window and seq >= seen.change
        apart = is_held_out(request, policy.holdout)
        if inside:
            (held if apart else new).extend(places)
        elif not apart:
            pool.extend(places)
        if not inside and (len(pool) >= _POOL or not policy.replay):
            break
    reading = _Reading(blobs)
    drawn = random.permutation(len(pool), policy.fit.seed, "serve.learning.replay", seen.at)
    old = [pool[i] for i in drawn[: policy.replay].tolist()]
    rows = [
        [(_whole(inputs, padding), place) for inputs, place in reading.rows(part)]
        for part in (new[: policy.window][::-1], old, held[::-1])
    ]
    like = next((_form(part[-1][0], padding) for part in rows if part), None)
    fitting = [[row for row in part if _form(row[0], padding) == like] for part in rows]
    inputs = [x for part in fitting for x, _ in part]
    length = max((x[n].shape[1] for x in inputs for n in x.keys() & padding.keys()), default=0)
    spans = [_joined(part, length, padding) for part in fitting]
    used = sum(len(s.ids) for s in spans if s is not None)
    return Spans(
        new=spans[0],
        old=spans[1],
        held=spans[2],
        left_out=min(len(new), policy.window) + len(old) + len(held) - used,
    )


def _newest(
    ledger: Ledger, policy: LearningPolicy, at: int
) -> Iterator[tuple[int, str, list[_Place]]]:
    """Requests with labels, the newest first: number of the feedback, id, examples."""
    t, a = rollout_schema.feedback, schema.audit
    wanted = (
        sa.select(t.c.seq, t.c.request, t.c.said, a.c.body)
        .join(a, a.c.seq == t.c.answered)
        .where(t.c.tenant == policy.tenant, t.c.alias == policy.alias, t.c.outcomes != "")
        .order_by(t.c.seq.desc())
        .limit(_PAGE)
    )
    while True:
        with ledger.read() as connection:
            rows = connection.execute(wanted.where(t.c.seq <= at)).all()
        for row in rows:
            said, body = json.loads(row.said), json.loads(row.body)
            labels, blob = said["label"], str(body.get("blob", ""))
            if labels and blob:
                several = len(labels) > 1
                yield (
                    row.seq,
                    row.request,
                    [
                        _Place(
                            id=f"{row.request}#{i}" if several else row.request,
                            blob=blob,
                            start=f"{body['at']}.",
                            row=i,
                            label=label,
                            slices=said["slices"],
                        )
                        for i, label in reversed(list(enumerate(labels)))
                    ],
                )
        if len(rows) < _PAGE:
            return
        at = rows[-1].seq - 1


@final
class _Reading:
    """Reads inputs, a few blobs in memory at a time."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._kept: dict[str, dict[str, Tensor]] = {}

    def rows(self, places: Sequence[_Place]) -> list[_Row]:
        """The inputs of each, without those that are lost."""
        found = []
        for place in places:
            blob = self._blob(place.blob)
            inputs = {
                name.removeprefix(place.start): value[place.row : place.row + 1]
                for name, value in blob.items()
                if name.startswith(place.start)
            }
            if inputs:
                found.append((inputs, place))
        return found

    def _blob(self, hash: str) -> dict[str, Tensor]:
        if hash not in self._kept:
            try:
                self._kept[hash] = load(self._blobs.get(hash))
            except (MissingDataError, CheckpointError, SafetensorError):
                self._kept[hash] = {}
            while len(self._kept) > _BLOBS_KEPT:
                self._kept.pop(next(iter(self._kept)))
        return self._kept[hash]


def _whole(inputs: Mapping[str, Tensor], padding: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs with a mask, where the model takes one: as the engine has it, all is there."""
    found = dict(inputs)
    sequence = next((x for n, x in inputs.items() if n in padding), None)
    if sequence is not None and _MASK not in inputs:
        found[_MASK] = torch.ones(1, sequence.shape[1], dtype=torch.int64)
    return found


def _form(inputs: Mapping[str, Tensor], padding: Mapping[str, int]) -> Any:
    """Equal for inputs that can be put one behind the other, once they are padded."""
    return sorted(
        (name, str(x.dtype), tuple(x.shape[2 if name in padding else 1 :]))
        for name, x in inputs.items()
    )


def _joined(rows: Sequence[_Row], length: int, padding: Mapping[str, int]) -> Examples | None:
    """Rows of one form in one piece, their sequences padded to a length."""
    if not rows:
        return None

    def padded(name: str, x: Tensor) -> Tensor:
        if name not in padding:
            return x
        return F.pad(x, (0, length - x.shape[1]), value=padding[name])

    return Examples(
        inputs={n: torch.cat([padded(n, inputs[n]) for inputs, _ in rows]) for n in rows[0][0]},
        labels=torch.tensor([place.label for _, place in rows], dtype=torch.int64),
        ids=[place.id for _, place in rows],
        slices=[place.slices for _, place in rows],
    )

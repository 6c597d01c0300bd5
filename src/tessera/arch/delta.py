"""The delta: a small set of trainable tensors that changes what a frozen base computes."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor, nn

from tessera import trees
from tessera.arch import base, folder
from tessera.errors import CheckpointError, DeltaError, unknown_name

__all__ = ["KINDS", "PARTS", "Delta", "split"]

KINDS = ("lora", "ia3", "prefix", "prompt", "mask")
# What a tensor of each kind may be called after its site; "full" belongs to any kind: the head.
PARTS = {
    "lora": ("A", "B"),
    "ia3": ("gain_in", "gain_out"),
    "prefix": ("prefix",),
    "prompt": ("prompt",),
    "mask": ("values", "mask"),
}


@lru_cache(maxsize=1 << 14)  # the same few names, several times at every attach
def split(name: str) -> tuple[str, str]:
    """The site and the part of a tensor's name.

    Example:
        >>> split("encoder.0.query.A"), split("prompt")
        (('encoder.0.query', 'A'), ('', 'prompt'))
    """
    site, _, part = name.rpartition(".")
    return site, part


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Delta:
    """Small trainable tensors laid over a base that stays as it is.

    The tensors are live: `peft.fit` updates them in place. What is saved, stacked or served is a
    `snapshot`. For weights W, bias b and input x of a site:

    - "lora": ``y = W x + b + scale B A x``; ``<site>.A`` [r, in], ``<site>.B`` [out, r]. For a
      convolution A is [r, in / groups, *kernel] and B [out, r, 1, ...]; for an embedding A is
      [r, entries] and B [width, r].
    - "ia3": ``y = l * (W x + b)`` with ``<site>.gain_out`` [out], or ``y = W (l * x) + b`` with
      ``<site>.gain_in`` [in].
    - "prefix": keys and values before those of the sequence, in every layer; ``prefix``
      [tokens, layers * 2 * width].
    - "prompt": vectors before those of the sequence; ``prompt`` [tokens, width].
    - "mask": ``theta + m * values``; ``<parameter>.values`` of the parameter's shape, or [n] with
      ``<parameter>.mask``, bool, which says at which n entries.

    Any kind may carry ``<parameter>.full``, which replaces a parameter: a head.

    Attributes:
        kind: One of the above.
        tensors: By name, as above; floating, trainable unless it is a snapshot.
        scales: "lora" only: site -> scale.
        base_hash: `arch.base_hash` of the model it was made for; "" if that is not known.
        info: Plain values that travel with it: of "prefix" ``layers``, ``heads`` and, over
            `nn.MultiheadAttention`, ``sites``; for PEFT's folder ``layer_types``, site ->
            "Embedding" or "Conv2d" where it lies over one; whatever else the user adds.

    Raises:
        DeltaError: The tensors do not belong together; the message names the tensor.
        UnknownNameError: No such kind.

    Example:
        >>> delta = Delta(
        ...     kind="lora",
        ...     tensors={"fc.A": torch.ones(1, 3), "fc.B": torch.zeros(2, 1)},
        ...     scales={"fc": 2.0},
        ... )
        >>> delta
        Delta('lora', 1 sites, 5 values)
    """

    kind: str
    tensors: Mapping[str, Tensor]
    scales: Mapping[str, float] = field(default_factory=dict)
    base_hash: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    _home: list[weakref.ref[nn.Module]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("kind of delta", self.kind, KINDS)
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        scales = {site: float(scale) for site, scale in self.scales.items()}
        object.__setattr__(self, "scales", MappingProxyType(scales))
        object.__setattr__(self, "info", MappingProxyType(dict(self.info)))
        if not self.tensors:
            raise DeltaError(f"a {self.kind} delta needs at least one tensor, got none")
        for name, tensor in self.tensors.items():
            self._check(name, tensor)
        loose = sorted(set(self.scales) - {split(name)[0] for name in self.tensors})
        if loose:
            raise DeltaError(f"the delta has a scale for {loose[0]!r}, where it has no tensors")

    def _check(self, name: str, tensor: Tensor) -> None:
        site, part = split(name)
        if part not in (*PARTS[self.kind], "full") or (site and part in ("prefix", "prompt")):
            raise DeltaError(
                f"a {self.kind} delta has no tensor {name!r}: a name is a site and one of "
                f"{', '.join(PARTS[self.kind])}, or a parameter and 'full'"
            )
        if part != "mask" and not tensor.is_floating_point():
            raise DeltaError(f"the delta's {name!r} must be floating, it is {tensor.dtype}")
        beside = {"A": "B", "B": "A", "mask": "values"}.get(part)
        if beside and f"{name.removesuffix(part)}{beside}" not in self.tensors:
            raise DeltaError(f"the delta has {name!r} without its {beside!r}")
        if part == "A":
            B = self.tensors[f"{name[:-1]}B"]
            if tensor.dim() < 2 or B.dim() != tensor.dim() or B.shape[1] != tensor.shape[0]:
                raise DeltaError(
                    f"the rank of {name!r} {tuple(tensor.shape)} is not that of its B "
                    f"{tuple(B.shape)}: A is [r, in], B is [out, r]"
                )
            if site not in self.scales:
                raise DeltaError(f"the delta has {name!r}, but no scale for {site!r}")
        if part in ("prefix", "prompt") and tensor.dim() != 2:
            raise DeltaError(f"{name!r} must be [tokens, width], it is {tuple(tensor.shape)}")
        if part in ("gain_in", "gain_out") and tensor.dim() != 1:
            raise DeltaError(f"{name!r} must be one number a feature, it is {tuple(tensor.shape)}")

    @property
    def sites(self) -> tuple[str, ...]:
        """The modules it lies over, sorted; for a mask and a head, the parameters."""
        found = {split(n)[0] for n in self.tensors if n not in ("prefix", "prompt")}
        return tuple(sorted(found))

    @property
    def hash(self) -> str:
        """sha256 over everything that decides what it computes, as it is now; not the base's."""
        shape = {k: self.info[k] for k in ("layers", "heads", "sites") if k in self.info}
        head = json.dumps([self.kind, dict(self.scales), shape], sort_keys=True)
        return hashlib.sha256((head + trees.sha256(self.tensors)).encode()).hexdigest()

    def parameters(self) -> list[Tensor]:
        """The trainable tensors, in the order of their names; none in a snapshot."""
        return [t for _, t in sorted(self.tensors.items()) if t.requires_grad]

    def snapshot(self) -> Delta:
        """The same delta as it is now, detached: nothing that is trained later changes it."""
        return replace(self, tensors=trees.clone(self.tensors))

    def trainable(self) -> Delta:
        """A copy whose floating tensors can be fitted further."""
        tensors = trees.clone(self.tensors)
        return replace(
            self, tensors={n: t.requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
        )

    def to(self, device: torch.device | str) -> Delta:
        """A snapshot on another device."""
        moved = {name: t.detach().to(device, copy=True) for name, t in self.tensors.items()}
        return replace(self, tensors=moved)

    def of(self, model: nn.Module) -> Delta:
        """The same tensors, said to belong to `model`: its hash, whatever it was before.

        For a base that was trained on and whose old deltas are wanted all the same.
        """
        return replace(self, base_hash=base.base_hash(model), _home=[weakref.ref(model)])

    def model(self) -> nn.Module | None:
        """The whole model it was made for, while that lives."""
        home = self._home[0]() if self._home else None
        return None if home is None else base.root_of(home)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write Hugging Face PEFT's adapter folder, with `tessera.json` beside it, whole or not.

        Raises:
            StorageError: It could not be written; what stood there is unchanged.
            InputError: `info` holds what JSON has no word for.
        """
        folder.write(
            path,
            kind=self.kind,
            tensors=self.tensors,
            scales=self.scales,
            base_hash=self.base_hash,
            info=self.info,
            content_hash=self.hash,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Delta:
        """Read an adapter folder, PEFT's or `save`'s. Trainable.

        Raises:
            MissingDataError: There is no such folder, or no adapter in it.
            CheckpointError: It is damaged, pickled, or of a newer format.
            DeltaError: Its tensors do not belong together; the message names the tensor or field.

        Example:
            >>> import tempfile
            >>> d = Delta(kind="prompt", tensors={"prompt": torch.zeros(2, 4)})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     d.save(f"{folder}/adapter")
            ...     Delta.load(f"{folder}/adapter").hash == d.hash
            True
        """
        found = folder.read(path)
        delta = cls(
            kind=found.kind,
            tensors={n: t.requires_grad_(t.is_floating_point()) for n, t in found.tensors.items()},
            scales=found.scales,
            base_hash=found.base_hash,
            info=found.info,
        )
        if found.content_hash and found.content_hash != delta.hash:
            raise CheckpointError(
                f"{os.fspath(path)}: tessera.json is of another adapter than the tensors beside "
                "it (their hashes differ). Delete tessera.json to load the tensors as they are"
            )
        return delta

    def __repr__(self) -> str:
        values = sum(t.numel() for n, t in self.tensors.items() if split(n)[1] != "mask")
        where = f"{len(self.sites)} sites, " if self.sites else ""
        return f"Delta({self.kind!r}, {where}{values} values)"

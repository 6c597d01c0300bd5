"""Characters of many scripts: some scripts to learn to learn on, others to judge it by."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.data.glyph_build import ARRAYS
from tessera.data.readers import read_npz
from tessera.errors import InputError, MissingDataError, unknown_name
from tessera.random import generator, key

__all__ = ["BUNDLED", "Glyphs", "glyphs", "split_of"]

BUNDLED = Path(__file__).parent / "bundled" / "glyphs.npz"

Split = Literal["train", "validation", "test"]
_SHARES = {"train": 60, "validation": 15, "test": 25}  # percent of the scripts
# How far a variant goes; the grid of a picture spans [-1, 1].
_TURN = math.radians(15)
_SHEAR = 0.2
_SCALE = (0.8, 1.15)
_SHIFT = 0.15
_BEND = 0.08
_THINNER, _THICKER = 0.5, 1.0  # of the way to what the darkest or the lightest neighbour is
_NOISE = 0.05
_CHUNK = 4096  # pictures warped at a time


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Glyphs:
    """Pictures of characters, for `data.episodes`.

    Attributes:
        x: float32 in [0, 1], [n, 1, size, size]; ink is 1.
        y: int64 [n]: which character, 0 .. C-1.
        characters: Class -> the character.
        scripts: Class -> its script.

    Example:
        >>> held_out = glyphs("test", variants=1)
        >>> held_out.characters[0], held_out.scripts[0]
        ('𔐂', 'AnatolianHieroglyphs')
    """

    x: Tensor
    y: Tensor
    characters: tuple[str, ...]
    scripts: tuple[str, ...]


def glyphs(
    split: Split = "train",
    *,
    variants: int = 20,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> Glyphs:
    """The characters of a split's scripts, each drawn in some variants.

    A variant is one of the character's faces (sans, serif, bold, as there are), turned, sheared,
    stretched, shifted and bent a little, with a thicker or thinner stroke and some noise. No two
    splits share a script, and which split a script is in does not depend on what else there is.

    Args:
        split: "train", "validation" (choose everything by it) or "test".
        variants: Pictures of each character, >= 1; the faces take turns.
        seed: Of the variants.
        path: A file made by `data.build_glyphs`; None takes the one that ships with Tessera: up to
            20 characters of 142 scripts.

    Returns:
        `Glyphs`, ordered by script, character and variant.

    Raises:
        UnknownNameError: No such split.
        MissingDataError: No file at `path`.
        InputError: The file is damaged or no such file, holds no script of this split, or
            `variants` is out of range.

    Source:
        Pictures: Noto fonts (SIL Open Font License 1.1). The task is that of Omniglot: Lake,
        Salakhutdinov & Tenenbaum 2015, Science 350:1332.

    Example:
        >>> learned, judged = glyphs("train", variants=1), glyphs("test", variants=2)
        >>> judged.x.shape[1:], set(learned.scripts) & set(judged.scripts)
        (torch.Size([1, 28, 28]), set())
    """
    if split not in _SHARES:
        raise unknown_name("split", split, list(_SHARES))
    if isinstance(variants, bool) or not isinstance(variants, int) or variants < 1:
        raise InputError(f"glyphs needs variants >= 1, got {variants!r}")
    file = BUNDLED if path is None else Path(path)
    if not file.is_file():
        raise MissingDataError(f"there are no glyphs at {file}; data.build_glyphs(path) makes some")
    pictures, characters, scripts = _checked(read_npz(file, ARRAYS), file)
    mine = np.array([split_of(str(name)) == split for name in scripts], bool)[characters[:, 0]]
    if not mine.any():
        raise InputError(f"{file} has no script of the split {split!r}; build it with more scripts")
    classes, y = np.unique(characters[mine], axis=0, return_inverse=True)
    rows = _faces_in_turn(y.reshape(-1), variants)
    draw = generator(seed, "glyphs", split)
    base = torch.from_numpy(pictures[mine]).unsqueeze(1)
    parts = [_warped(base[part].float() / 255, draw) for part in torch.split(rows, _CHUNK)]
    return Glyphs(
        x=torch.cat(parts),
        y=torch.arange(len(classes)).repeat_interleave(variants),
        characters=tuple(chr(c) for _, c in classes.tolist()),
        scripts=tuple(str(scripts[s]) for s, _ in classes.tolist()),
    )


def split_of(script: str) -> Split:
    """Which split a script belongs to, by its name alone.

    Example:
        >>> split_of("Thai"), split_of("Adlam"), split_of("Latin")
        ('train', 'validation', 'test')
    """
    place = key(0, "glyphs", "split", script) % 100
    if place < _SHARES["train"]:
        return "train"
    return "validation" if place < _SHARES["train"] + _SHARES["validation"] else "test"


def _faces_in_turn(y: np.ndarray[Any, np.dtype[np.int64]], variants: int) -> Tensor:
    """Which picture each variant of each class starts from; those of a class are neighbours."""
    order = np.argsort(y, kind="stable")
    sizes = np.bincount(y)
    place = np.arange(variants) % sizes[:, None]
    return torch.from_numpy(order[(np.cumsum(sizes) - sizes)[:, None] + place].ravel())


def _warped(pictures: Tensor, draw: torch.Generator) -> Tensor:
    """Variants of pictures [n, 1, size, size] in [0, 1]."""
    n = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=draw)

    weight = uniform(-_THINNER, _THICKER, 1, 1, 1)
    thick = F.max_pool2d(pictures, 3, 1, 1) - pictures
    thin = pictures + F.max_pool2d(-pictures, 3, 1, 1)
    inked = pictures + weight.clamp(min=0) * thick + weight.clamp(max=0) * thin

    turn, shear = uniform(-_TURN, _TURN), uniform(-_SHEAR, _SHEAR)
    wide, high = uniform(*_SCALE), uniform(*_SCALE)
    cos, sin = turn.cos(), turn.sin()
    shift = uniform(-_SHIFT, _SHIFT, 2)
    # Output pixel -> where its ink comes from, in [-1, 1].
    across = torch.stack([cos / wide, (shear * cos - sin) / high, shift[:, 0]], 1)
    down = torch.stack([sin / wide, (shear * sin + cos) / high, shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(pictures.shape), align_corners=False)
    bent = _BEND * torch.randn(n, 2, 4, 4, generator=draw)
    smooth = F.interpolate(bent, size=pictures.shape[2:], mode="bicubic", align_corners=True)
    seen = F.grid_sample(inked, grid + smooth.permute(0, 2, 3, 1), align_corners=False)
    noisy = seen + _NOISE * torch.randn(seen.shape, generator=draw)
    return (noisy.clamp(0, 1) * 255).round() / 255


def _checked(
    arrays: Sequence[np.ndarray[Any, Any]], file: Path
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[str]]:
    """The pictures, (script, character) of each, and the scripts' names."""
    x, character, script, scripts, _ = arrays
    n = len(x) if x.ndim == 3 else 0
    fits = (
        n > 0
        and x.dtype == np.uint8
        and x.shape[1] == x.shape[2]
        and character.shape == script.shape == (n,)
        and character.dtype == script.dtype == np.int32
        and scripts.ndim == 1
        and scripts.dtype.kind == "U"
        and 0 <= script.min() <= script.max() < len(scripts)
        and 0 <= character.min() <= character.max() < 0x110000
    )
    if not fits:
        raise InputError(f"{file} was not made by data.build_glyphs, or is damaged; build it anew")
    return x, np.stack([script, character], 1), [str(name) for name in scripts]

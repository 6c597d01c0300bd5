"""Pictures of characters, rendered from fonts: the few-shot data set behind `data.glyphs`."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, final

import numpy as np
import numpy.typing as npt

from tessera.data.readers import read_npz
from tessera.errors import InputError, MissingDataError
from tessera.files import write_whole
from tessera.random import permutation

__all__ = ["ARRAYS", "FONTS", "build_glyphs"]

FONTS = Path("/usr/share/fonts/truetype/noto")
ARRAYS = ("x", "character", "script", "scripts", "recipe")

_BUILDER = 1  # counts changes of what is drawn
_EM = 96  # pixels; large, so that the outlines and not the hints make the small picture
_MARGIN = 3
_FEWEST = 5  # characters of a script: what an episode of five takes
_CATEGORIES = frozenset(("Lu", "Ll", "Lo", "Nd", "Nl", "No"))  # no marks: they need a letter
_FACE = re.compile(r"Noto(Sans|Serif)([A-Za-z]*)-(Regular|Bold)\.ttf")
# Of the fonts' names those that are not how Unicode begins the names of the characters.
_NAMES = {
    "AnatolianHieroglyphs": "ANATOLIAN HIEROGLYPH",
    "CanadianAboriginal": "CANADIAN SYLLABICS",
    "EgyptianHieroglyphs": "EGYPTIAN HIEROGLYPH",
    "IndicSiyaqNumbers": "INDIC SIYAQ",
    "MayanNumerals": "MAYAN NUMERAL",
    "NKo": "NKO",
    "PhagsPa": "PHAGS-PA",
}
_IN_THE_PLAIN_FONT = ("Latin", "Greek", "Cyrillic")

_ALIKE = 5  # of the 100 pixels of a look: Latin, Greek and Cyrillic share letters
_Image: TypeAlias = npt.NDArray[np.uint8]


class _Glyph(NamedTuple):
    """One character with its pictures, one a face that has it."""

    character: int
    pictures: list[_Image]


def build_glyphs(
    path: str | os.PathLike[str],
    *,
    fonts: str | os.PathLike[str] = FONTS,
    scripts: Iterable[str] | None = None,
    per_script: int = 40,
    size: int = 28,
    seed: int = 0,
) -> Path:
    """Render the characters of many scripts into an npz file that `data.glyphs` reads.

    A class is a character: a letter or a number of its script that has no accent, that a font
    really has, and that looks like no other class. It is drawn once for each face there is (sans
    and serif, regular and bold), as large as fits, in 16 shades. A file that was built with these
    very arguments, from whatever folder of fonts, is left as it is.

    Args:
        path: Where to; written whole or not at all.
        fonts: A folder with the Noto fonts; Debian's ``fonts-noto-core`` puts them here.
        scripts: Which, by the fonts' names ("Adlam", "Latin"); None takes all there are.
        per_script: Most characters of a script, >= 5; chosen by `seed` where it has more. A
            script with fewer than 5 is left out.
        size: Pixels a side, >= 12.
        seed: Of that choice.

    Returns:
        `path`.

    Raises:
        MissingDataError: The fonts are not here, or Pillow is not.
        InputError: A number is out of its range, no script has enough characters, a font is
            damaged, or what stands at `path` is no file of glyphs.
        StorageError: The file could not be written.

    Example:
        >>> import shutil, tempfile
        >>> from tessera.data.glyph_sets import BUNDLED, glyphs
        >>> path = shutil.copy(BUNDLED, tempfile.mkdtemp())
        >>> path = build_glyphs(path, per_script=20)  # as this one was made: nothing is to do
        >>> len(glyphs("test", path=path, variants=1).characters)
        766
    """
    if per_script < _FEWEST or size < 4 * _MARGIN:
        raise InputError(
            f"build_glyphs needs per_script >= {_FEWEST} and size >= {4 * _MARGIN}, got "
            f"{per_script} and {size}"
        )
    wanted = None if scripts is None else sorted(set(scripts))
    recipe = json.dumps(
        {
            "builder": _BUILDER,
            "scripts": wanted,
            "per_script": per_script,
            "size": size,
            "seed": seed,
        }
    )
    target = Path(path)
    if target.exists() and str(read_npz(target, ["recipe"])[0]) == recipe:
        return target
    drawers = _drawers(Path(fonts), wanted)
    characters = _characters()
    seen: list[int] = []
    found: dict[str, list[_Glyph]] = {}
    for script, faces in drawers.items():
        prefix = _prefix(script)
        own = [c for name, c in characters if name.startswith(prefix)]
        order = permutation(len(own), seed, "glyphs", script).tolist()
        fresh = _fresh((own[i] for i in order), faces, size, seen)
        chosen = sorted(islice(fresh, per_script), key=lambda glyph: glyph.character)
        if len(chosen) >= _FEWEST:
            found[script] = chosen
    if not found:
        raise InputError(
            f"build_glyphs: none of {', '.join(drawers)} has {_FEWEST} characters of its own"
        )
    write_whole(target, lambda file: _write(file, found, recipe))
    return target


def _drawers(folder: Path, wanted: list[str] | None) -> dict[str, list[_Drawer]]:
    """Script -> its faces, by name; sans before serif, regular before bold."""
    files: dict[str, list[tuple[str, int, Path]]] = {}
    for file in folder.glob("Noto*.ttf"):
        if match := _FACE.fullmatch(file.name):
            family, script, weight = match.groups()
            for name in [script] if script else _IN_THE_PLAIN_FONT:
                files.setdefault(name, []).append((family, 0 if weight == "Regular" else 1, file))
    names = sorted(files) if wanted is None else wanted
    lacking = [name for name in names if name not in files]
    if lacking or not files:
        what = f"no font for {', '.join(lacking)}" if files else "no Noto fonts"
        raise MissingDataError(
            f"build_glyphs finds {what} in {folder}; they come with Debian's package "
            "fonts-noto-core (apt install fonts-noto-core), or name another folder: fonts=DIR"
        )
    return {name: [_drawer(file) for *_, file in sorted(files[name])] for name in names}


def _drawer(file: Path) -> _Drawer:
    fonts = _pillow("ImageFont")
    # Bytes: given a path that it cannot read, Pillow takes the system's font of that name.
    raw = io.BytesIO(file.read_bytes())
    try:
        # The basic layout draws a character by itself, whatever else is installed.
        return _Drawer(fonts.truetype(raw, _EM, layout_engine=fonts.Layout.BASIC))
    except OSError as error:
        raise InputError(f"{file} is no readable font ({error}); install it again") from error


def _pillow(part: str) -> Any:
    """A module of Pillow."""
    try:
        return importlib.import_module(f"PIL.{part}")
    except ImportError as error:
        raise MissingDataError(
            "build_glyphs draws with Pillow, which is not installed: pip install "
            "'tessera-lifelong[glyphs]'. data.glyphs() without path= needs neither it nor fonts"
        ) from error


def _characters() -> list[tuple[str, int]]:
    """(Unicode name, code point) of the letters and numbers that are not put together of others."""
    return [
        (unicodedata.name(chr(c), ""), c)
        for c in range(0x20, 0x32000)
        if unicodedata.category(chr(c)) in _CATEGORIES and not unicodedata.decomposition(chr(c))
    ]


def _prefix(script: str) -> str:
    words = " ".join(re.findall("[A-Z][a-z]*", script)).upper()
    return _NAMES.get(script, words) + " "


def _fresh(
    characters: Iterable[int], faces: list[_Drawer], size: int, seen: list[int]
) -> Iterator[_Glyph]:
    """The characters that look like none in `seen`, which those that are taken join."""
    for character in characters:
        drawn = [face.draw(chr(character), size) for face in faces]
        pictures = [picture for picture in drawn if picture is not None]
        looks = [_look(picture) for picture in pictures]
        if pictures and all((a ^ b).bit_count() > _ALIKE for a in looks for b in seen):
            seen += looks
            yield _Glyph(character, pictures)


def _look(picture: _Image) -> int:
    """The picture at 10 x 10, black or white: 100 bits."""
    image = _pillow("Image")
    small = image.fromarray(picture).resize((10, 10), image.Resampling.BOX)
    return int.from_bytes(np.packbits(np.asarray(small) > 96).tobytes())


@final
class _Drawer:
    """A font that draws single characters."""

    def __init__(self, font: Any) -> None:
        self._font = font
        # What a font shows for a character that it does not have; this one no font has.
        self._lacking = self._cut("\U0010ffff")

    def _cut(self, character: str) -> Any:
        """As large as the character, 0 .. 255; None: it is empty."""
        left, top, right, bottom = self._font.getbbox(character)
        room = math.ceil(right - left) + 2, math.ceil(bottom - top) + 2
        whole = _pillow("Image").new("L", room)
        _pillow("ImageDraw").Draw(whole).text(
            (1 - left, 1 - top), character, fill=255, font=self._font
        )
        box = whole.getbbox()
        return whole.crop(box) if box else None

    def draw(self, character: str, size: int) -> _Image | None:
        """[size, size], as large as fits within the margin; None: it is empty or not there."""
        cut = self._cut(character)
        if cut is None or cut == self._lacking:
            return None
        room = size - 2 * _MARGIN
        width, height = (max(1, round(room * side / max(cut.size))) for side in cut.size)
        small = cut.resize((width, height), _pillow("Image").Resampling.BOX)
        picture = np.zeros((size, size), np.uint8)
        top, left = (size - height) // 2, (size - width) // 2
        shades = np.asarray(small, np.float32) / 17
        picture[top : top + height, left : left + width] = shades.round() * 17
        return picture


def _write(file: BinaryIO, found: dict[str, list[_Glyph]], recipe: str) -> None:
    glyphs = [(i, g) for i, own in enumerate(found.values()) for g in own]
    rows = [(picture, g.character, i) for i, g in glyphs for picture in g.pictures]
    np.savez_compressed(
        file,
        x=np.stack([picture for picture, _, _ in rows]),
        character=np.array([character for _, character, _ in rows], np.int32),
        script=np.array([script for _, _, script in rows], np.int32),
        scripts=np.array(list(found)),
        recipe=np.array(recipe),
    )

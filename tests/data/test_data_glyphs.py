"""Glyphs: the file that ships, the builder that made it, and the variants drawn from it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tessera.data import glyph_build
from tessera.data.few_shot import episodes
from tessera.data.glyph_build import FONTS, build_glyphs
from tessera.data.glyph_sets import BUNDLED, glyphs, split_of
from tessera.errors import InputError, MissingDataError, UnknownNameError

SPLITS = ("train", "validation", "test")
SHIPPED = "5f07dd4b42a64367ea13c4c115bdbc61d70d3830e8fe0e1fd6ac3408f63cfa3b"

needs_fonts = pytest.mark.skipif(
    not FONTS.is_dir() or importlib.util.find_spec("PIL") is None,
    reason="needs Pillow and the Debian package: apt install fonts-noto-core",
)


def digest(path: Path) -> str:
    script = Path(__file__).parents[1] / "golden" / "make_glyphs.py"
    spec = importlib.util.spec_from_file_location("make_glyphs", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.digest(path)


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as held:
        return dict(held)


# --- what ships


def test_the_file_that_ships_is_the_one_that_was_measured():
    assert digest(BUNDLED) == SHIPPED
    assert BUNDLED.stat().st_size < 600_000


@pytest.mark.slow
@needs_fonts
def test_the_builder_makes_the_file_that_ships(tmp_path):
    from PIL import features

    if features.version("freetype2") != "2.14.3":
        pytest.skip("another FreeType than that of Pillow 13.0.0 may draw another shade")
    assert digest(build_glyphs(tmp_path / "again.npz", per_script=20)) == SHIPPED


# --- splits and variants


def test_splits_share_no_script_no_character_and_no_picture():
    held = [glyphs(split, variants=1) for split in SPLITS]
    assert [len(g.characters) for g in held] == [1603, 377, 766]
    for kind in (lambda g: g.scripts, lambda g: g.characters):
        sets = [set(kind(g)) for g in held]
        assert len(sets[0] | sets[1] | sets[2]) == sum(map(len, sets))
    shipped = arrays(BUNDLED)
    first = np.unique(shipped["character"], return_index=True)[1]
    assert len({x.tobytes() for x in shipped["x"][first]}) == 1603 + 377 + 766


def test_a_class_is_one_character_of_one_script():
    held = glyphs("validation", variants=3)
    assert held.x.shape == (3 * 377, 1, 28, 28)
    assert held.y.tolist() == [c for c in range(377) for _ in range(3)]
    assert (held.x.dtype, held.y.dtype) == (torch.float32, torch.int64)
    assert held.x.min() == 0
    assert held.x.max() == 1
    shipped = arrays(BUNDLED)
    script = dict(zip(shipped["character"].tolist(), shipped["script"].tolist(), strict=True))
    for character, name in zip(held.characters, held.scripts, strict=True):
        assert shipped["scripts"][script[ord(character)]] == name
        assert split_of(name) == "validation"


def test_variants_are_seeded_to_the_bit_and_no_two_are_the_same():
    one, again, other = glyphs("validation"), glyphs("validation"), glyphs("validation", seed=1)
    assert torch.equal(one.x, again.x)
    assert not torch.equal(one.x, other.x)
    assert len({x.numpy().tobytes() for x in one.x}) == len(one.y)


def test_variants_do_not_depend_on_the_number_of_threads():
    one = glyphs("validation", variants=2).x
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(glyphs("validation", variants=2).x, one)
    finally:
        torch.set_num_threads(before)


def test_a_variant_looks_more_like_its_own_character_than_like_others():
    held = glyphs("validation", variants=8)
    mean = held.x.flatten(1).view(377, 8, -1)
    reference, asked = mean[:, :7].mean(1), mean[:, 7]
    right = (torch.cdist(asked, reference).argmin(1) == torch.arange(377)).double().mean()
    # Of 377; chance is 0.3 %. Far from all, or there would be nothing to learn.
    assert 0.2 < right < 0.8, right


def test_the_faces_of_a_character_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr("tessera.data.glyph_sets._warped", lambda pictures, draw: pictures)
    shipped = arrays(BUNDLED)
    held = glyphs("test", variants=5)
    for c in (0, 100, 765):
        own = shipped["x"][shipped["character"] == ord(held.characters[c])]
        seen = (held.x[held.y == c, 0] * 255).round().byte().numpy()
        assert np.array_equal(seen, own[np.arange(5) % len(own)])


def test_a_split_does_not_depend_on_what_else_there_is():
    names = [str(name) for name in arrays(BUNDLED)["scripts"]]
    assert {s: sum(split_of(n) == s for n in names) for s in SPLITS} == {
        "train": 83,
        "validation": 19,
        "test": 40,
    }
    assert (split_of("Latin"), split_of("Cyrillic"), split_of("Greek")) == ("test",) * 3


def test_glyphs_make_episodes():
    support, query = episodes(glyphs("validation"), tasks=2)[0]
    assert (support.x.shape, query.x.shape) == ((2, 5, 1, 28, 28), (2, 75, 1, 28, 28))


# --- the builder


@needs_fonts
def test_a_build_is_deterministic_seeded_and_not_repeated(tmp_path):
    options = {"scripts": ["Runic", "Ogham", "Latin"], "per_script": 12, "size": 20}
    path = build_glyphs(tmp_path / "a.npz", **options)
    first = arrays(path)
    assert first["scripts"].tolist() == ["Latin", "Ogham", "Runic"]
    assert first["x"].shape[1:] == (20, 20)
    for script in range(3):
        own = set(first["character"][first["script"] == script].tolist())
        assert 5 <= len(own) <= 12
    stamp = path.stat().st_mtime_ns
    build_glyphs(path, **options)
    assert path.stat().st_mtime_ns == stamp  # there already
    other = arrays(build_glyphs(tmp_path / "b.npz", **options))
    assert all(np.array_equal(first[name], other[name]) for name in first)
    build_glyphs(path, **options | {"seed": 1})  # other arguments: built anew, in its place
    assert not np.array_equal(arrays(path)["character"], first["character"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


@needs_fonts
def test_a_character_is_drawn_whole_centred_and_only_if_the_font_has_it(tmp_path):
    from PIL import ImageFont

    drawer = glyph_build._Drawer(
        ImageFont.truetype(FONTS / "NotoSans-Regular.ttf", 96, layout_engine=0)
    )
    assert drawer.draw("字", 28) is None  # the font's box for what it has not
    assert drawer.draw(" ", 28) is None  # empty
    for character in "lWo—":
        ink = drawer.draw(character, 28) > 0
        rows, columns = ink.any(1).nonzero()[0], ink.any(0).nonzero()[0]
        edges = [rows[0], 27 - rows[-1], columns[0], 27 - columns[-1]]
        assert min(edges) == 3  # as large as fits
        assert abs(edges[0] - edges[1]) <= 1
        assert abs(edges[2] - edges[3]) <= 1
    assert set(np.unique(drawer.draw("W", 28)) % 17) == {0}  # 16 shades


@needs_fonts
def test_look_alikes_are_one_class(tmp_path):
    path = build_glyphs(
        tmp_path / "g.npz", scripts=["Latin", "Greek", "Cyrillic"], per_script=10**4
    )
    held = {chr(c) for c in arrays(path)["character"]}
    assert len(held & set("AΑА")) == 1  # Latin, Greek, Cyrillic
    assert len(held & set("PΡР")) == 1
    assert len(held & set("ЖПΩ")) == 3
    assert not held & set("éÄйΆ")  # put together of others


def test_what_cannot_be_built_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    path = tmp_path / "g.npz"
    with pytest.raises(InputError, match=r"per_script >= 5 and size >= 12, got 4 and 28"):
        build_glyphs(path, per_script=4)
    with pytest.raises(InputError, match=r"got 40 and 11"):
        build_glyphs(path, size=11)
    with pytest.raises(MissingDataError, match=r"no Noto fonts in .*apt install fonts-noto-core"):
        build_glyphs(path, fonts=tmp_path)
    (tmp_path / "NotoSansOgham-Regular.ttf").touch()
    with pytest.raises(MissingDataError, match=r"no font for Klingon in .*fonts=DIR"):
        build_glyphs(path, fonts=tmp_path, scripts=["Ogham", "Klingon"])
    monkeypatch.setitem(sys.modules, "PIL.ImageFont", None)
    with pytest.raises(MissingDataError, match=r"Pillow.*pip install 'tessera-lifelong\[glyphs\]'"):
        build_glyphs(path, fonts=tmp_path)
    assert not path.exists()


@needs_fonts
def test_a_damaged_font_is_named(tmp_path):
    (tmp_path / "NotoSansOgham-Regular.ttf").write_bytes(b"no font")
    with pytest.raises(InputError, match=r"NotoSansOgham-Regular.ttf is no readable font"):
        build_glyphs(tmp_path / "g.npz", fonts=tmp_path)


@needs_fonts
def test_scripts_without_enough_characters_are_refused(tmp_path):
    with pytest.raises(InputError, match="none of Math has 5 characters of its own"):
        build_glyphs(tmp_path / "g.npz", scripts=["Math"])


def test_a_file_of_something_else_is_not_built_over(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, x=np.arange(3))
    before = path.read_bytes()
    with pytest.raises(InputError, match="recipe"):
        build_glyphs(path)
    assert path.read_bytes() == before


# --- bad input


def test_no_such_split_file_or_number(tmp_path):
    with pytest.raises(UnknownNameError, match="train, validation, test"):
        glyphs("dev")
    for variants in (0, True, 2.0):
        with pytest.raises(InputError, match="variants >= 1"):
            glyphs(variants=variants)
    with pytest.raises(MissingDataError, match=r"data.build_glyphs\(path\)"):
        glyphs(path=tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", np.zeros((4445, 28, 27), np.uint8)),
        ("x", np.zeros((4445, 28, 28), np.float32)),
        ("x", np.zeros((0, 28, 28), np.uint8)),
        ("script", np.full(4445, 142, np.int32)),
        ("script", np.full(4445, -1, np.int32)),
        ("character", np.full(4445, 0x110000, np.int32)),
        ("character", np.zeros(4444, np.int32)),
        ("scripts", np.arange(142)),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, value):
    path = tmp_path / "g.npz"
    np.savez(path, **arrays(BUNDLED) | {name: value})
    with pytest.raises(InputError, match=r"was not made by data\.build_glyphs, or is damaged"):
        glyphs(path=path)


def test_a_file_without_a_script_of_the_split_says_so(tmp_path):
    path = tmp_path / "g.npz"
    names = np.array([f"Thai{'' if i == 0 else i}" for i in range(142)])
    only = arrays(BUNDLED) | {"scripts": names, "script": np.zeros(4445, np.int32)}
    np.savez(path, **only)
    assert set(glyphs("train", path=path, variants=1).scripts) == {"Thai"}
    with pytest.raises(InputError, match="has no script of the split 'test'"):
        glyphs("test", path=path)

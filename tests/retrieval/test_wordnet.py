"""The reader of WordNet's data files: by hand, by damage, and on Debian's files where they are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tessera.errors import InputError, MissingDataError, UnknownNameError
from tessera.retrieval import wordnet
from tessera.retrieval.wordnet import wordnet_glosses

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"


def data_file(folder: Path, entries: list[str], part: str = "noun") -> Path:
    """A data file whose entries say where they stand."""
    text = LICENCE
    for entry in entries:
        text += f"{len(text.encode()):08d} {entry}  \n"
    file = folder / f"data.{part}"
    file.write_text(text, "utf-8")
    return file


DOG = "05 n 02 dog 0 domestic_dog 0 002 @ 00001740 n 0000 ~ 00001740 n 0101 | a canid"


def test_an_entry_by_hand(tmp_path: Path) -> None:
    data_file(
        tmp_path,
        [
            DOG + '; man\'s friend; "the dog barked"; "he kept dogs"',
            "13 n 01 café_crème 0 000 | coffee with cream",
        ],
    )
    data_file(tmp_path, ["00 s 01 galore(ip) 0 000 | in great numbers: any number"], "adj")
    data_file(tmp_path, ["29 v 01 doze 0 000 01 + 02 00 | sleep lightly"], "verb")
    dog, coffee = wordnet_glosses(tmp_path, parts=["noun"])
    assert dog.lemmas == ("dog", "domestic dog")
    assert dog.category == "noun.animal"
    assert dog.definition == "a canid; man's friend"
    assert dog.examples == ("the dog barked", "he kept dogs")
    assert (coffee.lemmas, coffee.category) == (("café crème",), "noun.food")
    assert coffee.examples == ()
    adj, verb = wordnet_glosses(tmp_path, parts=["adj", "verb"])
    assert (adj.lemmas, adj.category) == (("galore",), "adj.all")
    assert adj.definition == "in great numbers: any number"
    assert (verb.category, verb.definition) == ("verb.body", "sleep lightly")


BAD = {
    "no gloss": "05 n 01 dog 0 000",
    "no words": "05 n 00 000 | a canid",
    "fewer words than it says": "05 n 0f dog 0 000 | a canid",
    "a category there is not": "45 n 01 dog 0 000 | a canid",
    "a type there is not": "05 x 01 dog 0 000 | a canid",
    "no number": "xx n 01 dog 0 000 | a canid",
    "other digits": "٠٥ n 01 dog 0 000 | a canid",
    "nothing": "",
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_entry_is_refused_with_its_line(what: str, tmp_path: Path) -> None:
    data_file(tmp_path, [DOG, BAD[what]])
    with pytest.raises(InputError, match=r"data\.noun, line 3: "):
        wordnet_glosses(tmp_path, parts=["noun"])


def test_damage_is_refused(tmp_path: Path) -> None:
    file = data_file(tmp_path, [DOG, DOG, DOG])
    whole = file.read_bytes()
    assert len(wordnet_glosses(tmp_path, parts=["noun"])) == 3
    second = whole.index(b"dog", whole.index(b"dog 0 domestic") + 20)
    for broken, message in (
        (whole[:second] + whole[second + 1 :], "line 4: the entry says it stands at byte"),
        (whole[:second] + b"x" + whole[second:], "line 4: the entry says it stands at byte"),
        (whole[len(LICENCE) :], "line 1: the entry says it stands at byte"),
        (whole[:-10], "line 4: no entry"),
        (whole[:second] + b"\xff" + whole[second + 1 :], "line 3: no text"),
        (whole[:second] + b"\n" + whole[second + 1 :], "line 3: no entry"),
        (b"PK\x03\x04" + bytes(range(128, 228)) + b"\n", "line 1: no "),
    ):
        file.write_bytes(broken)
        with pytest.raises(InputError, match=message):
            wordnet_glosses(tmp_path, parts=["noun"])


def test_what_is_not_there_and_what_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_file(tmp_path, [DOG])
    with pytest.raises(MissingDataError, match=r"no .*data\.verb; .*apt-get install wordnet-base"):
        wordnet_glosses(tmp_path)
    with pytest.raises(UnknownNameError, match="choose one of: noun, verb, adj, adv"):
        wordnet_glosses(tmp_path, parts=["nouns"])
    monkeypatch.setattr(wordnet, "_MAX_BYTES", 100)
    with pytest.raises(InputError, match="more than 100 bytes"):
        wordnet_glosses(tmp_path, parts=["noun"])


@pytest.mark.skipif(
    not Path(wordnet._FOLDER).is_dir(),
    reason="WordNet is not installed: apt-get install wordnet-base",
)
def test_debians_files_hold_what_wordnet_3_0_has() -> None:
    glosses = wordnet_glosses()
    parts = Counter(g.category.split(".")[0] for g in glosses)
    assert parts == {"noun": 82_115, "verb": 13_767, "adj": 18_156, "adv": 3_621}  # wnstats(7)
    assert len({g.category for g in glosses}) == 45
    assert all(g.definition and all(g.lemmas) for g in glosses)
    of = {g.lemmas[0]: g for g in glosses if g.category == "noun.animal"}
    assert of["dog"].lemmas == ("dog", "domestic dog", "Canis familiaris")
    assert of["dog"].examples == ("the dog barked all night",)
    assert of["dog"].definition.startswith("a member of the genus Canis")

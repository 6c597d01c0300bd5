"""WordNet's glosses: a hundred thousand short passages of real text, from Debian's wordnet-base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from tessera.errors import InputError, MissingDataError, unknown_name

__all__ = ["Gloss", "wordnet_glosses"]

_FOLDER = "/usr/share/wordnet"
_PARTS = ("noun", "verb", "adj", "adv")
_CATEGORIES = (  # by the number of the lexicographer's file, wordnet(5)'s lexnames
    *("adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact"),
    *("noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event"),
    *("noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object"),
    *("noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process"),
    *("noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time"),
    *("verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition"),
    *("verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion"),
    *("verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather"),
    "adj.ppl",
)
_MAX_BYTES = 1 << 26  # data.noun has 15 MB
_HEAD = re.compile(r"(\d{8}) (\d\d) ([nvasr]) ([0-9a-f]{2}) (.*)", re.ASCII | re.DOTALL)
_EXAMPLE = re.compile(r'"([^"]*)"')


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gloss:
    """One meaning: the words that have it, and what the dictionary says of it.

    Attributes:
        lemmas: The words, at least one; spaces within, as in "guide dog".
        category: The lexicographers' file, e.g. "noun.animal".
        definition: What it means, without the examples.
        examples: Sentences or phrases that use one of the words; often none.

    Example:
        >>> gloss = Gloss(
        ...     lemmas=("dog",), category="noun.animal", definition="a canid", examples=()
        ... )
        >>> f"{gloss.lemmas[0]}: {gloss.definition}"
        'dog: a canid'
    """

    lemmas: tuple[str, ...]
    category: str
    definition: str
    examples: tuple[str, ...]


def wordnet_glosses(
    path: str | Path | None = None, *, parts: Sequence[str] = _PARTS
) -> list[Gloss]:
    """The meanings in WordNet's data files, in their order.

    Args:
        path: The folder of data.noun, data.verb, data.adj and data.adv; None: Debian's.
        parts: Which of "noun", "verb", "adj", "adv", in this order.

    Returns:
        117,659 of them from all of WordNet 3.0, 82,115 nouns among them.

    Raises:
        MissingDataError: A file is not there.
        InputError: A file is no data file of WordNet's, or damaged; the line is named.
        UnknownNameError: No such part.

    Source:
        Fellbaum (ed.) 1998, "WordNet: An Electronic Lexical Database", MIT Press; wndb(5).

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "data.noun").write_text(
        ...     '00000000 05 n 02 dog 0 domestic_dog 0 000 | a canid; "the dog barked"  \\n')
        >>> [gloss] = wordnet_glosses(folder, parts=["noun"])
        >>> gloss.lemmas, gloss.category, gloss.definition, gloss.examples
        (('dog', 'domestic dog'), 'noun.animal', 'a canid', ('the dog barked',))
    """
    folder = Path(_FOLDER if path is None else path)
    for part in parts:
        if part not in _PARTS:
            raise unknown_name("part of WordNet", part, _PARTS)
        if not (folder / f"data.{part}").is_file():
            raise MissingDataError(
                f"retrieval.wordnet_glosses: there is no {folder / f'data.{part}'}; Debian's "
                "wordnet-base has it (apt-get install wordnet-base), or give the folder as path="
            )
    return [gloss for part in parts for gloss in _glosses(folder / f"data.{part}")]


def _glosses(file: Path) -> Iterator[Gloss]:
    if file.stat().st_size > _MAX_BYTES:
        raise InputError(f"{file} has more than {_MAX_BYTES} bytes: it is no file of WordNet's")
    offset = 0
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.startswith(b"  "):  # the licence, before the first entry
            yield _gloss(line, offset, f"{file}, line {number}")
        offset += len(line)


def _gloss(line: bytes, offset: int, where: str) -> Gloss:
    """One line: its offset, category, type, words, pointers (not read), and the gloss."""
    try:
        data, bar, text = line.decode("utf-8").partition(" | ")
        head = _HEAD.fullmatch(data)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: no text ({error})") from error
    if head is None or not bar or not line.endswith(b"\n"):
        raise InputError(f"{where}: no entry of WordNet's: {line[:60]!r}")
    if int(head[1]) != offset:
        raise InputError(
            f"{where}: the entry says it stands at byte {int(head[1])}, and stands at {offset}; "
            "something before it was lost or added. Install wordnet-base again"
        )
    count, fields = int(head[4], 16), head[5].split(" ")
    lemmas = tuple(
        re.sub(r"\((?:a|p|ip)\)$", "", w).replace("_", " ") for w in fields[: 2 * count : 2]
    )
    if int(head[2]) >= len(_CATEGORIES) or not 1 <= count == len(lemmas) or "" in lemmas:
        raise InputError(
            f"{where}: category {head[2]} (below {len(_CATEGORIES)}) and {count} words do not fit "
            f"the entry {line[:60]!r}"
        )
    definition = _EXAMPLE.sub("", text)
    return Gloss(
        lemmas=lemmas,
        category=_CATEGORIES[int(head[2])],
        definition=re.sub(r"[\s;]*;[\s;]*", "; ", definition).strip(" ;\n"),
        examples=tuple(e.strip() for e in _EXAMPLE.findall(text) if e.strip()),
    )

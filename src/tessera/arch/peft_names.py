"""A delta's tensors <-> the configuration and the tensors' names of Hugging Face PEFT.

PEFT 0.21's names, after ``base_model.model.`` (``base_model.`` beside a prompt)::

    <site>.lora_A.weight [r, in]      <site>.lora_B.weight [out, r]
    <site>.lora_embedding_A [r, n]    <site>.lora_embedding_B [dim, r]
    <site>.ia3_l [out, 1]; before the layer [1, in]; of a convolution [1, n, 1, ...]
    prompt_embeddings [tokens, ...]   without any prefix
    <parameter>                       of a module in modules_to_save
    <site>.base_layer.<parameter>     of a module that has an adapter as well

What PEFT has no word for (a mask, a prefix over `nn.MultiheadAttention`) is written under our own
names, with a `peft_type` that begins with ``TESSERA_``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from tessera.errors import DeltaError

__all__ = [
    "OWN",
    "PREFIX",
    "TYPES",
    "Content",
    "is_feedforward",
    "is_saved",
    "is_target",
    "layer_types",
    "pattern_of",
    "reader",
    "targets",
]

OWN = "TESSERA_"
PREFIX = "base_model.model."
TYPES = {
    "lora": "LORA",
    "ia3": "IA3",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
}

# The last is the out_proj of an nn.MultiheadAttention, a Linear that is never called.
_TOLD = (
    "Embedding",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Conv1D",
    "MultiheadAttention",
    "NonDynamicallyQuantizableLinear",
)

# A pattern comes from a file. With one repetition or choice its cost grows with the square of a
# name's length, whatever it says.
_MAX_PATTERN = 512
_FREE = re.compile(r"(?<!\\)[*+?{|]")
_LOOKING = re.compile(r"\(\?|\\[1-9]")


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Content:
    """What an adapter says: the fields of `Delta` of the same names."""

    kind: str
    tensors: Mapping[str, Tensor]
    scales: Mapping[str, float]
    info: Mapping[str, Any]


def layer_types(model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """What PEFT's names depend on and a delta's tensors do not show: `info["layer_types"]`.

    Args:
        model: The whole that the sites are named in.
        sites: Modules of it.

    Returns:
        Site -> class name, for all that are no plain Linear.

    Example:
        >>> layer_types(nn.Sequential(nn.Linear(1, 1), nn.Embedding(2, 1)), ["0", "1"])
        {'1': 'Embedding'}
    """
    found = {}
    for site in sorted(sites):
        kinds = [cls.__name__ for cls in type(model.get_submodule(site)).__mro__]
        # A subclass counts as what it is one of, as PEFT has it.
        known = next((k for k in kinds if k in _TOLD), None)
        if known is not None:
            found[site] = known
    return found


def pattern_of(names: Iterable[str]) -> str:
    r"""A pattern that is exactly these names.

    Example:
        >>> pattern_of(["a.0", "b"])
        '(?:a\\.0|b)'
    """
    return f"(?:{'|'.join(map(re.escape, names))})"


def targets(names: Iterable[str]) -> list[str] | str:
    """`target_modules` that are these modules.

    PEFT takes a list for endings: "fc" is "block.fc" too. A path of three steps is no other's
    ending in practice, and a list is what other readers of the folder know; for shorter names it
    is a pattern, which PEFT matches whole.

    Example:
        >>> targets(["layer.0.query"]), targets(["fc"])
        (['layer.0.query'], '(?:fc)')
    """
    ordered = sorted(names)
    return ordered if all(n.count(".") >= 2 for n in ordered) else pattern_of(ordered)


def reader(field: str, patterns: Mapping[str, Any], default: Any) -> Callable[[str], Any]:
    """What `rank_pattern` or `alpha_pattern` says of a module, as PEFT reads it.

    A key is a pattern for the name or, after a dot, its ending; the first that matches counts.

    Raises:
        DeltaError: A key is no pattern, or too costly a one.

    Example:
        >>> rank = reader("rank_pattern", {"query": 4, "^fc": 2}, 8)
        >>> rank("layer.0.query"), rank("fc"), rank("layer.fc")
        (4, 2, 8)
    """
    whole: dict[str, int] = {}
    ending: dict[str, int] = {}
    free: list[tuple[int, re.Pattern[str]]] = []
    values = list(patterns.values())
    for order, key in enumerate(patterns):
        names = _literals(key)
        if names is None:
            free.append((order, _compiled(rf"(.*\.)?({key})$", key, field)))
        for name in names or ():
            (whole if key.startswith("^") else ending).setdefault(name, order)

    def read(name: str) -> Any:
        if not values:
            return default
        steps = name.split(".")
        found = [ending[e] for i in range(len(steps)) if (e := ".".join(steps[i:])) in ending]
        found += [order for order, pattern in free if pattern.match(name)]
        found += [whole[name]] if name in whole else []
        return values[min(found)] if found else default

    return read


def is_target(modules: Any, name: str) -> bool | None:
    """Whether `target_modules` takes `name`; None where only the model could tell.

    Raises:
        DeltaError: `modules` is neither a list of names nor a pattern.

    Example:
        >>> is_target(["query"], "layer.0.query"), is_target("(?:fc)", "layer.0.query")
        (True, False)
        >>> is_target("all-linear", "layer.0.query")
    """
    if modules is None or modules == "all-linear":
        return None
    if isinstance(modules, str):
        names = _literals(modules)
        return None if names is None else name in names
    return any(name == n or name.endswith(f".{n}") for n in _listed("target_modules", modules))


def is_feedforward(modules: Any, name: str) -> bool | None:
    """Whether `feedforward_modules` takes `name`: by plain endings, not by steps of the path.

    None where a pattern would take too long to tell.

    Example:
        >>> is_feedforward(["ense"], "output.dense")
        True
    """
    field = "feedforward_modules"
    if isinstance(modules, str):
        names = _literals(modules)
        if names is not None:
            return name in names
        if _costly(modules):
            return None
        return _compiled(modules, modules, field).fullmatch(name) is not None
    return any(name.endswith(n) for n in _listed(field, modules or []))


def is_saved(modules: Any, parameter: str) -> bool:
    """Whether `parameter` lies in one of `modules_to_save`.

    Example:
        >>> is_saved(["pooler"], "bert.pooler.dense.weight")
        True
    """
    steps = parameter.split(".")[:-1]
    above = [".".join(steps[:i]) for i in range(1, len(steps) + 1)]
    named = _listed("modules_to_save", modules or [])
    return any(place.endswith(n) for place in above for n in named)


def _listed(field: str, modules: Any) -> list[str]:
    if not isinstance(modules, list) or not all(isinstance(n, str) and n for n in modules):
        raise DeltaError(
            f"adapter_config.json: {field} must be a list of names or a pattern, it is "
            f"{str(modules)[:60]!r}"
        )
    return modules


def _literals(pattern: str) -> list[str] | None:
    """The names of a pattern that is nothing but names; None for any other.

    A dot that is not escaped is any character to PEFT; whoever wrote it meant a dot.
    """
    inner = re.fullmatch(r"\^?(?:\(\?:([^()]*)\)|([^()|]*))\$?", pattern)
    if inner is None:
        return None
    names = []
    for choice in (inner[1] if inner[1] is not None else inner[2]).split("|"):
        if re.search(r"[\]\[*+?{}^$]|\\[A-Za-z0-9]", re.sub(r"\\[^A-Za-z0-9]", "", choice)):
            return None
        names.append(re.sub(r"\\([^A-Za-z0-9])", r"\1", choice))
    return names


def _costly(pattern: str) -> bool:
    free = len(_FREE.findall(pattern))
    return len(pattern) > _MAX_PATTERN or free > 1 or _LOOKING.search(pattern) is not None


def _compiled(whole: str, pattern: str, field: str) -> re.Pattern[str]:
    if _costly(pattern):
        raise DeltaError(
            f"adapter_config.json: {field} has a pattern that may take too long to match, "
            f"{pattern[:60]!r}. Write out the modules' names instead"
        )
    try:
        return re.compile(whole)
    except (re.error, RecursionError, OverflowError) as error:
        raise DeltaError(
            f"adapter_config.json: {field} has no valid pattern, {pattern[:60]!r}: {error}"
        ) from error

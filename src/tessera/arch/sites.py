"""Which modules a delta lies over: told by module, by name, by pattern, or chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from tessera.arch.conditioning import backbone
from tessera.errors import InputError, UnknownNameError

__all__ = ["ATTENTION_QV", "automatic", "matching", "select"]

Sites = str | nn.Module | Sequence[str | nn.Module] | None

# How transformers models call the projections that LoRA's paper adapts: query and value, or the
# one that makes all three (Hu et al. 2022, section 4.2).
ATTENTION_QV = (
    "query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v", "c_attn", "query_key_value",
    "qkv_proj", "qkv", "Wqkv",
)  # fmt: skip


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """The names a pattern means: the name itself, a glob, or how a dotted name ends.

    Example:
        >>> matching(["a.query", "a.key", "b.query"], "query")
        ['a.query', 'b.query']
        >>> matching(["a.query", "a.key", "b.query"], "a.*")
        ['a.query', 'a.key']
    """
    names = list(names)
    if pattern in names:
        return [pattern]
    return [n for n in names if fnmatchcase(n, pattern) or n.endswith(f".{pattern}")]


def automatic(model: nn.Module) -> list[str]:
    """Query and value projections in a transformers model; every Linear in any other.

    Example:
        >>> automatic(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)))
        ['0', '2']
    """
    named = list(model.named_modules())
    if backbone(model) is not None:
        found = [
            n for n, m in named if n.rpartition(".")[2] in ATTENTION_QV and hasattr(m, "weight")
        ]
        if found:
            return found
    return [n for n, m in named if isinstance(m, nn.Linear)]


def select(
    model: nn.Module, sites: Sites, accepts: Callable[[nn.Module], bool], who: str
) -> list[str]:
    """Names of the modules of `model` that `sites` means and that `accepts` takes.

    Args:
        model: The whole or the part that the delta is made for.
        sites: Modules of it, names, globs, or ends of names; None: `automatic`.
        accepts: Whether a module can be a site. A module named or given outright must be; of
            what a pattern matches only those that can are taken.
        who: For messages.

    Raises:
        UnknownNameError: A name or pattern means no module, or a module is not in the model.
        InputError: What was named cannot be a site; or there is none.
    """
    modules = dict(model.named_modules())
    wanted = automatic(model) if sites is None else sites
    found: dict[str, None] = {}
    for site in [wanted] if isinstance(wanted, str | nn.Module) else wanted:
        if isinstance(site, nn.Module):
            names = [n for n, m in modules.items() if m is site]
        else:
            names = matching(modules, site)
        if not names:
            what = type(site).__name__ if isinstance(site, nn.Module) else repr(site)
            some = ", ".join([n for n, m in modules.items() if accepts(m)][:6])
            raise UnknownNameError(f"{who}: there is no module {what} in the model; it has {some}")
        taken = [n for n in names if accepts(modules[n])]
        if not taken:
            raise InputError(
                f"{who}: {names[0]!r} is a {type(modules[names[0]]).__name__}, which cannot be a "
                "site; choose Linear, Conv or Embedding modules, or use peft.mask"
            )
        found.update(dict.fromkeys(taken))
    if not found:
        raise InputError(f"{who}: the model has no module that could be a site; name them: sites=")
    return list(found)

"""One way to lay deltas over a model: a shadow of its modules that shares every parameter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from tessera.arch import base
from tessera.arch.conditioning import Virtual, backbone, conditioned, heads_of
from tessera.arch.delta import Delta
from tessera.arch.overlaid import bare_copy, overlaid
from tessera.arch.terms import Weighted, gather_terms
from tessera.errors import DeltaError, InputError

__all__ = ["Seats", "Tokens", "overlay", "placed", "require_width", "seat_virtual", "shadow_tree"]


def overlay(model: nn.Module, deltas: Sequence[Weighted], *, frozen: bool = False) -> nn.Module:
    """A shadow of `model` that computes what it does under the deltas.

    Every module is copied without its tensors, so that nobody's ``train()``, hook or forward
    touches `model`; every parameter is shared, and the deltas' tensors are read at each forward.
    Changes add up: ``W + sum weight_i change_i``, whatever the order. Prefixes and prompts line up.

    Args:
        model: The base. It is not changed.
        deltas: (delta, weight); the weight of a prefix or prompt is 1.
        frozen: Give the shadow detached views of the parameters, so that a backward reaches
            nothing but the deltas.

    Returns:
        A module of the model's own type.

    Raises:
        UnknownNameError: A delta lies over a module the model lacks.
        DeltaError: A delta is of another base, or one of its tensors does not fit.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> change = {"0.A": torch.ones(1, 2), "0.B": torch.ones(1, 1)}
        >>> delta = Delta(kind="lora", tensors=change, scales={"0": 3.0})
        >>> under = overlay(model, [(delta, 1.0)])
        >>> bool((under(torch.ones(1, 2)) - model(torch.ones(1, 2)) - 6).abs() < 1e-5)
        True
    """
    here = [(placed(delta, model), _weight(weight)) for delta, weight in deltas]
    terms = gather_terms(model, here)
    seats: Seats = {name: [partial(overlaid, terms=t)] for name, t in terms.items()}
    require_width(model, [d for d, _ in here])
    kinds = {
        kind: tuple(d.info.get("sites", ()))
        for kind in ("prefix", "prompt")
        for d, _ in here
        if kind in d.tensors
    }
    seat_virtual(model, kinds, Tokens(here), seats)
    return shadow_tree(model, seats, frozen=frozen)


def placed(delta: Delta, model: nn.Module) -> Delta:
    """`delta` with its sites named as `model` names them, after a look at whose delta it is.

    Raises:
        DeltaError: It is of another base.
    """
    home = delta._home[0]() if delta._home else None
    whole, start = model, ""
    if home is not None and home is not model:
        # Made from a part of this model, or from a whole of which this is the part.
        found = base.placement(home, model)
        if found:
            whole, start = home, f"{found}."
    if delta.base_hash and delta.base_hash != base.base_hash(whole):
        raise DeltaError(
            f"{delta!r} is of another base: it was made for {delta.base_hash[:12]}..., and the "
            f"weights of {type(whole).__name__} are {base.base_hash(whole)[:12]}... now. Load the "
            "base it was made for; or, where the base was trained on and the old delta is wanted "
            "all the same, use delta.of(model)"
        )
    if not start:
        return delta
    info = dict(delta.info)
    if "sites" in info:
        info["sites"] = [start + site for site in info["sites"]]
    return Delta(
        kind=delta.kind,
        tensors={
            name if name in ("prefix", "prompt") else start + name: tensor
            for name, tensor in delta.tensors.items()
        },
        scales={(start + site).rstrip("."): scale for site, scale in delta.scales.items()},
        info=info,
    )


def _weight(weight: float) -> float:
    if not isinstance(weight, int | float) or not -1e6 < weight < 1e6:
        raise InputError(f"the weight of a delta must be a finite number, got {weight!r}")
    return float(weight)


Seats = dict[str, list[Callable[[nn.Module], nn.Module]]]


@final
class Tokens:
    """The virtual tokens of deltas that are the same for every row, end to end.

    Example:
        >>> prompt = Delta(kind="prompt", tensors={"prompt": torch.zeros(3, 4)})
        >>> Tokens([(prompt, 1.0)]).prompt(2)[0].shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, deltas: Sequence[Weighted]) -> None:
        self._found: dict[str, list[Tensor]] = {"prefix": [], "prompt": []}
        for delta, weight in deltas:
            for kind, tensors in self._found.items():
                if kind in delta.tensors:
                    if weight != 1.0:
                        raise InputError(
                            f"a {kind} has no weight: it stands before the sequence or not; got "
                            f"{weight}. Weights are for lora, ia3 and mask"
                        )
                    tensors.append(delta.tensors[kind])

    def _rows(self, kind: str, rows: int) -> tuple[Tensor, None] | None:
        parts = self._found[kind]
        return (torch.cat(parts).expand(rows, -1, -1), None) if parts else None

    def prefix(self, rows: int) -> tuple[Tensor, None] | None:
        """[rows, P, width], the same for each."""
        return self._rows("prefix", rows)

    def prompt(self, rows: int) -> tuple[Tensor, None] | None:
        """[rows, P, width], the same for each."""
        return self._rows("prompt", rows)


def seat_virtual(
    model: nn.Module,
    kinds: Mapping[str, Sequence[str]],
    virtual: Virtual,
    seats: Seats,
    prefixed: Collection[str] = (),
) -> None:
    """Enter into `seats` the modules that must see virtual tokens.

    Args:
        model: The base.
        kinds: "prefix", "prompt": those there are -> the modules that take it; in a transformers
            model that is known.
        virtual: Where they come from.
        seats: Module's name -> what is done to its copy.
        prefixed: Attention layers that see to their prefixes themselves.

    Raises:
        DeltaError: The model has no place for them.
    """
    name = backbone(model) if kinds else None
    if name is not None:
        seats.setdefault(name, []).append(partial(conditioned, virtual=virtual))
        return
    for kind, sites in kinds.items():
        if not sites:
            raise DeltaError(
                f"this model is none of transformers, and the {kind} does not say (info['sites']) "
                f"which modules take it; make it with peft.{kind}(model, ...)"
            )
        for layer, site in enumerate(sites):
            if site not in base.named(model):
                raise DeltaError(f"the {kind} lies over {site!r}, which this model lacks")
            if kind == "prompt" or site not in prefixed:
                seat = partial(conditioned, virtual=virtual, layer=layer)
                seats.setdefault(site, []).append(seat)


def require_width(model: nn.Module, deltas: Sequence[Delta]) -> None:
    """Raise DeltaError unless virtual tokens are as wide as the model takes them."""
    having = [(k, d) for k in ("prefix", "prompt") for d in deltas if k in d.tensors]
    sites = {kind: tuple(d.info.get("sites", ())) for kind, d in having}
    for kind, delta in having:
        if tuple(delta.info.get("sites", ())) != sites[kind]:
            raise DeltaError(f"two deltas have a {kind} over different modules")
        wanted = _width(model, kind, sites[kind])
        if wanted is not None and delta.tensors[kind].shape[1] != wanted:
            raise DeltaError(
                f"the {kind!r} {tuple(delta.tensors[kind].shape)} does not fit "
                f"{type(model).__name__}: a virtual token has {wanted} numbers there"
            )


def _width(model: nn.Module, kind: str, sites: Sequence[str]) -> int | None:
    name = backbone(model)
    if name is None:
        modules = [base.named(model).get(site) for site in sites]
        if kind == "prompt":
            widths = [m.embedding_dim for m in modules if isinstance(m, nn.Embedding)]
            return widths[0] if widths else None
        heads = [m.embed_dim for m in modules if isinstance(m, nn.MultiheadAttention)]
        return 2 * sum(heads) or None
    body: Any = model.get_submodule(name)
    if kind == "prompt":
        return int(body.get_input_embeddings().weight.shape[1])
    layers, groups, size = heads_of(body)
    return 2 * layers * groups * size


def shadow_tree(
    model: nn.Module,
    seats: Mapping[str, Sequence[Callable[[nn.Module], nn.Module]]],
    *,
    frozen: bool = False,
) -> nn.Module:
    """Copies of all modules of `model` around the same tensors; those named in `seats` changed.

    Raises:
        DeltaError: A module above a site has a forward of its own attached, which would go round
            the shadow.
    """
    twins: dict[int, nn.Module] = {}
    names = {id(m): n for n, m in base.named(model).items()} if seats else {}

    def visit(module: nn.Module) -> nn.Module:
        known = twins.get(id(module))
        if known is not None:
            return known
        twin = twins[id(module)] = bare_copy(module)
        children = twin.__dict__["_modules"]
        for name, child in children.items():
            if child is not None:
                children[name] = visit(child)
        if frozen:
            own = twin.__dict__["_parameters"]
            for name, p in own.items():
                if p is not None:
                    own[name] = p.detach()
        for change in seats.get(names.get(id(module), ""), ()) if names else ():
            change(twin)
        return twin

    for name in seats:
        _require_plain(model, name)
    return visit(model)


def _require_plain(model: nn.Module, site: str) -> None:
    module, steps = model, site.split(".") if site else []
    for step in [*steps, None]:
        if "forward" in module.__dict__:
            raise DeltaError(
                f"a forward was attached to the {type(module).__name__} instance above {site!r} "
                "(module.forward = ...); it would run the base without its delta. Remove it, or "
                "lay the delta over a module inside"
            )
        if step is not None:
            module = module.get_submodule(step)

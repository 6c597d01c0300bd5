"""Taking an anchor: the weights, their Fisher, and what the optimizer's plugins know."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tessera import trees
from tessera.arch.anchor import Anchor, shadow
from tessera.arch.fisher import BLOCK, estimate
from tessera.arch.labels import blocks
from tessera.errors import AnchorError, InputError, unknown_name
from tessera.graph import Transform
from tessera.graph.ownership import owned, owner, owners

__all__ = ["anchor_from"]

ESTIMATORS = ("auto", "exact", "sampled", "empirical")


def anchor_from(
    model: nn.Module,
    name: str,
    *,
    fisher: Literal["diagonal"] | None = "diagonal",
    data: Iterable[Any] | None = None,
    estimator: str = "auto",
    samples: int | None = None,
    logits: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
) -> Anchor:
    """Remember the model as it is, with the diagonal Fisher of every weight.

    ``F_i = 1/N sum_n E_{y ~ p(y|x_n)} (d log p(y|x_n) / d theta_i)^2``: the mean over examples of
    the squared per-example gradient, in eval mode, independent of the batch size. The work is done
    on a private copy, so the model's mode, buffers and gradients stay as they are. Transforms of
    the optimizer that owns the model are told of the anchor and add to its `stats`.

    Args:
        model: Any module. Trainable parameters get a Fisher; all are remembered.
        name: Unique within a run.
        fisher: "diagonal", or None for an anchor without importance (`loss.l2sp`, `loss.lwf`).
        data: Batches of the task just learned: a `Batch` or any ``(x, y)`` pair, or inputs alone
            (a tensor). Only ``"empirical"`` looks at y. Without `data` the Fisher is recycled from
            the squared-gradient accumulator of the owning `tg.Adam`, scaled by the batch size and
            marked ``stats["approximate"]``. With ``fisher=None`` it is for a transform that wants
            it, as `opt.ogd` does.
        estimator: "exact": the expectation over all labels; "sampled": one label drawn from the
            model for each example; "empirical": the data's labels (not the Fisher, and close to 0
            on a fitted model); "auto": exact for at most 32 classes, else sampled.
        samples: Use the first so many examples only.
        logits: Maps the model's output to logits [n, C], e.g. ``lambda out: out.logits``, or to
            mask the classes the task does not have with -inf. None: the output itself.
        seed: Of the sampled labels.

    Returns:
        The anchor; ``anchor.model(x)`` is the frozen forward.

    Raises:
        AnchorError: There is no data and nothing to recycle, the data is empty, the model cannot
            be copied, or normalises over the batch so that per-example gradients do not exist.
        InputError: A batch is of the wrong form, or not finite.

    Source:
        Fisher: Kirkpatrick et al. 2017 (arXiv:1612.00796), van de Ven 2025 (arXiv:2502.11756);
        recycled: Li, Dangel, Tam & Raffel 2025 (arXiv:2507.18807).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(4, 3)
        >>> anchor = anchor_from(model, "task1", data=[(torch.ones(2, 4), None)])
        >>> anchor.stats["estimator"], anchor.stats["samples"]
        ('exact', 2)
        >>> anchor.fisher["weight"].shape
        torch.Size([3, 4])
    """
    if fisher not in ("diagonal", None):
        raise unknown_name("fisher", fisher, ["'diagonal'", "None"])
    if estimator not in ESTIMATORS:
        raise unknown_name("estimator", estimator, ESTIMATORS)
    if samples is not None and samples < 1:
        raise InputError(f"arch.anchor_from needs samples >= 1, got {samples}")
    live = trees.parameters(model)
    for pname, p in live.items():
        if not bool(torch.isfinite(p).all()):
            raise AnchorError(
                f"arch.anchor_from: {pname!r} of the model holds NaN or Inf; anchor a model "
                "before it diverges"
            )
    params = trees.clone(live)
    buffers = trees.clone(dict(model.named_buffers()))
    stats: dict[str, Any] = {"kind": fisher}
    curious = [p for p in _plugins(live) if p.wants_data]
    if curious and data is not None and iter(data) is data:
        data = list(data)  # it is read more than once, and a generator gives only once
    if fisher is None:
        if data is not None and not curious:
            raise InputError("arch.anchor_from: fisher=None uses no data; drop one of the two")
    elif data is None:
        stats |= _recycled(name, live)
    else:
        stats |= estimate(
            shadow(model, params, trees.clone(buffers)),
            data,
            estimator=estimator,
            samples=samples,
            logits=logits,
            seed=seed,
        )
    # All that may fail comes first: a plugin that is told of an anchor starts afresh.
    frozen = shadow(model, params, buffers)
    names = {id(p): n for n, p in live.items()}
    for plugin in curious:
        copied = shadow(model, params, trees.clone(buffers))
        inputs = (x for x, _ in blocks(data, samples, BLOCK)) if data is not None else None
        plugin.before_anchor(copied, names, inputs)
    stats |= _from_plugins(live)
    stats["buffers"] = buffers
    anchor = Anchor(name, params, stats)
    anchor._attach(frozen, model)
    return anchor


def _plugins(live: Mapping[str, nn.Parameter]) -> list[Transform]:
    """The transforms of all owners; each knows its own optimizer's part of the model."""
    known = [owned(optimizer) for optimizer in owners(live.values())]
    return [plugin for k in known if k is not None for plugin in k.plugins]


def _from_plugins(live: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """What the transforms of all owners add."""
    names = {id(p): n for n, p in live.items()}
    found: dict[str, Any] = {}
    for plugin in _plugins(live):
        for key, value in plugin.on_anchor(names).items():
            both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
            found[key] = {**found[key], **value} if both else value
    return found


def _recycled(name: str, live: dict[str, nn.Parameter]) -> dict[str, Any]:
    """The Fisher that Adam has been accumulating all along.

    Its bias-corrected second moment estimates E[g^2] of the batch-mean gradient g; near a minimum
    that is F / batch size, so the batch size scales it back.
    """
    found: dict[str, Tensor] = {}
    rows: int | None = None
    for pname, p in live.items():
        optimizer = owner(p)
        state = optimizer.state.get(p, {}) if optimizer is not None else {}
        if not p.requires_grad or "exp_avg_sq" not in state or optimizer is None:
            continue
        beta2 = next(
            g["betas"][1] for g in optimizer.param_groups if any(q is p for q in g["params"])
        )
        known = owned(optimizer)
        rows = known.batch_sizes[0] if known and known.batch_sizes else rows
        found[pname] = state["exp_avg_sq"] / (1 - beta2 ** float(state["step"])) * (rows or 1)
    if not found:
        raise AnchorError(
            f"arch.anchor_from(model, {name!r}) needs data to estimate a Fisher, and there is no "
            "tg.Adam over this model that has stepped, whose squared gradients could be recycled. "
            f"Pass the task's batches: arch.anchor_from(model, {name!r}, data=batches), or "
            "fisher=None for an anchor without one"
        )
    if rows is None:
        warnings.warn(
            "arch.anchor_from: the Fisher recycled from tg.Adam could not be scaled, because no "
            "@tg.training_step told the batch size; it is too small by that factor. Pass data= "
            "for an exact one",
            stacklevel=3,
        )
    return {
        "fisher": found,
        "estimator": "recycled",
        "approximate": True,
        "samples": 0,
        "batch_size": rows,
    }

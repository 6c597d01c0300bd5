"""The diagonal Fisher: exact, at the price of a few batched passes.

Layers with a rule (`layers.RULES`) are never differentiated per example; the rest goes through
``vmap`` and, where that fails, a loop. On the first examples every parameter's figure is compared
with a loop over single examples, and one that disagrees is demoted: an unusual model makes the
estimate slower, not wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tessera import trees
from tessera.arch.labels import blocks, cotangents, resolve
from tessera.arch.layers import RULES, Use, is_flat
from tessera.errors import AnchorError

__all__ = ["estimate"]

BLOCK = 256  # examples; recorded in the anchor, because the last bits depend on it
_PROBE = 3  # examples on which the fast paths are checked against the loop
_BUDGET = 1 << 24  # elements of per-example gradients held at once

Head = Callable[[Tensor], Tensor]
# One use of a layer during a forward: its input and the place of its output in the graph.
Trace = dict[nn.Module, list[tuple[Tensor, GradientEdge]]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plan:
    """Which path each parameter takes."""

    layers: Mapping[nn.Module, Mapping[str, str]]  # layer -> local name -> full name
    proven: frozenset[nn.Module]  # those whose rule was seen at work; the probe missed the others
    vmapped: tuple[str, ...]
    looped: tuple[str, ...]


def estimate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    estimator: str,
    samples: int | None,
    logits: Callable[[Any], Tensor] | None,
    seed: int,
) -> dict[str, Any]:
    """The entries "fisher", "estimator", "samples" and "block" of an anchor's `stats`.

    Args:
        model: A private copy in eval mode; its parameters' ``requires_grad`` say which count.
        data: See `anchor_from`, as for the other arguments.
    """
    _require_independent_examples(model)

    def forward(x: Tensor) -> Tensor:
        out = model(x.clone())  # a copy, for the model that writes into its input
        z = logits(out) if logits is not None else out
        if not isinstance(z, Tensor):
            raise AnchorError(
                f"arch.anchor_from: {type(model).__name__} returns {type(z).__name__}, not a "
                "tensor; say where the logits are, e.g. logits=lambda out: out.logits"
            )
        # A model that squeezes drops the batch when it holds one example.
        return z.unsqueeze(0) if z.dim() == 1 and len(x) == 1 else z

    trainable = {n: p for n, p in trees.parameters(model).items() if p.requires_grad}
    totals = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in trainable.items()}
    plan: _Plan | None = None
    seen = 0
    with torch.enable_grad():
        for x, y in blocks(data, samples, BLOCK):
            if plan is None:
                probe = x[:_PROBE]
                z = forward(probe)
                _require_gradient(model, z)
                estimator = resolve(estimator, z.detach())
                plan = _plan(model, forward, trainable, probe)
            _add_block(model, forward, plan, (x, y), (estimator, seen, seed), totals)
            seen += len(x)
    if plan is None:
        raise AnchorError("arch.anchor_from: data held no example; pass the task's batches")
    fisher = {n: (t / seen).to(trainable[n].dtype) for n, t in totals.items()}
    return {"fisher": fisher, "estimator": estimator, "samples": seen, "block": BLOCK}


def _require_independent_examples(model: nn.Module) -> None:
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None:
            raise AnchorError(
                f"arch.anchor_from: {name!r} is a BatchNorm without running statistics; it mixes "
                "the examples of a batch, so per-example gradients do not exist. Use "
                "track_running_stats=True, or GroupNorm"
            )


def _require_gradient(model: nn.Module, z: Tensor) -> None:
    if not z.requires_grad:
        raise AnchorError(
            f"arch.anchor_from: no trainable parameter reaches the logits of "
            f"{type(model).__name__}, so it has no Fisher. Is all of it frozen, or its forward "
            "under torch.no_grad() or inference_mode()? fisher=None remembers the weights alone"
        )


def _add_block(
    model: nn.Module,
    forward: Head,
    plan: _Plan,
    block: tuple[Tensor, Tensor | None],
    labels: tuple[str, int, int],
    totals: dict[str, Tensor],
) -> None:
    x, y = block
    estimator, first, seed = labels
    with _tracing(plan.layers) as trace:
        z = forward(x)
    pulls = list(cotangents(estimator, z.detach(), y, first, seed))
    looped = list(plan.looped)
    fit: Trace = {}
    for layer, uses in trace.items():
        if layer in plan.proven and all(a.shape[0] == len(x) for a, _ in uses):
            fit[layer] = uses
        elif uses:
            # It depends on the data what this layer sees, so vmap would not do either.
            looped += plan.layers[layer].values()
    for name, squares in _by_rules(z, fit, pulls, plan.layers):
        totals[name] += squares
    for way, names in ((_by_vmap, plan.vmapped), (_by_loop, looped)):
        if names:
            for name, squares in way(model, forward, names, x, pulls).items():
                totals[name] += squares


@contextmanager
def _tracing(layers: Iterable[nn.Module]) -> Iterator[Trace]:
    """Record every use of these layers while the block runs."""
    trace: Trace = {layer: [] for layer in layers}

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if out.requires_grad:
            # The edge, not the tensor: an in-place activation may rewrite the tensor's history.
            # A layer called by keyword has no args; the empty input sends it to another path.
            a = args[0].detach() if args else out.new_empty(0)
            trace[module].append((a, get_gradient_edge(out)))

    handles = [layer.register_forward_hook(hook) for layer in trace]
    try:
        yield trace
    finally:
        for h in handles:
            h.remove()


def _by_rules(
    z: Tensor, trace: Trace, pulls: Sequence[Tensor], layers: Mapping[nn.Module, Mapping[str, str]]
) -> Iterator[tuple[str, Tensor]]:
    """(parameter, sum of squares) pairs, several for one parameter."""
    edges = [edge for uses in trace.values() for _, edge in uses]
    if not edges:
        return
    flat: dict[nn.Module, Tensor] = {}
    for v in pulls:
        deltas = iter(torch.autograd.grad(z, edges, v, retain_graph=True, allow_unused=True))
        for layer, uses in trace.items():
            pairs = [
                (_wide(a), _wide(d))
                for (a, _), d in zip(uses, deltas, strict=False)
                if d is not None
            ]
            if not pairs:
                continue
            if is_flat(layer, uses):
                # a is the same for every label, so one matrix product serves all of them.
                squared = pairs[0][1].square()
                flat[layer] = flat[layer] + squared if layer in flat else squared
            else:
                yield from _chunked(layer, pairs, layers[layer])
    for layer, squared in flat.items():
        a = _wide(trace[layer][0][0])
        sums = {"weight": squared.T @ a.square(), "bias": squared.sum(0)}
        yield from ((full, sums[local]) for local, full in layers[layer].items())


def _chunked(
    layer: nn.Module, uses: Sequence[Use], names: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    n = len(uses[0][0])
    per_example = max(p.numel() for p in layer.parameters(recurse=False))
    step = max(1, _BUDGET // per_example)
    for i in range(0, n, step):
        sums = RULES[type(layer)](layer, [(a[i : i + step], d[i : i + step]) for a, d in uses])
        yield from ((full, sums[local]) for local, full in names.items())


def _by_vmap(
    model: nn.Module, forward: Head, names: Sequence[str], x: Tensor, pulls: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Per-example gradients of some parameters through torch.func, a chunk at a time."""
    everything = trees.parameters(model)
    chosen = {n: everything[n].detach() for n in names}
    call = _Functional(model, forward)

    def one(example: Tensor, pull: Tensor) -> dict[str, Tensor]:
        def at(params: dict[str, Tensor]) -> Tensor:
            return call.with_params(params, example.unsqueeze(0))

        grads: dict[str, Tensor] = torch.func.vjp(at, chosen)[1](pull.unsqueeze(0))[0]
        return grads

    size = sum(p.numel() for p in chosen.values())
    chunk = max(1, _BUDGET // max(1, size))
    sums = {n: torch.zeros_like(_wide(p)) for n, p in chosen.items()}
    with warnings.catch_warnings():
        # Some kernels have no batched form yet; PyTorch loops over those and says so.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        for v in pulls:
            for i in range(0, len(x), chunk):
                grads = torch.func.vmap(one)(x[i : i + chunk], v[i : i + chunk])
                for n, g in grads.items():
                    sums[n] += _wide(g).square().sum(0)
    return sums


class _Functional(nn.Module):
    """The forward, logits mapping included, as a module whose parameters can be swapped."""

    def __init__(self, model: nn.Module, forward: Head) -> None:
        super().__init__()
        self.model = model
        self._call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)

    def with_params(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        named = {f"model.{n}": p for n, p in params.items()}
        z: Tensor = torch.func.functional_call(self, named, (x,))
        return z


def _by_loop(
    model: nn.Module, forward: Head, names: Sequence[str], x: Tensor, pulls: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The oracle: one example at a time."""
    everything = trees.parameters(model)
    chosen = [everything[n] for n in names]
    sums = {n: torch.zeros_like(_wide(p)) for n, p in zip(names, chosen, strict=True)}
    for i in range(len(x)):
        z = forward(x[i : i + 1])
        for v in pulls if z.requires_grad else ():
            grads = torch.autograd.grad(
                z, chosen, v[i : i + 1], retain_graph=True, allow_unused=True
            )
            for n, g in zip(names, grads, strict=True):
                if g is not None:
                    sums[n] += _wide(g).square()
    return sums


def _plan(
    model: nn.Module, forward: Head, trainable: Mapping[str, nn.Parameter], probe: Tensor
) -> _Plan:
    """Give every parameter the fastest path that agrees with the loop on the probe."""
    layers = _candidates(model, trainable)
    with _tracing(layers) as trace:
        z = forward(probe)
    # Any gradient at the logits will do to compare paths; this one has no zeros and no symmetry.
    pull = torch.cos(torch.arange(z.numel(), device=z.device) + 1.0).reshape(z.shape).to(z.dtype)
    truth = _by_loop(model, forward, list(trainable), probe, [pull])
    torch.autograd.backward(z, pull, retain_graph=True)
    for name, p in trainable.items():
        if p.grad is not None and p.grad.any() and not truth[name].any():
            raise AnchorError(
                f"arch.anchor_from: {name!r} has a gradient in backward() and none in "
                "torch.autograd.grad. If it is under torch.utils.checkpoint, use_reentrant=False"
            )
        p.grad = None
    eps = torch.finfo(z.dtype).eps
    # A gradient that cancels (a bias on attention's keys) is noise, and noise agrees with nothing.
    largest = {n: t.max().item() if t.numel() else 0.0 for n, t in truth.items()}
    noise = 100 * eps**2 * max(largest.values(), default=0.0)

    def agrees(name: str, got: Tensor | None) -> bool:
        gap = truth[name] if got is None else got - truth[name]
        return bool((gap.abs() <= max(1e-3, 4 * eps) * largest[name] + noise).all())

    fit = {m: uses for m, uses in trace.items() if all(len(a) == len(probe) for a, _ in uses)}
    sums: dict[str, Tensor] = {}
    for name, squares in _by_rules(z, fit, [pull], layers):
        sums[name] = sums[name] + squares if name in sums else squares
    ruled = {
        m: names
        for m, names in layers.items()
        if m in fit and all(agrees(full, sums.get(full)) for full in names.values())
    }
    proven = frozenset(
        m for m, names in ruled.items() if any(truth[n].any() for n in names.values())
    )
    done = {full for names in ruled.values() for full in names.values()}
    rest = [n for n in trainable if n not in done]
    try:
        by_vmap = _by_vmap(model, forward, rest, probe, [pull]) if rest else {}
    except RuntimeError:
        # torch.func cannot trace every model; the loop can run every one.
        by_vmap = {}
    vmapped = tuple(n for n in rest if n in by_vmap and agrees(n, by_vmap[n]))
    looped = tuple(n for n in rest if n not in vmapped)
    return _Plan(layers=ruled, proven=proven, vmapped=vmapped, looped=looped)


def _candidates(
    model: nn.Module, trainable: Mapping[str, nn.Parameter]
) -> dict[nn.Module, dict[str, str]]:
    """Layers with a rule whose trainable parameters no other module holds."""
    full = {id(p): n for n, p in trainable.items()}
    holders: dict[int, int] = {}
    for m in model.modules():
        for p in m._parameters.values():
            if p is not None:
                holders[id(p)] = holders.get(id(p), 0) + 1
    found: dict[nn.Module, dict[str, str]] = {}
    for m in model.modules():
        names = {
            k: full[id(p)] for k, p in m._parameters.items() if p is not None and id(p) in full
        }
        alone = all(holders[id(m._parameters[k])] == 1 for k in names)
        plain = not isinstance(m, nn.Embedding) or (m.max_norm is None and not m.scale_grad_by_freq)
        if names and names.keys() <= {"weight", "bias"} and alone and plain and type(m) in RULES:
            found[m] = names
    return found


def _wide(t: Tensor) -> Tensor:
    """Half precision widened: its squares underflow, and sums of 256 of them stand still."""
    return t.float() if t.is_floating_point() and t.element_size() < 4 else t

"""A recipe whose tasks share one delta, kept apart by orthogonal gradients."""

from __future__ import annotations

import copy
from typing import final

import torch
from torch import Tensor, nn

from tessera import arch, opt, peft
from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch
from tessera.recipes.lora import head_and_sites, over, rank_of
from tessera.recipes.run import Run

__all__ = ["lora_ogd"]

_RANK = 32  # of all tasks together; a step has only what earlier ones left free


def lora_ogd(run: Run) -> None:
    """A base from the first task, and one delta for all later ones, its steps made orthogonal."""
    protect = run.keep("ogd", opt.ogd())
    head, sites = head_and_sites(run)
    run.answer = lambda x, _: over(run.model, run.deltas.get("shared"))(x)
    tree: nn.Module | None = None
    for task in run.tasks():
        if task.id > 1 and tree is None:  # the run was resumed
            tree = _tree(run.model, run.deltas["shared"], head)
        model = run.model if tree is None else tree
        optimizer = run.keep("optimizer", _adam(run, model, protect if tree else None))

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            return T.cross_entropy(run.mask(model(batch.x), batch.y), batch.y)

        for batch in run.batches(task):
            run.log(step(batch))
        if tree is None:
            r = rank_of(run.model, sites, _RANK)
            made = peft.lora(run.model, r, sites=sites, head=head, seed=run.seed)
            run.deltas["shared"] = made
            tree = _tree(run.model, made, head)
            optimizer = _adam(run, tree, protect)  # whom the anchor tells what to protect
        arch.anchor_from(tree, f"task{task.id}", fisher=None, data=run.examples(task))


def _adam(run: Run, model: nn.Module, plugin: tg.Transform | None) -> torch.optim.Adam:
    return tg.Adam([p for p in model.parameters() if p.requires_grad], lr=run.lr, plugin=plugin)


def _tree(base: nn.Module, delta: arch.Delta, head: str) -> nn.Module:
    """The base, which stands still from now on, with the delta's tensors as layers of their own.

    What `peft.apply` gives computes the same; but `opt.ogd` protects layers, and looks for them.
    The delta's tensors and the layers' weights are the same memory.
    """
    base.eval().requires_grad_(False)
    tree: nn.Module = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    last = tree.get_submodule(head)
    for name, _ in list(last.named_parameters()):
        setattr(last, name, _leaf(delta, f"{head}.{name}.full"))
    for site, scale in delta.scales.items():
        down, up = _leaf(delta, f"{site}.A"), _leaf(delta, f"{site}.B")
        tree.set_submodule(site, _Site(tree.get_submodule(site), down, up, scale))
    return tree


def _leaf(delta: arch.Delta, name: str) -> nn.Parameter:
    return nn.Parameter(delta.tensors[name].detach())


@final
class _Site(nn.Module):
    """``y = layer(x) + scale * up(down(x))``."""

    def __init__(
        self, layer: nn.Module, down: nn.Parameter, up: nn.Parameter, scale: float
    ) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.down = nn.Linear(down.shape[1], down.shape[0], bias=False, device="meta")
        self.up = nn.Linear(up.shape[1], up.shape[0], bias=False, device="meta")
        self.down.weight, self.up.weight = down, up

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in] to [n, out]."""
        y: Tensor = self.layer(x) + self.scale * self.up(self.down(x))
        return y

"""A meta-batch over several processes: their gradients, averaged in a fixed order."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from tessera.errors import InputError

__all__ = ["all_reduce_grads"]

_HALF = (torch.float16, torch.bfloat16)


def all_reduce_grads(
    params_or_model: nn.Module | Iterable[Tensor],
    *,
    group: torch_dist.ProcessGroup | None = None,
) -> None:
    """Average ``.grad`` over the ranks, between ``backward()`` and ``step()``.

    Each rank takes its share of the meta-batch, and all of them call this. The sum over ranks is a
    binary tree in the order of the ranks, so every rank gets the same bits, and gets them again in
    every run. W ranks with one task each, or with equal shares that are powers of two and summed
    pairwise, give the bits that one process gives that sums its tasks pairwise; otherwise the two
    agree to rounding.

    A rank whose loss did not reach a parameter counts as zero there. Where no rank has a gradient,
    ``.grad`` stays None. Without `torch.distributed`, or in a group of one, nothing happens.

    The average is over ranks: where they have different numbers of tasks, scale each rank's loss
    by ``tasks_here * world / tasks_in_all`` before ``backward()``.

    Args:
        params_or_model: What was differentiated; the same on every rank, in the same order.
        group: The processes that take part; None for all of them.

    Raises:
        InputError: ``WORLD_SIZE`` says that there are several processes and torch.distributed is
            not initialised; this process is not in `group`; the ranks hold different parameters; a
            gradient is sparse. It is raised on every rank, with every ``.grad`` as it was.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> all_reduce_grads(layer)  # one process: as it was
        >>> layer.weight.grad
        tensor([[1., 1.]])
    """
    world = _world(group)
    if world == 1:
        return
    given = params_or_model
    params = list(given.parameters() if isinstance(given, nn.Module) else given)
    params = [p for p in params if p.requires_grad]
    if not params:
        raise InputError("all_reduce_grads got no parameter that requires a gradient")
    for like in _buckets(params, _present(params, world, group)):
        _average(like, world, group)


def _world(group: torch_dist.ProcessGroup | None) -> int:
    """How many processes take part; 1 where torch.distributed is not used."""
    if torch_dist.is_available() and torch_dist.is_initialized():
        world = torch_dist.get_world_size(group)
        if world < 1:
            raise InputError(
                f"all_reduce_grads: rank {torch_dist.get_rank()} is not in the group; call it on "
                "the group's ranks only"
            )
        return world
    expected = os.environ.get("WORLD_SIZE", "1")
    if expected.isdigit() and int(expected) > 1:
        raise InputError(
            f"all_reduce_grads: WORLD_SIZE is {expected}, but torch.distributed is not "
            'initialised; call torch.distributed.init_process_group("gloo") (or "nccl") first'
        )
    return 1


def _present(params: list[Tensor], world: int, group: torch_dist.ProcessGroup | None) -> list[bool]:
    """Which parameters have a gradient on some rank, once all ranks agree on what they hold.

    Two small exchanges before the large one: ranks that disagree would otherwise wait for ever, or
    add up what does not belong together.
    """
    device = params[0].device
    layout = repr([(tuple(p.shape), str(p.dtype)) for p in params]).encode()
    digest = hashlib.blake2b(layout, digest_size=7).digest()
    mine = torch.tensor([int.from_bytes(digest, "little"), len(params)], device=device)
    seen = [torch.empty_like(mine) for _ in range(world)]
    torch_dist.all_gather(seen, mine, group=group)
    if any(not torch.equal(s, mine) for s in seen):
        counts = ", ".join(str(int(s[1])) for s in seen)
        raise InputError(
            "all_reduce_grads: the ranks hold different parameters (tensors by rank: "
            f"{counts}); pass the same model, in the same order, on every rank"
        )
    # 0: none, 1: dense, 2: sparse. A rank must not raise alone: the others would wait for it.
    kinds = [0 if p.grad is None else 1 + (p.grad.layout != torch.strided) for p in params]
    flags = torch.tensor(kinds, device=device)
    torch_dist.all_reduce(flags, op=torch_dist.ReduceOp.MAX, group=group)
    if int(flags.max()) > 1:
        raise InputError(
            "all_reduce_grads needs dense gradients, and a parameter has a sparse one; build the "
            "embedding with sparse=False"
        )
    return [bool(f) for f in flags.tolist()]


def _buckets(params: list[Tensor], present: list[bool]) -> list[list[Tensor]]:
    """The parameters to average, those of one dtype and device together."""
    found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for p, there in zip(params, present, strict=True):
        if there:
            found[p.dtype, p.device].append(p)
    return list(found.values())


def _average(params: list[Tensor], world: int, group: torch_dist.ProcessGroup | None) -> None:
    """Average the gradients of parameters of one dtype and device.

    Each rank adds up one shard of everything, by the tree, and hands the sum to the others: the
    traffic of a ring all-reduce, in an order that does not depend on who was first.
    """
    count = sum(p.numel() for p in params)
    wide = torch.float32 if params[0].dtype in _HALF else params[0].dtype
    flat = torch.zeros(-(-count // world) * world, dtype=wide, device=params[0].device)
    pieces = torch.split(flat[:count], [p.numel() for p in params])
    for piece, p in zip(pieces, params, strict=True):
        if p.grad is not None:
            piece.copy_(p.grad.reshape(-1))
    shards = torch.empty_like(flat)
    torch_dist.all_to_all_single(shards, flat, group=group)
    mine = _tree(list(shards.view(world, -1))) / world
    torch_dist.all_gather_into_tensor(flat, mine, group=group)
    for piece, p in zip(pieces, params, strict=True):
        average = piece.view_as(p).to(p.dtype)
        if p.grad is None:
            p.grad = average.clone()  # a view would keep all of `flat` alive
        else:
            p.grad.detach().copy_(average)


def _tree(rows: list[Tensor]) -> Tensor:
    """Their sum, neighbours first: (0+1)+(2+3) and so on; an odd one out waits."""
    while len(rows) > 1:
        pairs = [a + b for a, b in zip(rows[::2], rows[1::2], strict=False)]
        rows = pairs + rows[2 * len(pairs) :]
    return rows[0]

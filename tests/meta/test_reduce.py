"""all_reduce_grads over real gloo processes: against one process, in bits and in words."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tessera.errors import InputError
from tessera.meta.reduce import _tree, all_reduce_grads

# What the ranks and the one process have in common; a rank is a process, so it is a script.
COMMON = """
import sys, torch, torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from tessera import graph as tg
from tessera.errors import InputError
from tessera.meta.implicit import implicit_bilevel
from tessera.meta.reduce import all_reduce_grads

def net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)

def learn(model, i, dtype):
    g = torch.Generator().manual_seed(i)
    batch = torch.randn(8, 3, generator=g, dtype=dtype), torch.arange(8) % 2
    implicit_bilevel(model, inner=lambda m: tg.SGD(m, lr=0.1, steps=5),
                     train_batch=batch, val_batch=batch, tol=1e-5).backward()
"""
RANK = """
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
pair = dist.new_group([0, 1])

def grads(model, name):
    return {f"{name}.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}

out = {}
for dtype in (torch.float32, torch.float64):
    if rank < 2:
        model = net(dtype)
        learn(model, rank, dtype)
        all_reduce_grads(model, group=pair)
        out |= grads(model, f"pair.{dtype}")
    model = net(dtype)
    learn(model, rank, dtype)
    all_reduce_grads(model.parameters())
    out |= grads(model, f"three.{dtype}")

# Unequal gradients: one rank has none of the first layer, nobody has one of the last.
model = nn.ModuleList([nn.Linear(2, 1, bias=False) for _ in range(3)]).to(torch.bfloat16)
if rank != 1:
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
model[1].weight.grad = torch.full_like(model[1].weight, float(rank))
held = model[1].weight.grad
all_reduce_grads(model)
assert model[1].weight.grad is held
out |= grads(model, "some")

said = []
def refused(call):
    try:
        call()
    except InputError as error:
        said.append(str(error))
    else:
        said.append("nothing")

refused(lambda: all_reduce_grads(nn.Linear(2 + (rank == 1), 1)))
sparse = nn.Embedding(4, 2, sparse=True)
sparse(torch.tensor([1])).sum().backward()
if rank:
    sparse.weight.grad = None
refused(lambda: all_reduce_grads(sparse))
refused(lambda: all_reduce_grads(model, group=pair) if rank == 2 else None)
save_file({n: t.contiguous() for n, t in out.items()}, f"{sys.argv[1]}/{rank}.safetensors")
open(f"{sys.argv[1]}/{rank}.txt", "w").write("\\n".join(said))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Three ranks' gradients and what they were refused."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", COMMON + RANK, str(folder)],
            env={**env, "RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(3)
    ]
    try:
        ended = [(p.communicate(timeout=120)[1], p.returncode) for p in started]
    finally:
        for p in started:
            p.kill()
    assert [code for _, code in ended] == [0, 0, 0], "\n".join(text for text, _ in ended)
    return (
        [load_file(folder / f"{r}.safetensors") for r in range(3)],
        [Path(folder / f"{r}.txt").read_text().split("\n") for r in range(3)],
    )


def one_process(tasks, dtype):
    """The gradients of a meta-batch's mean, task by task in one process."""
    scope: dict[str, Any] = {}
    exec(COMMON, scope)  # the very functions that the ranks run
    model = scope["net"](dtype)
    for i in range(tasks):
        scope["learn"](model, i, dtype)
    return {n: p.grad / tasks for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_ranks_are_one_process_bit_for_bit(ranks, dtype):
    for name, expected in one_process(2, dtype).items():
        for rank in (0, 1):
            assert torch.equal(ranks[0][rank][f"pair.{dtype}.{name}"], expected)


def test_three_ranks_agree_and_are_one_process_to_rounding(ranks):
    for name, expected in one_process(3, torch.float64).items():
        got = [r[f"three.{torch.float64}.{name}"] for r in ranks[0]]
        torch.testing.assert_close(got[0], expected, rtol=1e-12, atol=1e-15)
        assert torch.equal(got[0], got[1])
        assert torch.equal(got[0], got[2])


def test_a_missing_gradient_counts_as_zero_and_one_that_nobody_has_stays_missing(ranks):
    for values in ranks[0]:
        assert values["some.0.weight"].tolist() == [[2.0, 2.0]]
        assert values["some.1.weight"].tolist() == [[1.0, 1.0]]
        assert values["some.1.weight"].dtype == torch.bfloat16
        assert "some.2.weight" not in values


def test_every_rank_is_told(ranks):
    for rank, (shapes, sparse, outside) in enumerate(ranks[1]):
        assert "ranks hold different parameters" in shapes
        assert "sparse=False" in sparse
        assert (outside == "nothing") == (rank < 2)
    assert "rank 2 is not in the group" in ranks[1][2][2]


def test_one_process_is_left_alone_and_several_without_a_group_are_an_error(monkeypatch):
    model = nn.Linear(2, 1)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    all_reduce_grads(model)
    assert model.weight.grad is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"WORLD_SIZE is 4, .*init_process_group"):
        all_reduce_grads(model)


def test_the_order_of_the_sum():
    rows = [torch.tensor([v]) for v in (1e8, -1e8, 1.0, 1e-9, 5.0)]
    assert _tree(rows).item() == 6.0  # ((1e8 - 1e8) + (1 + 1e-9)) + 5
    assert _tree(rows[:1]).item() == 1e8
    wide = [torch.randn(4, dtype=torch.float64) for _ in range(6)]
    torch.testing.assert_close(_tree(wide), reduce(torch.add, wide))

"""The C kernel and PyTorch agree to the bit, and nobody waits for a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tessera import arch, opt
from tessera import graph as tg
from tessera.ops import kernels

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    return done.stdout.strip()


@needs_compiler
def test_the_kernel_has_pytorchs_bits_at_every_size() -> None:
    assert kernels.available(wait_s=120)
    for n in (1, 15, 16, 17, 1023, 1025, 70_001):
        theta, c, w, g = (torch.randn(n) for _ in range(4))
        (grad,), total = kernels.pulls([theta], [c], [w])
        assert torch.equal(grad, (theta - c) * w)
        exact = (w.double() * (theta.double() - c.double()).square()).sum()
        scale = (w.double() * (theta.double() - c.double()).square()).abs().sum()
        assert abs(total - exact) <= 1e-6 * scale
        expected = g + (theta - c) * w
        kernels.add_pulls([g], [theta], [c], [w])
        assert torch.equal(g, expected)


@needs_compiler
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("rows", "size", "rank"), [(100, 784, 24), (3, 5, 3), (1, 16, 8), (7, 300, 40), (64, 79, 17)]
)
def test_the_projection_is_that_of_float64(rows: int, size: int, rank: int, biased: bool) -> None:
    assert kernels.available(wait_s=120)
    high = size + biased
    m = torch.zeros(high, -(-rank // 8) * 8)[:, :rank]
    m.copy_(torch.linalg.qr(torch.randn(high, rank))[0])
    before = torch.randn(rows, high)
    after = before + torch.randn(rows, high)
    w, b = after[:, :size].contiguous(), after[:, size:].contiguous()
    w_before, b_before = before[:, :size].contiguous(), before[:, size:].contiguous()
    bias = (b.view(-1), b_before.view(-1)) if biased else None
    assert kernels.project((w, w_before), bias, m)
    left = torch.cat([w, b], 1).double() - before.double()
    update = after.double() - before.double()
    expected = update - update @ m.double() @ m.double().T
    torch.testing.assert_close(left, expected, rtol=0, atol=4e-6)


@needs_compiler
def test_what_the_projection_does_not_take_is_left_alone() -> None:
    assert kernels.available(wait_s=120)
    w, before, m = torch.randn(4, 16), torch.zeros(4, 16), torch.eye(16, 8)
    same = w.clone()
    for given in (
        ((w.double(), before.double()), m.double()),
        ((w.T, before.T), torch.eye(4, 8)),
        ((w, before), m[:, :3].clone()),
        ((w, before), m.T.contiguous().T),
    ):
        assert not kernels.project(given[0], None, given[1])
    assert torch.equal(w, same)


@needs_compiler
def test_what_the_kernel_does_not_take_pytorch_does() -> None:
    assert kernels.available(wait_s=120)
    for tensors in (
        [torch.randn(8, dtype=torch.float64) for _ in range(3)],
        [torch.randn(4, 6).T for _ in range(3)],
        [torch.randn(8, dtype=torch.bfloat16) for _ in range(3)],
    ):
        theta, c, w = tensors
        (grad,), total = kernels.pulls([theta], [c], [w])
        assert torch.equal(grad, (theta - c) * w)
        exact = (w.double() * (theta - c).double().square()).sum()
        torch.testing.assert_close(total, exact, rtol=2e-2, atol=1e-2)
    assert kernels.pulls([torch.ones(2)], [torch.zeros(2)], 3.0)[1].item() == 6.0


TRAIN = """
import torch
from torch import nn
from tessera import arch, opt, trees
from tessera import graph as tg
from tessera.ops import kernels
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Linear(300, 300)
anchor = arch.anchor_from(net, "a", data=[torch.randn(64, 300)])
o = tg.{optimizer}(net.parameters(), lr=1e-2, plugin=opt.consolidate(anchor, lam=10.0))
x = torch.randn(32, 300)
for i in range(30):
    if i == 15:
        kernels.available(wait_s={wait})
    o.zero_grad()
    net(x).square().mean().backward()
    o.step()
print(kernels.available(), trees.sha256(net.state_dict()))
"""


@needs_compiler
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_training_has_the_same_bits_without_the_kernel_and_across_the_swap(
    optimizer: str, tmp_path: Path
) -> None:
    code = TRAIN.format(wait=120, optimizer=optimizer)
    swapped = run(code, XDG_CACHE_HOME=str(tmp_path))
    cached = run(code, XDG_CACHE_HOME=str(tmp_path))
    without = run(code, TESSERA_KERNELS="0")
    assert swapped.startswith("True ")
    assert without.startswith("False ")
    assert swapped.split()[1] == cached.split()[1] == without.split()[1]
    assert len(list((tmp_path / "tessera").iterdir())) == 1


ASK = "from tessera.ops import kernels; print(kernels.available(wait_s=60))"


def test_without_a_compiler_or_a_cache_nothing_breaks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run(ASK, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "a")) == "False"
    assert run(ASK, XDG_CACHE_HOME=str(tmp_path / "file")) == "False"


@needs_compiler
def test_a_library_that_others_could_have_written_is_not_loaded(tmp_path: Path) -> None:
    assert run(ASK, XDG_CACHE_HOME=str(tmp_path)) == "True"
    (library,) = (tmp_path / "tessera").iterdir()
    library.chmod(0o777)
    assert run(ASK, XDG_CACHE_HOME=str(tmp_path)) == "False"
    library.chmod(0o755)
    library.write_bytes(b"not a library")
    assert run(ASK, XDG_CACHE_HOME=str(tmp_path)) == "False"


@needs_compiler
def test_the_first_step_does_not_wait_for_the_compiler(tmp_path: Path) -> None:
    slow = tmp_path / "bin" / "cc"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    code = (
        "import torch; from tessera.ops import kernels;"
        "t = torch.randn(100_000); kernels.add_pulls([t.clone()], [t], [t], [t]);"
        "print(kernels.available())"
    )
    path = f"{slow.parent}:{os.environ['PATH']}"
    assert run(code, PATH=path, XDG_CACHE_HOME=str(tmp_path / "c")) == "False"


@needs_compiler
@pytest.mark.parametrize("kind", [tg.SGD, tg.Adam])
def test_a_step_taken_in_one_pass_leaves_the_gradients_where_they_were(kind: Any) -> None:
    assert kernels.available(wait_s=120)
    net = nn.Linear(300, 300)
    anchor = arch.anchor_from(net, "a", data=[torch.randn(64, 300)])
    optimizer = kind(net.parameters(), lr=1e-2, plugin=opt.consolidate(anchor, lam=10.0))
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(8, 300)).square().mean().backward()
        before = [(p.clone(), p.grad) for p in net.parameters()]
        optimizer.step()
        for p, (old, grad) in zip(net.parameters(), before, strict=True):
            assert p.grad is grad
            assert not torch.equal(p, old)

"""The pull of a quadratic and a projection: PyTorch at first, a C kernel once one is compiled.

The kernel is compiled in the background by the machine's ``cc`` when it is first wanted, which
takes a fraction of a second, and kept in the user's cache. Where there is no compiler, or with
``TESSERA_KERNELS=0``, PyTorch goes on doing the work: the pulls in three passes, to the same bits;
the projection in more calls, to the same precision.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "AdamState",
    "adam_pulls",
    "add_pulls",
    "available",
    "library",
    "project",
    "pulls",
    "sgd_pulls",
]

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
# A float32 dot product over 50 M elements was seen 0.36 % off; over 2^16 it is right to 1e-7.
_CHUNK = 1 << 16
_MANY_THREADS = 4  # from here PyTorch's three parallel passes beat one serial pass


def pulls(
    params: Sequence[Tensor], centres: Sequence[Tensor], weights: Sequence[Tensor] | float
) -> tuple[list[Tensor], Tensor]:
    """``w (theta - c)`` for each parameter, and ``sum w (theta - c)^2`` over all, in float64.

    Example:
        >>> grads, total = pulls([torch.tensor([3.0])], [torch.tensor([1.0])], 0.5)
        >>> grads[0].tolist(), total.item()
        ([1.0], 2.0)
    """
    if not isinstance(weights, float | int):
        kernel = _kernel(params, centres, weights)
        if kernel is not None:
            grads = [torch.empty_like(p) for p in params]
            total = kernel.tessera_pulls(*_arrays(grads, params, centres, weights))
            return grads, torch.tensor(total, dtype=torch.float64)
    grads, parts = [], []
    for i, (p, c) in enumerate(zip(params, centres, strict=True)):
        gap = p - c
        grads.append(gap * (weights if isinstance(weights, float | int) else weights[i]))
        parts += _dots(gap.reshape(-1), grads[-1].reshape(-1), params[0].device)
    return grads, torch.stack(parts).sum(dtype=torch.float64)


def _dots(a: Tensor, b: Tensor, device: torch.device) -> list[Tensor]:
    if a.dtype not in (torch.float32, torch.float64):
        a, b = a.float(), b.float()
    pairs = zip(torch.split(a, _CHUNK), torch.split(b, _CHUNK), strict=True)
    return [torch.dot(x, y).to(device) for x, y in pairs]


def add_pulls(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    centres: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> None:
    """``grad += w (theta - c)`` for each parameter.

    Example:
        >>> g = torch.zeros(1)
        >>> add_pulls([g], [torch.tensor([3.0])], [torch.tensor([1.0])], [torch.tensor([0.5])])
        >>> g.tolist()
        [1.0]
    """
    kernel = _kernel(params, centres, weights)
    if kernel is not None and all(map(_plain, grads)):
        kernel.tessera_add_pulls(*_arrays(grads, params, centres, weights))
        return
    for g, p, c, w in zip(grads, params, centres, weights, strict=True):
        g.add_((p - c).mul_(w))


def sgd_pulls(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    centres: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    lr: float,
) -> bool:
    """``theta -= lr (grad + w (theta - c))`` in one pass, if the kernel takes these.

    Returns:
        False where nothing was done: `add_pulls` and the optimizer's own step do the same.

    Example:
        >>> x = torch.zeros(1, dtype=torch.float16)  # the kernel takes float32 alone
        >>> sgd_pulls([x], [x], [x], [x], lr=0.1)
        False
    """
    kernel = _kernel(params, centres, weights)
    if kernel is None or not _LOADER.rounds_as_sgd or not all(map(_plain, grads)):
        return False
    kernel.tessera_sgd_pulls(*_arrays(grads, params, centres, weights), lr)
    return True


class AdamState(NamedTuple):
    """What Adam knows of each parameter, and its settings.

    Attributes:
        means: Of the gradient.
        squares: Of the squared gradient.
        steps: 0-d, how many have been taken before this one.
        lr: Learning rate.
        betas: Decays of the two means.
        eps: Added to the denominator.
    """

    means: Sequence[Tensor]
    squares: Sequence[Tensor]
    steps: Sequence[Tensor]
    lr: float
    betas: tuple[float, float]
    eps: float


def adam_pulls(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    centres: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: AdamState,
) -> bool:
    """Adam's step on ``grad + w (theta - c)`` in one pass, if the kernel takes these.

    Returns:
        False where nothing was done: `add_pulls` and the optimizer's own step do the same.

    Example:
        >>> x = torch.zeros(1, dtype=torch.float16)  # the kernel takes float32 alone
        >>> adam_pulls([x], [x], [x], [x], AdamState([x], [x], [x], 0.1, (0.9, 0.999), 1e-8))
        False
    """
    kernel = _kernel(params, centres, weights)
    if kernel is None or not _LOADER.rounds_as_adam or torch.get_num_threads() > 1:
        return False  # each of PyTorch's threads has an end of its own that rounds otherwise
    if not all(map(_plain, (*grads, *state.means, *state.squares))):
        return False
    torch._foreach_add_(list(state.steps), 1)
    _run_adam(kernel, grads, params, centres, weights, state)
    return True


def _run_adam(kernel: ctypes.CDLL, *given: Any) -> None:
    """Call the kernel; the steps are counted already."""
    *lists, state = given
    (beta1, beta2), floats = state.betas, ctypes.c_float * len(state.steps)
    counts = [t.item() for t in state.steps]
    rates = floats(*[state.lr / (1 - beta1**t) for t in counts])
    roots = floats(*[math.sqrt(1 - beta2**t) for t in counts])
    kernel.tessera_adam_pulls(
        *_arrays(*lists),
        *(_pointers(state.means), _pointers(state.squares), rates, roots),
        *(1 - beta1, beta2, 1 - beta2, state.eps),
    )


def project(
    weight: tuple[Tensor, Tensor], bias: tuple[Tensor, Tensor] | None, directions: Tensor
) -> bool:
    """Take ``U M M^T`` out of an update U of a layer, if the kernel takes these.

    Its sums are added up in another order than PyTorch's. So that a run has the same bits however
    long the compiler takes, wait for `available` before the first call.

    Args:
        weight: The weight [out, ...] as it is and as it was before the update.
        bias: The same of the bias [out]; None where there is none.
        directions: Orthonormal M [in, r], [in + 1, r] with a bias, in rows that are a multiple of
            8 floats apart, with zeros behind the r.

    Returns:
        False where nothing was done.

    Example:
        >>> w, m = torch.ones(2, 1), torch.eye(1, 8)[:, :1]
        >>> project((w, torch.zeros(2, 1)), None, m) == (w.sum() == 0).item()
        True
    """
    given = (*weight, *(bias or ()))
    if _LOADER.library is None or torch.get_num_threads() >= _MANY_THREADS:
        return False
    wide = directions.stride(0)
    laid = directions.is_cpu and directions.dtype is torch.float32 and directions.stride(1) == 1
    if wide % 8 or not laid or not all(map(_plain, given)):
        return False
    rows = len(weight[0])
    scratch = torch.empty(rows + 64, wide)
    w, before, b, b_before = [t.data_ptr() for t in given] + [None, None][: 4 - len(given)]
    _LOADER.library.tessera_project(
        *(w, before, b, b_before, directions.data_ptr(), scratch.data_ptr()),
        *(rows, weight[0].numel() // rows, wide),
    )
    return True


def _arrays(*lists: Sequence[Tensor]) -> tuple[Any, ...]:
    """Four arrays of pointers, one of sizes, and the count, as the kernel takes them."""
    count = len(lists[0])
    pointers = map(_pointers, lists)
    return *pointers, (ctypes.c_int64 * count)(*[t.numel() for t in lists[0]]), count


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def available(*, wait_s: float = 0.0) -> bool:
    """Whether the kernel is in use, waiting for its compilation for up to `wait_s` seconds.

    Example:
        >>> isinstance(available(), bool)
        True
    """
    _LOADER.begin()
    _LOADER.done.wait(wait_s)
    return _LOADER.library is not None


def library() -> ctypes.CDLL | None:
    """All of the kernel, None as long as there is none; the first call starts its compilation.

    Example:
        >>> library() is None or available()
        True
    """
    if not _LOADER.done.is_set():
        _LOADER.begin()
    return _LOADER.library


def _plain(t: Tensor) -> bool:
    return t.is_cpu and t.dtype is torch.float32 and t.is_contiguous()


def _kernel(
    params: Sequence[Tensor], centres: Sequence[Tensor], weights: Sequence[Tensor]
) -> ctypes.CDLL | None:
    """The compiled kernel, if there is one and it takes these."""
    if _LOADER.library is None:
        if sum(p.numel() for p in params) >= _CHUNK:
            _LOADER.begin()
        return None
    fits = torch.get_num_threads() < _MANY_THREADS and all(
        # The kernel reads as many of each.
        p.shape == c.shape == w.shape and _plain(p) and _plain(c) and _plain(w)
        for p, c, w in zip(params, centres, weights, strict=True)
    )
    return _LOADER.library if fits else None


class _Loader:
    """Compiles, checks and loads the kernel, once a process, off everybody's path."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.rounds_as_sgd = self.rounds_as_adam = False
        self.done = threading.Event()
        self._lock = threading.Lock()
        self._begun = False

    def begin(self) -> None:
        """Start if nobody has; never waits."""
        with self._lock:
            if self._begun:
                return
            self._begun = True
        threading.Thread(target=self._work, name="tessera-kernels", daemon=True).start()

    def _work(self) -> None:
        try:
            if os.environ.get("TESSERA_KERNELS") != "0":
                path = _compiled()
                library = _load(path) if path is not None else None
                if library is not None:
                    pulls_agree, self.rounds_as_sgd = _has_pytorchs_bits(library)
                    self.rounds_as_adam = _has_adams_bits(library)
                    self.library = library if pulls_agree else None
        except (OSError, subprocess.SubprocessError, AttributeError):
            # No compiler, no cache, a foreign file: PyTorch goes on doing the work.
            pass
        finally:
            self.done.set()


def _compiled() -> Path | None:
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source = _SOURCE.read_bytes()
    about = (platform.machine(), platform.node(), torch.backends.cpu.get_cpu_capability(), _FLAGS)
    key = hashlib.sha256(source + repr(about).encode()).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tessera"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = base / f"kernels-{key}.so"
    if not path.exists():
        handle, temporary = tempfile.mkstemp(dir=base, suffix=".so")
        os.close(handle)
        try:
            command = [compiler, *_FLAGS, "-x", "c", str(_SOURCE), "-o", temporary]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


def _load(path: Path) -> ctypes.CDLL | None:
    """The library, unless somebody else could have put it there."""
    for place in (path, path.parent):
        info = place.stat()
        if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
    library = ctypes.CDLL(str(path))
    arrays = (*(ctypes.c_void_p,) * 5, ctypes.c_int64)
    library.tessera_add_pulls.argtypes = arrays
    library.tessera_add_pulls.restype = None
    library.tessera_sgd_pulls.argtypes = (*arrays, ctypes.c_float)
    library.tessera_sgd_pulls.restype = None
    library.tessera_project.argtypes = (*(ctypes.c_void_p,) * 6, *(ctypes.c_int64,) * 3)
    library.tessera_project.restype = None
    library.tessera_adam_pulls.argtypes = (
        *arrays,
        *(ctypes.c_void_p,) * 4,
        *(ctypes.c_float,) * 4,
    )
    library.tessera_adam_pulls.restype = None
    library.tessera_pulls.argtypes = arrays
    library.tessera_pulls.restype = ctypes.c_double
    return library


def _has_pytorchs_bits(library: ctypes.CDLL) -> tuple[bool, bool]:
    """Whether the pulls, and the SGD step, round as PyTorch does, here, on this processor."""
    n = 2053
    theta, c, w, grad = (torch.sin(torch.arange(n) * k) for k in (0.7, 1.3, 2.9, 0.1))
    expected = grad + (theta - c) * w
    library.tessera_add_pulls(*_arrays([grad], [theta], [c], [w]))
    out = torch.empty(n)
    library.tessera_pulls(*_arrays([out], [theta], [c], [w]))
    stepped, moved = nn.Parameter(theta.clone()), theta.clone()
    stepped.grad = expected
    torch.optim.SGD([stepped], lr=0.1).step()
    start = torch.sin(torch.arange(n) * 0.1)
    library.tessera_sgd_pulls(*_arrays([start], [moved], [c], [w]), 0.1)
    pulled = torch.equal(grad, expected) and torch.equal(out, (theta - c) * w)
    return pulled, torch.equal(moved, stepped.detach())


def _has_adams_bits(library: ctypes.CDLL) -> bool:
    """Whether Adam's steps round as PyTorch's fused ones do, here, on this processor."""
    n = 2048
    theta, c, w, grad = (torch.sin(torch.arange(n) * k) for k in (0.7, 1.3, 2.9, 0.1))
    # Whole vectors, and sizes that have an end.
    sizes = [1024, *[7] * 64, *[15] * 16, 336]
    parts = [[t.clone() for t in torch.split(x, sizes)] for x in (theta, c, w, grad)]
    moved, centres, weights, grads = parts
    means, squares = ([torch.zeros(k) for k in sizes] for _ in range(2))
    stepped = [nn.Parameter(t.clone()) for t in moved]
    optimizer = torch.optim.Adam(stepped, lr=0.1, betas=(0.8, 0.99), fused=True)
    for taken in range(3):
        for p, g, ct, wt in zip(stepped, grads, centres, weights, strict=True):
            p.grad = g + (p.detach() - ct) * wt
        optimizer.step()
        steps = [torch.tensor(taken + 1.0) for _ in sizes]
        state = AdamState(means, squares, steps, 0.1, (0.8, 0.99), 1e-8)
        _run_adam(library, grads, moved, centres, weights, state)
    return all(map(torch.equal, moved, [p.detach() for p in stepped]))


_LOADER = _Loader()

"""Counter-based randomness: every draw is a function of (seed, component, position).

Nothing here reads or moves PyTorch's global generator, and nothing has a state to save: a run
that resumes at position 1000 asks for position 1000. Components are named, so that sampling more
from one never shifts another.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["bits", "generator", "key", "permutation"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


def key(seed: int, *path: str | int) -> int:
    """A 64-bit key for the component named by `path`, under `seed`.

    Args:
        seed: Any integer.
        *path: Names and counters, e.g. ``"order", task, epoch``. ``"1"`` and ``1`` differ.

    Returns:
        An integer in [0, 2**64), the same on every machine.

    Example:
        >>> key(0, "order", 1) == key(0, "order", 1), key(0, "order", 1) == key(0, "order", 2)
        (True, False)
    """
    text = repr((int(seed), *path)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def bits(stream_key: int, start: int, count: int) -> npt.NDArray[np.uint64]:
    """64 random bits for each of the positions `start .. start + count - 1`.

    SplitMix64 evaluated at a counter: position t has the value ``mix(key + (t + 1) * golden)``,
    whoever asks and in whatever batches.

    Args:
        stream_key: From `key`.
        start: First position, >= 0.
        count: How many positions, >= 0.

    Returns:
        uint64 array of shape (count,).

    Source:
        Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA.

    Example:
        >>> whole = bits(key(0, "demo"), 0, 6)
        >>> bool((whole[2:5] == bits(key(0, "demo"), 2, 3)).all())
        True
    """
    z = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z *= _GOLDEN
    z += np.uint64(stream_key)
    z ^= z >> _S30
    z *= _MIX_1
    z ^= z >> _S27
    z *= _MIX_2
    z ^= z >> _S31
    return z


def generator(seed: int, *path: str | int) -> torch.Generator:
    """A CPU generator of its own for the component named by `path`.

    Example:
        >>> a = torch.rand(2, generator=generator(0, "init"))
        >>> bool((a == torch.rand(2, generator=generator(0, "init"))).all())
        True
    """
    g = torch.Generator()
    g.manual_seed(key(seed, *path) >> 1)
    return g


def permutation(n: int, seed: int, *path: str | int) -> Tensor:
    """A permutation of 0 .. n-1 that is a function of (seed, path).

    Returns:
        int64 tensor of shape [n].

    Example:
        >>> sorted(permutation(4, 0, "order", 1).tolist())
        [0, 1, 2, 3]
    """
    return torch.randperm(n, generator=generator(seed, *path))

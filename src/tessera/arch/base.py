"""The base of a delta: which model it is, told by the bytes of its weights."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

__all__ = ["base_hash", "named", "placement", "root", "root_of", "structure"]

_LOCK = threading.Lock()
_HASHES: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], str]] = (
    weakref.WeakKeyDictionary()
)
_ROOTS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
_HASHED_AT_ONCE = 1 << 24  # bytes from which on several threads pay


def base_hash(model: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of the model's parameters.

    Buffers do not count: running statistics change with every forward in train mode. The value is
    kept until a parameter changes, as autograd's version counters tell it; a write through
    ``parameter.data`` goes past those counters, and past this.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> before = base_hash(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1)
        >>> base_hash(model) == before
        False
    """
    modules = named(model)
    now = tuple(
        n
        for module in modules.values()
        for p in module.__dict__["_parameters"].values()
        if p is not None
        for n in (id(p), p.data_ptr(), p._version)
    )
    with _LOCK:
        known = _HASHES.get(model)
    if known is not None and known[0] == now:
        return known[1]
    parameters = list(model.named_parameters())
    if sum(p.nbytes for _, p in parameters) < _HASHED_AT_ONCE:
        digests = [_digest(p) for _, p in parameters]
    else:
        with ThreadPoolExecutor(max_workers=min(8, torch.get_num_threads() * 2)) as pool:
            digests = list(pool.map(_digest, (p for _, p in parameters)))
    whole = hashlib.sha256()
    each = sorted(zip(parameters, digests, strict=True), key=lambda pair: pair[0][0])
    for (name, p), digest in each:
        whole.update(f"{name}:{p.dtype}:{tuple(p.shape)};".encode() + digest)
    with _LOCK:
        _HASHES[model] = (now, whole.hexdigest())
    return whole.hexdigest()


def _digest(p: Tensor) -> bytes:
    data = p.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(data.view(torch.uint8).numpy().data).digest()


def root(model: nn.Module) -> nn.Module:
    """Declare `model` the whole that its submodules belong to, and return it.

    A delta made from a part, ``peft.lora(model.layers.attn, r=8)``, then names its sites as the
    whole does, and `peft.fit` knows what to run.

    Example:
        >>> model = root(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
        >>> root_of(model[1]) is model
        True
    """
    with _LOCK:
        for part in model.modules():
            _ROOTS[part] = weakref.ref(model)
    return model


def root_of(module: nn.Module) -> nn.Module:
    """The whole that was declared for `module` with `root`; else `module` itself.

    Example:
        >>> alone = nn.Linear(1, 1)
        >>> root_of(alone) is alone
        True
    """
    with _LOCK:
        found = _ROOTS.get(module)
    whole = found() if found is not None else None
    return module if whole is None else whole


def placement(part: nn.Module, whole: nn.Module) -> str | None:
    """The name of `part` in `whole`; "" for itself, None where it is not in there.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> placement(model[0], model), placement(nn.Linear(1, 1), model)
        ('0', None)
    """
    return next((name for name, module in named(whole).items() if module is part), None)


def named(model: nn.Module) -> dict[str, nn.Module]:
    """``dict(model.named_modules())``, which is asked for at every attach, in a fifth of the time.

    Example:
        >>> list(named(nn.Sequential(nn.Linear(1, 1))))
        ['', '0']
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[name] = module
        inside: dict[str, nn.Module | None] = module.__dict__["_modules"]
        if inside:
            dot = f"{name}." if name else ""
            waiting += [(dot + n, m) for n, m in reversed(inside.items()) if m is not None]
    return found


def structure(model: nn.Module) -> tuple[int, ...]:
    """What a shadow of `model` depends on: its modules, their modes, and whose tensors they hold.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> before = structure(model)
        >>> structure(model) == before, structure(model.eval()) == before
        (True, False)
    """
    return tuple(_walk(model))


def _walk(model: nn.Module) -> Iterator[int]:
    waiting = [model]
    while waiting:
        module = waiting.pop()
        inside = module.__dict__
        yield id(module) * 2 + inside["training"]
        yield from map(id, inside["_parameters"].values())
        yield from map(id, inside["_buffers"].values())  # which `model.to(...)` replaces
        waiting += [child for child in inside["_modules"].values() if child is not None]

"""What "exactly equal" means for checkpoints: types, order, bits."""

import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.arch.anchor import Anchor
from tessera.checkpoint import State


def canonical(value: Any) -> Any:
    """A value whose ``==`` is exact: every type, key order and bit is in it."""
    if isinstance(value, Tensor):
        flat = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return "tensor", value.dtype, tuple(value.shape), flat.view(torch.uint8).tolist()
    if isinstance(value, Anchor):
        return "anchor", value.name, canonical(dict(value.params)), canonical(dict(value.stats))
    if isinstance(value, State):
        return "state", [canonical(getattr(value, name)) for name in State.__dataclass_fields__]
    if isinstance(value, float):
        return "float", struct.pack(">d", value)
    if isinstance(value, dict):
        return "dict", [(canonical(k), canonical(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [canonical(v) for v in value]
    return type(value).__name__, value


@pytest.fixture(scope="session")
def exact() -> Callable[[Any], Any]:
    return canonical

"""The server: one model, a delta for each tenant. Needs the extra `serve`; loaded lazily."""

from __future__ import annotations

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from tessera.serve.app import App, make_app
    from tessera.serve.async_client import AsyncClient
    from tessera.serve.blobs import Blobs
    from tessera.serve.client import Client
    from tessera.serve.engine import Engine
    from tessera.serve.fitting_values import FitSettings, Origin
    from tessera.serve.gates import Policy
    from tessera.serve.learning_values import LearningPolicy
    from tessera.serve.listen import Server
    from tessera.serve.past import replay
    from tessera.serve.registry import Registry
    from tessera.serve.rollout_values import Shots, Watch
    from tessera.serve.service import Service, ServiceSettings
    from tessera.serve.settings import AppSettings

__all__ = [
    "App",
    "AppSettings",
    "AsyncClient",
    "Blobs",
    "Client",
    "Engine",
    "FitSettings",
    "LearningPolicy",
    "Origin",
    "Policy",
    "Registry",
    "Server",
    "Service",
    "ServiceSettings",
    "Shots",
    "Watch",
    "make_app",
    "replay",
]

_WHERE = {
    "App": "app",
    "AppSettings": "settings",
    "AsyncClient": "async_client",
    "Blobs": "blobs",
    "Client": "client",
    "Engine": "engine",
    "FitSettings": "fitting_values",
    "LearningPolicy": "learning_values",
    "Origin": "fitting_values",
    "Policy": "gates",
    "Registry": "registry",
    "Server": "listen",
    "Service": "service",
    "ServiceSettings": "service",
    "Shots": "rollout_values",
    "Watch": "rollout_values",
    "make_app": "app",
    "replay": "past",
}


def __getattr__(name: str) -> _typing.Any:
    """Load what is asked for: the web framework and the database should cost others nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = _importlib.import_module(f"tessera.serve.{_WHERE[name]}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"tessera.serve.{name} needs the extra serve ({error}): "
            "pip install 'tessera-lifelong[serve]'"
        ) from error
    return getattr(module, name)

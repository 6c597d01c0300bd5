"""Code of the user's that a command is given by name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tessera.errors import InputError, UnknownNameError, unknown_name

__all__ = ["load_function", "run_file"]


def run_file(name: str) -> ModuleType:
    """The module that a Python file makes, run as ``python FILE.py`` runs it.

    Raises:
        InputError: There is no such file.

    Example:
        >>> run_file("nowhere.py")
        Traceback (most recent call last):
        tessera.errors.InputError: there is no file 'nowhere.py'
    """
    if not Path(name).is_file():
        raise InputError(f"there is no file {name!r}")
    spec = importlib.util.spec_from_file_location(f"_tessera_cli_{Path(name).stem}", name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    folder = str(Path(name).resolve().parent)
    sys.path.insert(0, folder)  # as python FILE.py does
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def load_function(name: str) -> Callable[..., Any]:
    """The function that ``PKG:FUNC`` or ``FILE.py:FUNC`` names; packages also of this folder.

    Raises:
        InputError: The name is of neither form, or there is no such file.
        UnknownNameError: The package cannot be imported, or has no such function.

    Example:
        >>> load_function("math:sqrt")(9.0)
        3.0
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise InputError(f"name the function as PKG:FUNC or FILE.py:FUNC, got {name!r}")
    if place.endswith(".py"):
        module = run_file(place)
    else:
        sys.path.insert(0, str(Path.cwd()))  # an installed script has only its own folder there
        try:
            module = importlib.import_module(place)
        except (ImportError, ValueError) as error:
            raise UnknownNameError(f"{name!r}: {place!r} cannot be imported ({error})") from error
        finally:
            sys.path.remove(str(Path.cwd()))
    found: Callable[..., Any] | None = getattr(module, function, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise unknown_name(f"function in {place}", function, known)
    return found

"""Compiled graphs on disk: found, built by a process of their own, loaded."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import json
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tessera.errors import StorageError
from tessera.graph import store
from tessera.graph.ir import Program
from tessera.graph.text import text

__all__ = ["Kernel", "Unbuilt", "build", "cache_folder", "compiler", "load", "place"]

Kernel: TypeAlias = Callable[[list[Tensor]], list[Tensor]]
_WORKER = "tessera.meta.compiled_worker"
_RECIPE = Path(__file__).with_name("compiled_worker.py")
_running: set[subprocess.Popen[bytes]] = set()
_lock, _over = threading.Lock(), threading.Event()
_ABANDONED_S = 86400.0


class Unbuilt(Exception):
    """There is no compiled form; the message says why. It never leaves the package."""


def cache_folder() -> Path:
    """Where compiled graphs are kept: a folder of this user that nobody else can write to.

    Raises:
        Unbuilt: It cannot be made, or it is another's.

    Example:
        >>> cache_folder().name
        'tessera'
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tessera"
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Unbuilt(f"its cache {base} cannot be made: {error.strerror}") from error
    _require_ours(base)
    return base


def _require_ours(path: Path) -> None:
    info = path.stat()
    if os.name == "posix" and (
        info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise Unbuilt(f"{path} can be written by others, and what lies there is run as code")


def place(program: Program, devices: Sequence[str]) -> Path:
    """The file of a program's compiled form: a digest of what is computed, and of the machine.

    Args:
        program: Without constants; its text holds ops, shapes and dtypes.
        devices: Of its inputs.

    Raises:
        Unbuilt: There is no place for it.
    """
    machine = [
        torch.__version__,
        platform.machine(),
        platform.node(),  # the code is for this very processor
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),  # it is in the loops
        torch.version.cuda,
        torch.version.hip,
        *(
            str(torch.cuda.get_device_properties(d))
            for d in sorted(set(devices))
            if d.startswith("cuda")
        ),
    ]
    about = json.dumps([text(program), list(devices), machine, _RECIPE.read_text()])
    return cache_folder() / f"meta-{hashlib.sha256(about.encode()).hexdigest()[:32]}.pt2"


def compiler() -> str:
    """The C++ compiler that PyTorch's code generation will call.

    Raises:
        Unbuilt: There is none.
    """
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise Unbuilt(
            f"there is no C++ compiler {name!r} on this machine (apt-get install g++, or set CXX)"
        )
    return name


def build(program: Program, devices: Sequence[str], path: Path) -> None:
    """Compile `program` into the file `path`, in another process, which may take minutes.

    That process has a folder of its own for what PyTorch's compilers write, and it goes with it.

    Raises:
        Unbuilt: It failed.
    """
    compiler()
    for left in path.parent.glob("building-*"):  # by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
        graph, out = Path(folder) / "graph.safetensors", Path(folder) / "compiled.pt2"
        try:
            store.write(graph, program)
        except StorageError as error:
            raise Unbuilt(str(error)) from error
        command = [sys.executable, "-P", "-m", _WORKER, str(graph), str(out)]
        command += [json.dumps(list(devices)), str(torch.get_num_threads())]
        with _without_blanks(folder) as (packages, work):
            inside = {"TORCHINDUCTOR_CACHE_DIR": work, "TRITON_CACHE_DIR": f"{work}/triton"}
            if packages:
                inside["PYTHONPATH"] = os.pathsep.join(filter(None, (packages, *_python_path())))
            code, said = _run(command, {**os.environ, **inside})
        if code != 0 or not out.exists():
            lines = said.decode(errors="replace").strip().splitlines()
            raise Unbuilt(f"its compilation failed ({lines[-1] if lines else f'exit {code}'})")
        os.replace(out, path)


@contextlib.contextmanager
def _without_blanks(folder: str) -> Iterator[tuple[str, str]]:
    """Where torch lies ("": where it is found anyway), and `folder`, by names without a blank.

    PyTorch gives both to the compiler unquoted.
    """
    packages = str(Path(torch.__file__).parents[1])
    if " " not in packages + folder:
        yield "", folder
        return
    with tempfile.TemporaryDirectory(prefix="tessera-") as short:
        names = []
        for name, target in (("packages", packages), ("work", folder)):
            os.symlink(target, f"{short}/{name}", target_is_directory=True)
            names.append(f"{short}/{name}")
        yield names[0], names[1]


def _python_path() -> list[str]:
    """What the process would have had, and this package, wherever it is run from."""
    return [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])]


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, bytes]:
    with _lock:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            process_group=0 if os.name == "posix" else None,  # with the compilers it starts
        )
        _running.add(process)
    try:
        _, said = process.communicate()
    finally:
        _end(process)
    if _over.is_set():
        raise SystemExit  # ends the thread that waited, and says nothing
    return process.returncode, said


def _end(process: subprocess.Popen[bytes]) -> None:
    with _lock:
        _running.discard(process)
    if process.poll() is None:
        with contextlib.suppress(OSError):
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()


@atexit.register
def _end_all() -> None:
    """A program that ends leaves no compiler behind."""
    _over.set()
    for process in list(_running):
        _end(process)


def load(path: Path, device: torch.device) -> Kernel:
    """The compiled form in the file `path`.

    Raises:
        Unbuilt: It is not there, is not ours, or cannot be loaded; the last removes it.
    """
    if not path.exists():
        raise Unbuilt("it was not compiled yet")
    _require_ours(path)
    inductor: Any = importlib.import_module("torch._inductor")  # not at import: it brings sympy
    index = device.index if device.type == "cuda" and device.index is not None else -1
    try:
        run: Kernel = inductor.aoti_load_package(str(path), device_index=index).loader.boxed_run
    except (RuntimeError, OSError) as error:
        path.unlink(missing_ok=True)
        raise Unbuilt(f"{path} was damaged ({error}); it is removed") from error
    return run

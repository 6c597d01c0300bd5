"""The registry's storage: what a change, an audit event and a look at the picture take.

    python benchmarks/registry.py [postgresql+psycopg://user:password@host/name]

SQLite in a folder of its own under build/ (WAL, synchronous=FULL: each change waits for the disk),
and the same on PostgreSQL where a URL of an empty database is given. A delta of LoRA over 12 sites,
295 kB; 1,000 aliases are there already. The disk's own flush is measured beside: it is the floor.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from _timing import machine
from tessera.arch import Delta
from tessera.serve.blobs import Blobs, pack, unpack
from tessera.serve.registry import Registry

BODY = {
    "alias": "mini",
    "request": "0" * 32,
    "delta": "ab" * 32,
    "batch": 7,
    "rows": [0, 1],
    "ms": 1.25,
}


def lora(seed: int) -> Delta:
    made = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(6):
        for name in ("query", "value"):
            site = f"encoder.layer.{layer}.attention.self.{name}"
            tensors[f"{site}.A"] = torch.randn(8, 384, generator=made)
            tensors[f"{site}.B"] = torch.randn(384, 8, generator=made)
    return Delta(kind="lora", tensors=tensors, scales={n[:-2]: 2.0 for n in tensors})


def show(name: str, act: Callable[[], object], times: int, each: int = 1) -> None:
    act()
    wall, cpu = [], time.process_time()
    for _ in range(times):
        begun = time.perf_counter()
        act()
        wall.append(time.perf_counter() - begun)
    cpu = (time.process_time() - cpu) / times
    middle = statistics.median(wall)
    print(
        f"  {name:<34} {1e3 * middle:9.4f} ms ({1e3 * min(wall):.4f} .. {1e3 * max(wall):.4f}), "
        f"{1e3 * cpu:.4f} ms CPU; {each / middle:,.0f}/s"
    )


def flush(folder: str) -> Callable[[], None]:
    file = os.open(f"{folder}/flushed", os.O_CREAT | os.O_WRONLY)

    def act() -> None:
        os.pwrite(file, b"x" * 4096, 0)
        os.fsync(file)

    return act


def measure(url: str, folder: str) -> None:
    blobs = Blobs(f"{folder}/blobs")
    registry = Registry(url, blobs, base_hash="")
    secret = registry.first_admin_key(None)
    assert secret is not None, "give an empty database"
    admin = registry.authenticate(secret)
    registry.create_tenant("acme", by=admin, max_deltas=100_000)
    first = registry.put_delta("acme", lora(0), by=admin).hash
    for i in range(999):
        registry.set_alias("acme", f"alias-{i}", first, generation=0, by=admin)
    registry.set_alias("acme", "mini", first, generation=0, by=admin)
    other, generation = Registry(url, blobs, base_hash=""), count(1)
    seeds, deltas = count(1), [lora(seed) for seed in range(1, 65)]
    data = pack(deltas[0])
    entries = [("request", "acme", BODY)] * 64

    def swap() -> object:
        return registry.set_alias("acme", "mini", first, generation=next(generation), by=admin)

    def swap_and_see() -> object:
        swap()
        return other.refresh()

    show("pack, 295 kB", lambda: pack(deltas[0]), 50)
    show("unpack", lambda: unpack(data), 50)
    show(
        "put_delta, new", lambda: registry.put_delta("acme", deltas[next(seeds) - 1], by=admin), 50
    )
    show("put_delta, the same again", lambda: registry.put_delta("acme", deltas[0], by=admin), 50)
    show("load", lambda: registry.load(first), 50)
    show("set_alias", swap, 100)
    show("set_alias, and another's refresh", swap_and_see, 100)
    show("refresh, nothing new", other.refresh, 300)
    show("audit.append, 1 a transaction", lambda: registry.audit.append(*entries[0]), 200)
    show("audit.extend, 64 a transaction", lambda: registry.audit.extend(entries), 50, each=64)
    show("authenticate", lambda: registry.authenticate(secret), 10_000)
    show("view, and an alias in it", lambda: registry.view().aliases["acme", "mini"], 10_000)
    show("open, 1,000 aliases", lambda: Registry(url, blobs, base_hash="").close(), 10)
    events = registry.audit.head()[0]
    show(f"audit.verify, {events:,} events", registry.audit.verify, 5, each=events)
    other.close()
    registry.close()


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    Path("build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="build") as folder:
        show("a page written and flushed", flush(folder), 100)
        print("SQLite:")
        measure(f"sqlite:///{folder}/registry.db", folder)
        for url in sys.argv[1:]:
            print("PostgreSQL:")
            measure(url, f"{folder}/postgresql")


if __name__ == "__main__":
    main()

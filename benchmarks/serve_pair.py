"""How soon a second process of the server serves what the first one changed.

    python benchmarks/serve_pair.py [swaps] [--db postgresql+psycopg://...]

Two real server processes on one registry (a PostgreSQL database; by default an SQLite file), one
client at each. The alias is moved through one of them and asked of the other, back to back, until
that one answers with the new delta: the time between the acknowledgement and that answer. Claim:
below one second, the worst of them too. Needs: pip install 'tessera-lifelong[serve]'
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from _served import Line, Served, drawn, net
from _timing import machine
from tessera.serve.client import Client

ASKED = {"input": torch.linspace(-1.0, 1.0, 12).reshape(2, 6)}


@contextlib.contextmanager
def pair(folder: Path, db: str = "", blobs: str = "") -> Iterator[tuple[Served, Served]]:
    """Two servers over one registry and one place of blobs; in the end both are gone."""
    both = []
    for name in ("one", "other"):
        (folder / name).mkdir()
        both.append(
            Served(
                folder / name,
                db=db or f"sqlite:///{folder}/registry.db",
                blobs=blobs or str(folder / "blobs"),
            )
        )
    try:
        for one in both:
            one.begin()
        for one in both:
            one.wait()
        yield both[0], both[1]
    finally:
        for one in both:
            if one.process is not None:
                one.process.kill()
                one.process.wait()


def lags(through: Served, seen_by: Served, secret: str, swaps: int) -> list[float]:
    """Seconds from each swap's acknowledgement to the first answer that has it."""
    base, found = net(), []
    line = Line(seen_by.port, secret)
    with Client(through.url, secret) as client, contextlib.closing(line):
        hashes = [client.upload(drawn(base, "net", n)).hash for n in range(3)]
        generation = client.set_alias("pair", hashes[0], generation=0).generation
        for number in range(swaps):
            time.sleep(0.13 * (number % 5))  # at all moments between two looks
            new = client.set_alias("pair", hashes[(number + 1) % 3], generation=generation)
            begun, generation = time.perf_counter(), new.generation
            while True:
                said = line.infer("pair", ASKED, f"pair-{number}-{time.perf_counter_ns()}")
                if said.generation == generation:
                    break
                assert time.perf_counter() - begun < 30, "the swap is not seen"
            found.append(time.perf_counter() - begun)
            assert said.delta == new.delta
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("swaps", type=int, nargs="?", default=40)
    parser.add_argument("--db", default="", help="an empty database of a PostgreSQL server")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as folder, pair(Path(folder), args.db) as (one, other):
        found = lags(one, other, one.tenant("acme"), args.swaps)
        print(f"{args.db.partition(':')[0] or 'sqlite'}, {len(found)} swaps seen by the other:")
        print(f"  median {statistics.median(found):.3f} s, worst {max(found):.3f} s   below 1 s")


if __name__ == "__main__":
    main()

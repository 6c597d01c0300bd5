"""Whose answer is it? Tenants beside each other while all their aliases are moved all the time.

    python benchmarks/serve_isolation.py [requests of each client]

A real server process with fewer slots than deltas in use; 8 tenants with 5 versions each (LoRA of
several ranks, IA3, masks, heads), 16 clients that ask all tenants in turn, and two threads that
move aliases and roll them back without a pause. Each answer is compared with what every version of
every tenant answers: it must be one of its own tenant's, the one that its header, its version and
the audit log name, and no older than the swaps that were acknowledged when it was asked. Claim:
nothing is anybody else's, half swapped, lost, or there twice. By default 10,000 requests a client.
Needs: pip install 'tessera-lifelong[serve]'
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from _served import WIDTH, Line, Said, Served, drawn, net
from _timing import machine
from tessera import peft, random
from tessera.serve.client import Client

TENANTS, CLIENTS, VERSIONS, INPUTS, SLOTS = 8, 16, 5, 24, 6
NEAR, APART = 1e-5, 1e-3
# What there must be none of.
NONE = (
    "refused", "of another request", "of another shape", "of no whole delta", "of another tenant",
    "of another delta than it names", "older than was acknowledged", "not in the log",
    "twice in the log", "in the log, and of nobody", "told wrongly in the log",
    "of another delta than its generation's",
)  # fmt: skip


class Trial:
    """What is asked, what may be answered, and what was."""

    def __init__(self, folder: Path) -> None:
        self.served = Served(folder, options=["--slots", str(SLOTS), "--deadline-ms", "1"])
        base, draw = net(), random.generator(0, "isolation.inputs")
        self.inputs = [torch.randn(1 + i % 3, WIDTH, generator=draw) for i in range(INPUTS)]
        self.names = [f"tenant-{t}" for t in range(TENANTS)]
        self.deltas = [
            [drawn(base, "net", VERSIONS * t + v) for v in range(VERSIONS)] for t in range(TENANTS)
        ]
        every = [delta for own in self.deltas for delta in own]
        self.hashes = [delta.hash for delta in every]
        with torch.no_grad():
            self.right = [
                torch.stack([peft.apply(base, delta)(x) for delta in every]) for x in self.inputs
            ]
        for answers in self.right:  # no answer could be taken for another
            apart = (answers[:, None] - answers[None]).abs().amax((2, 3))
            assert float((apart + torch.eye(len(every))).min()) > APART
        self.acknowledged = [1] * TENANTS
        self.found: Counter[str] = Counter(dict.fromkeys(NONE, 0))
        self.got: dict[str, tuple[int, int, str]] = {}  # tenant, generation, delta
        self.lock = threading.Lock()

    def prepare(self) -> None:
        self.served.start()
        self.secrets = [self.served.tenant(name) for name in self.names]
        for secret, own in zip(self.secrets, self.deltas, strict=True):
            with Client(self.served.url, secret) as client:
                for delta in own:
                    client.upload(delta)
                client.set_alias("clf", own[0].hash, generation=0)

    def swap(self, tenants: list[int], stop: threading.Event) -> None:
        """Move their aliases until it is enough; every seventh time back."""
        clients = {t: Client(self.served.url, self.secrets[t]) for t in tenants}
        moved = 0
        while not stop.is_set():
            for t, client in clients.items():
                generation, moved = self.acknowledged[t], moved + 1
                if moved % 7 or generation < 3:
                    new = client.set_alias(
                        "clf", self.deltas[t][moved % VERSIONS].hash, generation=generation
                    )
                else:
                    new = client.rollback("clf")
                self.acknowledged[t] = new.generation
        for client in clients.values():
            client.close()
        with self.lock:
            self.found["swaps"] += moved

    def ask(self, client: int, requests: int) -> None:
        lines = [Line(self.served.port, secret) for secret in self.secrets]
        own: Counter[str] = Counter()
        got: dict[str, tuple[int, int, str]] = {}
        for number in range(requests):
            t, i = (client + number) % TENANTS, (7 * client + number) % INPUTS
            name, least = f"c{client}-{number}", self.acknowledged[t]
            own["asked"] += 1
            said = lines[t].infer("clf", {"input": self.inputs[i]}, name)
            if said.status != 200:
                own["refused"] += 1
                continue
            own["answered"] += 1
            own["of another request"] += said.request != name
            got[name] = (t, said.generation, said.delta)
            own.update(self.judge(t, i, said))
            own["older than was acknowledged"] += said.generation < least
        for line in lines:
            line.close()
        with self.lock:
            self.found.update(own)
            self.got.update(got)

    def judge(self, t: int, i: int, said: Said) -> list[str]:
        output: Tensor = said.outputs["output"]
        if output.shape != self.right[i].shape[1:]:
            return ["of another shape"]
        near = ((self.right[i] - output).abs().amax((1, 2)) <= NEAR).nonzero().flatten().tolist()
        if not near:
            return ["of no whole delta"]
        if near[0] // VERSIONS != t:
            return ["of another tenant"]
        return [] if self.hashes[near[0]] == said.delta else ["of another delta than it names"]

    def run(self, requests: int) -> None:
        stop = threading.Event()
        half = TENANTS // 2
        swapping = [
            threading.Thread(target=self.swap, args=(list(part), stop))
            for part in (range(half), range(half, TENANTS))
        ]
        asking = [threading.Thread(target=self.ask, args=(c, requests)) for c in range(CLIENTS)]
        for thread in swapping + asking:
            thread.start()
        for thread in asking:
            thread.join()
        stop.set()
        for thread in swapping:
            thread.join()

    def audit(self) -> None:
        """Every answer is in the log exactly once, and the log says of it what is true."""
        registry = self.served.registry()
        registry.audit.verify()
        history = {
            (name, alias.generation): alias.delta
            for name in self.names
            for alias in registry.history(name, "clf")
        }
        seen: Counter[str] = Counter()
        for event in registry.audit.read(kinds=["request"]):
            body = event.body
            seen[body["request"]] += 1
            if body["request"] not in self.got:
                self.found["in the log, and of nobody"] += 1
                continue
            t, generation, delta = self.got[body["request"]]
            true = (self.names[t], "clf", generation, delta)
            told = (event.tenant, body["alias"], body["generation"], body["delta"])
            self.found["told wrongly in the log"] += told != true
            self.found["of another delta than its generation's"] += (
                history[event.tenant, body["generation"]] != delta
            )
        self.found["in the log"] = seen.total()
        self.found["not in the log"] = len(self.got.keys() - seen.keys())
        self.found["twice in the log"] = sum(n > 1 for n in seen.values())
        registry.close()


def trial(folder: Path, requests: int) -> dict[str, int]:
    """Counts; those of `NONE` should be 0."""
    one = Trial(folder)
    try:
        one.prepare()
        one.run(requests)
        one.served.end()
    finally:
        if one.served.process is not None:
            one.served.process.kill()
            one.served.process.wait()
    one.audit()
    return dict(one.found)


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        found = trial(Path(folder), requests)
        every = TENANTS * VERSIONS
        print(f"{CLIENTS} clients, {TENANTS} tenants, {SLOTS} slots for {every} deltas")
        for what, count in sorted(found.items(), key=lambda pair: pair[0] in NONE):
            print(f"  {count:>8,}  {what}")
        print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()

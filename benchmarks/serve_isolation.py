"""Whose answer is it? Tenants beside each other while all their aliases are moved all the time.

    python benchmarks/serve_isolation.py [requests of each client]

A real server process with fewer slots than deltas in use; 8 tenants with 5 versions each (LoRA of
several ranks, IA3, masks, heads), 16 clients that ask all tenants in turn, two threads that move
aliases and roll them back without a pause, and one that has delta after delta fitted, which then
are moved to as well. Each answer is compared with what every delta of every tenant answers, those
that were fitted meanwhile among them: it must be one of its own tenant's, the one that its header,
its version and the audit log name, and no older than the swaps that were acknowledged when it was
asked. Claim: nothing is anybody else's, half swapped, lost, or there twice. By default 10,000
requests a client. Needs: pip install 'tessera-lifelong[serve]'
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from _served import CLASSES, WIDTH, Served, drawn, net
from _timing import machine
from tessera import peft, random
from tessera.serve.client import Client
from tessera.serve.fitting_values import FitSettings
from tessera.serve.oip import decode_answer, encode_request
from tessera.serve.registry import Registry

TENANTS, CLIENTS, VERSIONS, INPUTS, SLOTS, SHOTS = 8, 16, 5, 24, 6, 8
NEAR, APART = 1e-5, 1e-4
# What there must be none of.
NONE = (
    "refused", "of another request", "of another shape", "of no whole delta", "of another tenant",
    "of another delta than it names", "older than was acknowledged", "not in the log",
    "twice in the log", "in the log, and of nobody", "told wrongly in the log",
    "of another delta than its generation's",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Got:
    """An answer as it came, to be judged when all is over."""

    tenant: int
    input: int
    request: str
    least: int  # the generation that was acknowledged before it was asked
    said: str  # the request's id in the answer
    generation: int
    delta: str
    output: Tensor


class Line:
    """One connection, with as little work for a request as can be: the server is the one on trial.

    What comes is kept, and read afterwards.
    """

    def __init__(self, port: int, secret: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._head = (
            "POST /v2/models/clf/infer HTTP/1.1\r\nHost: isolation\r\n"
            f"Authorization: Bearer {secret}\r\n"
        )

    def ask(self, body: bytes, length: int, request: str) -> tuple[bytes, bytes]:
        """Head and content of the answer."""
        head = (
            f"{self._head}X-Request-ID: {request}\r\nInference-Header-Content-Length: {length}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._socket.sendall(head.encode() + body)
        came = b""
        while b"\r\n\r\n" not in came:
            came += self._more()
        head_bytes, _, content = came.partition(b"\r\n\r\n")
        size = int(_fields(head_bytes)[b"content-length"])
        while len(content) < size:
            content += self._more()
        assert len(content) == size, "more came than was asked for"
        return head_bytes, content

    def _more(self) -> bytes:
        came = self._socket.recv(1 << 16)
        if not came:
            raise ConnectionError("the server closed the connection")
        return came

    def close(self) -> None:
        self._socket.close()


def _fields(head: bytes) -> dict[bytes, bytes]:
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return {name.lower(): value.strip() for name, _, value in lines}


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
        self.bodies = [encode_request({"input": x}) for x in self.inputs]
        self.acknowledged = [1] * TENANTS
        self.choices = [[delta.hash for delta in own] for own in self.deltas]
        self.found: Counter[str] = Counter(dict.fromkeys(NONE, 0))
        self.came: list[tuple[int, int, str, int, bytes, bytes]] = []
        self.lock = threading.Lock()
        self.learn({delta.hash: t for t, own in enumerate(self.deltas) for delta in own}, None)

    def learn(self, owners: dict[str, int], registry: Registry | None) -> None:
        """What each of these deltas answers; they must be told apart."""
        own = {delta.hash: delta for several in self.deltas for delta in several}
        self.hashes, self.owners = list(owners), list(owners.values())
        base, self.right = net(), []
        deltas = [own.get(h) or registry.load(h, tenant=self.names[owners[h]]) for h in owners]
        with torch.no_grad():
            bound = [peft.apply(base, delta) for delta in deltas]
            self.right = [torch.stack([model(x) for model in bound]) for x in self.inputs]
        for answers in self.right:
            apart = (answers[:, None] - answers[None]).abs().amax((2, 3))
            assert float((apart + torch.eye(len(owners))).min()) > APART

    def prepare(self) -> None:
        self.served.start()
        self.secrets = [self.served.tenant(name) for name in self.names]
        for secret, own in zip(self.secrets, self.deltas, strict=True):
            with Client(self.served.url, secret) as client:
                for delta in own:
                    client.upload(delta)
                client.set_alias("clf", own[0].hash, generation=0)
        with Client(self.served.url, self.secrets[0]) as client:
            self.fit_one(0, 0, client)  # the process for fits has started now

    def swap(self, tenants: list[int], stop: threading.Event) -> None:
        """Move their aliases until it is enough; every seventh time back."""
        clients = {t: Client(self.served.url, self.secrets[t]) for t in tenants}
        moved = 0
        while not stop.is_set():
            for t, client in clients.items():
                generation, moved = self.acknowledged[t], moved + 1
                if moved % 7 or generation < 3:
                    # The latest ones, so that what was fitted has its turn.
                    chosen = self.choices[t][-1 - moved % VERSIONS]
                    new = client.set_alias("clf", chosen, generation=generation)
                else:
                    new = client.rollback("clf")
                self.acknowledged[t] = new.generation
        for client in clients.values():
            client.close()
        with self.lock:
            self.found["swaps"] += moved

    def fit(self, stop: threading.Event) -> None:
        """Have deltas fitted, for one tenant after the other, until it is enough."""
        clients = [Client(self.served.url, secret) for secret in self.secrets]
        while not stop.is_set():
            number = self.found["fits"] = self.found["fits"] + 1
            self.fit_one(number % TENANTS, number, clients[number % TENANTS])
        for client in clients:
            client.close()

    def fit_one(self, t: int, number: int, client: Client) -> None:
        draw = random.generator(number, "isolation.shots")
        shots = {"input": torch.randn(SHOTS, WIDTH, generator=draw)}
        labels = torch.randint(CLASSES, (SHOTS,), generator=draw)
        how = FitSettings(r=1 + number % 3, steps=5, lr=0.2, seed=number)
        self.choices[t].append(client.fit(shots, labels, how).hash)

    def ask(self, client: int, requests: int) -> None:
        lines = [Line(self.served.port, secret) for secret in self.secrets]
        came = []
        for number in range(requests):
            t, i = (client + number) % TENANTS, (7 * client + number) % INPUTS
            name, least = f"c{client}-{number}", self.acknowledged[t]
            came.append((t, i, name, least, *lines[t].ask(*self.bodies[i], name)))
        for line in lines:
            line.close()
        with self.lock:
            self.came += came

    def judge_all(self) -> None:
        """Read what came, and judge it."""
        self.found["asked"] += len(self.came)
        self.got: dict[str, Got] = {}
        for t, i, name, least, head, content in self.came:
            if not head.startswith(b"HTTP/1.1 200 "):
                self.found["refused"] += 1
                continue
            fields = _fields(head)
            size = int(fields[b"inference-header-content-length"])
            said = json.loads(content[:size])
            self.found["answered"] += 1
            self.got[name] = got = Got(
                tenant=t,
                input=i,
                request=name,
                least=least,
                said=fields[b"x-request-id"].decode(),
                generation=int(said["model_version"]),
                delta=fields[b"x-tessera-delta"].decode(),
                output=decode_answer(content, size)["output"],
            )
            self.found.update(self.judge(got))
        self.came.clear()

    def judge(self, got: Got) -> list[str]:
        found = []
        if got.said != got.request:
            found.append("of another request")
        if got.generation < got.least:
            found.append("older than was acknowledged")
        right = self.right[got.input]
        if got.output.shape != right.shape[1:]:
            return [*found, "of another shape"]
        near = ((right - got.output).abs().amax((1, 2)) <= NEAR).nonzero().flatten().tolist()
        if not near:
            return [*found, "of no whole delta"]
        if self.owners[near[0]] != got.tenant:
            return [*found, "of another tenant"]
        if self.hashes[near[0]] != got.delta:
            return [*found, "of another delta than it names"]
        return found

    def run(self, requests: int) -> None:
        stop, begun = threading.Event(), time.perf_counter()
        half = TENANTS // 2
        swapping = [
            threading.Thread(target=self.swap, args=(list(part), stop))
            for part in (range(half), range(half, TENANTS))
        ]
        swapping.append(threading.Thread(target=self.fit, args=(stop,)))
        asking = [threading.Thread(target=self.ask, args=(c, requests)) for c in range(CLIENTS)]
        for thread in swapping + asking:
            thread.start()
        for thread in asking:
            thread.join()
        self.rate = CLIENTS * requests / (time.perf_counter() - begun)
        stop.set()
        for thread in swapping:
            thread.join()

    def audit(self) -> None:
        """Every answer is in the log exactly once, and the log says of it what is true."""
        registry = self.served.registry()
        registry.audit.verify()
        owners = {
            record.hash: t for t, name in enumerate(self.names) for record in registry.deltas(name)
        }
        self.learn(owners, registry)
        self.judge_all()
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
            got = self.got[body["request"]]
            true = (self.names[got.tenant], "clf", got.generation, got.delta)
            told = (event.tenant, body["alias"], body["generation"], body["delta"])
            self.found["told wrongly in the log"] += told != true
            self.found["of another delta than its generation's"] += (
                history[event.tenant, body["generation"]] != got.delta
            )
        fitted = set(self.hashes) - {d.hash for own in self.deltas for d in own}
        self.found["of fitted deltas"] = sum(got.delta in fitted for got in self.got.values())
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
    return {**one.found, "a second": round(one.rate)}


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

"""What HTTP costs the server: CPU time a request, with an engine that computes nothing.

    python benchmarks/serve_http.py

[1, 384] numbers there and [1, 384] back, as JSON and as binary data, 16 connections kept alive, one
server process: all of its CPU time is counted, its threads and the kernel's work for it too. The
floor is uvicorn with an application that reads the body and answers the same bytes; besides, the
same server with a line of JSON a request into a file. Claim: at most 0.3 ms a request.
Needs: pip install 'tessera-lifelong[serve]'
"""

from __future__ import annotations

import multiprocessing
import queue
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

import torch
import uvicorn

from _timing import machine
from tessera.serve.access import digest
from tessera.serve.app import make_app
from tessera.serve.engine import Answer
from tessera.serve.listen import Server
from tessera.serve.logs import set_up
from tessera.serve.oip import encode_request
from tessera.serve.records import Alias, Key, View

WIDTH, CONNECTIONS, ROUNDS, REQUESTS = 384, 16, 9, 960
SECRET = "tsr_a-key-for-the-benchmark"
HEAD = (
    f"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\r\n"
    "Content-Type: application/octet-stream\r\n"
)


class Idle:
    """An engine that answers with its input, from a thread of its own, as the real one does."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[tuple[Future[Answer], Answer]] = queue.SimpleQueue()
        threading.Thread(target=self.work, daemon=True).start()

    def has(self, delta: str) -> bool:
        return True

    def submit(
        self,
        inputs: Mapping[str, torch.Tensor],
        delta: str,
        *,
        tenant: str,
        timeout_s: float | None = None,
    ) -> Future[Answer]:
        future: Future[Answer] = Future()
        self.queue.put((future, Answer(outputs=inputs, delta=delta, batch=1, part=0)))
        return future

    def work(self) -> None:
        while True:
            future, answer = self.queue.get()
            future.set_result(answer)


class Known:
    """A registry with one key and one alias."""

    def view(self) -> View:
        return self.picture

    key = Key(id="k", tenant="acme", scopes=frozenset({"infer"}))
    alias = Alias(tenant="acme", name="m", generation=1, delta="d" * 64, changed_s=0.0, reason="")
    picture = View(keys={digest(SECRET): key}, aliases={("acme", "m"): alias}, revision=1)


async def floor(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve(pipe: Connection, what: str) -> None:
    """A server, and its CPU time for whoever asks."""
    torch.set_num_threads(1)
    if what == "logged":
        log = tempfile.TemporaryFile("w")  # noqa: SIM115  (as long as the process)
        set_up("json", stream=log)
    if what == "bare":
        config = uvicorn.Config(floor, port=0, access_log=False, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
    else:
        server = Server(make_app(Known(), Idle()), port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    pipe.send(server.servers[0].sockets[0].getsockname()[1])
    while pipe.recv():
        pipe.send(time.process_time())


class Load:
    """Some connections to a server, and its CPU time."""

    def __init__(self, what: str) -> None:
        self.pipe, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        context.Process(target=serve, args=(other, what), daemon=True).start()
        port = self.pipe.recv()
        self.lines = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]

    def close(self) -> None:
        self.pipe.send(False)

    def ask(self, request: bytes) -> bytes:
        """One request on one connection."""
        self.lines[0].sendall(request)
        return self.whole(self.lines[0])

    def whole(self, line: socket.socket) -> bytes:
        said = b""
        while b"\r\n\r\n" not in said:
            said += line.recv(65536)
        head, _, body = said.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(body) < length:
            body += line.recv(65536)
        return head + b"\r\n\r\n" + body

    def cpu_ms(self, request: bytes) -> float:
        """Of a request, over REQUESTS of them."""
        self.pipe.send(True)
        begun = self.pipe.recv()
        for _ in range(REQUESTS // CONNECTIONS):
            for line in self.lines:
                line.sendall(request)
            for line in self.lines:
                self.whole(line)
        self.pipe.send(True)
        return 1e3 * (self.pipe.recv() - begun) / REQUESTS


def request(*, binary: bool) -> bytes:
    body, length = encode_request({"x": torch.randn(1, WIDTH)}, id="r", binary=binary)
    size = f"Inference-Header-Content-Length: {length}\r\n" if binary else ""
    return f"{HEAD}Content-Length: {len(body)}\r\n{size}\r\n".encode() + body


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    torch.manual_seed(0)
    asked = {"binary": request(binary=True), "JSON": request(binary=False)}
    loads = [Load(what) for what in ("ours", "logged", "bare")]
    for words in asked.values():
        for load in loads:
            said = load.ask(words)
            assert said.startswith(b"HTTP/1.1 200"), said
            load.cpu_ms(words)
    times: dict[str, list[list[float]]] = {kind: [] for kind in asked}
    for _ in range(ROUNDS):
        for kind, words in asked.items():
            times[kind].append([load.cpu_ms(words) for load in loads])
    for load in loads:
        load.close()
    for kind, rounds in times.items():
        own, logged, low = zip(*rounds, strict=True)
        print(
            f"{kind:>6}: {statistics.median(own):.3f} ms CPU a request ({min(own):.3f} .. "
            f"{max(own):.3f}), {statistics.median(logged):.3f} with a line in the log, uvicorn "
            f"alone {statistics.median(low):.3f}; target: at most 0.3 ms"
        )


if __name__ == "__main__":
    main()

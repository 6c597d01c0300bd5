"""A registry in a temporary folder, an engine that multiplies, and a real server over both."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessera.arch import Delta
from tessera.serve.app import App, make_app
from tessera.serve.blobs import Blobs
from tessera.serve.listen import Server
from tessera.serve.registry import Registry
from tessera.serve.settings import AppSettings

ADMIN = "an-admin-key-for-the-tests-only"
BASE = "0" * 64


@dataclass(frozen=True)
class Product:
    """`engine.Answer`."""

    outputs: Mapping[str, Tensor]
    delta: str
    batch: int = 1
    part: int = 0


@dataclass
class Multiplier:
    """An engine: y = k x, k by the delta, 1 of the base.

    `before` runs in `submit`; while `held`, answers wait for `release`.
    """

    load: Callable[[str], Delta]
    before: Callable[[], None] = lambda: None
    held: bool = False
    waiting: list[tuple[Future[Product], Product]] = field(default_factory=list)
    asked: list[float | None] = field(default_factory=list)

    def has(self, delta: str) -> bool:
        return not delta

    def submit(
        self,
        inputs: Mapping[str, Tensor],
        delta: str,
        *,
        tenant: str,
        timeout_s: float | None = None,
    ) -> Future[Product]:
        self.before()
        self.asked.append(timeout_s)
        k = float(self.load(delta).tensors["prompt"][0, 0]) if delta else 1
        outputs = {f"{n}_times": t if t.dtype == torch.bool else t * k for n, t in inputs.items()}
        answer = Product(outputs, delta)
        future: Future[Product] = Future()
        if self.held:
            self.waiting.append((future, answer))
        else:
            future.set_result(answer)
        return future

    def release(self) -> None:
        """Answer all that wait."""
        self.held = False
        for future, answer in self.waiting:
            if future.set_running_or_notify_cancel():
                future.set_result(answer)


@dataclass(frozen=True)
class House:
    """Two tenants, acme (alias m: x 2) and globex (alias m: x 3), and their keys."""

    registry: Registry
    engine: Multiplier
    secrets: Mapping[str, str]

    def app(self, settings: AppSettings | None = None) -> App:
        return make_app(self.registry, self.engine, settings=settings)

    def headers(self, who: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secrets[who]}"}

    @staticmethod
    def times(k: float) -> Delta:
        """A delta under which the engine multiplies by k."""
        return Delta(
            kind="prompt", tensors={"prompt": torch.full((1, 4), float(k))}, base_hash=BASE
        )


def opened(place: Path) -> Registry:
    return Registry(f"sqlite:///{place}/r.db", Blobs(place / "blobs"), base_hash=BASE)


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, str]]:
    """The registry of `House`, closed, and its secrets; made once, copied for each test."""
    place = tmp_path_factory.mktemp("furnished")
    registry = opened(place)
    registry.first_admin_key(ADMIN)
    admin = registry.authenticate(ADMIN)
    secrets = {"admin": ADMIN}
    for name, k in (("acme", 2.0), ("globex", 3.0)):
        registry.create_tenant(name, by=admin)
        secrets[name] = registry.create_key(name, {"infer", "manage"}, by=admin)[1]
        record = registry.put_delta(name, House.times(k), by=admin)
        registry.set_alias(name, "m", record.hash, generation=0, by=admin)
    secrets["reader"] = registry.create_key("acme", {"infer"}, by=admin)[1]
    secrets["manager"] = registry.create_key("acme", {"manage"}, by=admin)[1]
    registry.close()
    return place, secrets


@pytest.fixture
def house(furnished: tuple[Path, Mapping[str, str]], tmp_path: Path) -> Iterator[House]:
    made, secrets = furnished
    place = tmp_path / "registry"
    shutil.copytree(made, place)
    registry = opened(place)
    yield House(registry, Multiplier(registry.load), secrets)
    registry.close()


Starter = Callable[[App], str]


@pytest.fixture
def start() -> Iterator[Starter]:
    """Start a real server on a free port of this machine; its address, as host:port."""
    running: list[tuple[Server, threading.Thread]] = []

    def begin(app: App) -> str:
        server = Server(app, port=0, drain_s=5)
        # A thread other than the main one gets no signals, which uvicorn knows.
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        until = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.005)
        return f"127.0.0.1:{server.port}"

    yield begin
    for server, thread in running:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()

"""The real engine behind the real server: many tenants at once, each with its own delta."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from tessera import arch, peft
from tessera.serve.app import make_app
from tessera.serve.async_client import AsyncClient
from tessera.serve.blobs import Blobs
from tessera.serve.engine import Engine
from tessera.serve.registry import Registry


@dataclass(frozen=True)
class Served:
    """A model, two tenants that have the alias base, their keys, and where to ask."""

    model: nn.Module
    url: str
    secrets: dict[str, str]


@pytest.fixture
def served(tmp_path, start) -> Iterator[Served]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    place = f"sqlite:///{tmp_path}/r.db"
    registry = Registry(place, Blobs(tmp_path / "blobs"), base_hash=arch.base_hash(model))
    admin = registry.authenticate(registry.first_admin_key(None))
    secrets = {}
    for name in ("acme", "globex"):
        registry.create_tenant(name, by=admin)
        secrets[name] = registry.create_key(name, {"infer", "manage"}, by=admin)[1]
        registry.set_alias(name, "base", "", generation=0, by=admin)
    engine = Engine(model, registry.load)
    yield Served(model, start(make_app(registry, engine)), secrets)
    engine.close()
    registry.close()


def test_each_tenant_gets_its_own_deltas_answer(served):
    rows = [torch.randn(2, 4) for _ in range(12)]
    deltas = {}
    for seed, name in enumerate(served.secrets):
        deltas[name] = peft.lora(served.model, 2, seed=seed)
        for tensor in deltas[name].parameters():
            tensor.data.normal_()

    async def tenant(name: str) -> dict[str, list[torch.Tensor]]:
        async with AsyncClient(f"http://{served.url}", served.secrets[name]) as client:
            record = await client.upload(deltas[name])
            await client.set_alias("own", record.hash, generation=0)
            both = {}
            for model in ("own", "base"):
                answers = [client.infer(model, {"input": x}) for x in rows]
                both[model] = [a["output"] for a in await asyncio.gather(*answers)]
            return both

    async def main() -> list[dict[str, list[torch.Tensor]]]:
        return await asyncio.gather(*map(tenant, deltas))

    got = dict(zip(deltas, asyncio.run(main()), strict=True))
    for name, delta in deltas.items():
        own = peft.apply(served.model, delta)
        for at, x in enumerate(rows):
            torch.testing.assert_close(got[name]["own"][at], own(x).detach())
            torch.testing.assert_close(got[name]["base"][at], served.model(x).detach())
    assert not torch.allclose(got["acme"]["own"][0], got["globex"]["own"][0])


def test_tritonclient_asks_the_real_engine(served):
    http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    x = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    asked = http.InferInput("input", [3, 4], "FP32")
    asked.set_data_from_numpy(x)
    wrong = http.InferInput("input", [3, 5], "FP32")
    wrong.set_data_from_numpy(np.zeros((3, 5), np.float32))
    key = {"Authorization": f"Bearer {served.secrets['acme']}"}
    with http.InferenceServerClient(served.url) as client:
        got = client.infer("base", [asked], headers=key).as_numpy("output")
        wanted = served.model(torch.from_numpy(x)).detach()
        torch.testing.assert_close(torch.from_numpy(got.copy()), wanted)
        with pytest.raises(http.InferenceServerException, match="could not run this request"):
            client.infer("base", [wrong], headers=key)

"""A server on a GPU: fits run there too, and what it did is done again to the last bit.

python -m pytest tests/gpu            # on a machine with CUDA
TESSERA_TEST_DEVICE=cpu python -m pytest tests/gpu     # the tests themselves, anywhere
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from tessera import random
from tessera.recipes.loading import run_file

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("sqlalchemy", reason="the extra serve is not installed")
pytest.importorskip("alembic", reason="the extra serve is not installed")
pytest.importorskip("obstore", reason="the extra serve is not installed")
pytest.importorskip("orjson", reason="the extra serve is not installed")
from tessera.serve.client import Client
from tessera.serve.fitting_values import FitSettings, Origin
from tessera.serve.past import replay
from tessera.serve.service import Service, ServiceSettings

DEVICE = os.environ.get("TESSERA_TEST_DEVICE", "cuda")
BASES = Path(__file__).resolve().parents[1] / "serve" / "_bases.py"
net = run_file(str(BASES)).net

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU here"
)


def test_fits_and_answers_of_a_server_on_the_device_are_the_same_again(tmp_path):
    where = ServiceSettings(db=f"sqlite:///{tmp_path}/r.db", blobs=f"{tmp_path}/blobs")
    origin = Origin(function="tessera.cli.served:build", arguments={"model": f"{BASES}:net"})
    y = torch.arange(12) % 3
    draw = random.generator(0, "tests.serve_gpu.shots")
    x = {"input": 2 * torch.eye(6)[y] + 0.3 * torch.randn(12, 6, generator=draw)}
    with Service(net().to(DEVICE), where, origin) as service:
        server = service.server(port=0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.port}"
        try:
            with Client(url, service.admin_key, tenant="acme") as client:
                client.create_tenant("acme")
                how = FitSettings(r=2, sites=["0"], head="2", steps=25, lr=0.05)
                made = client.fit(x, y, how, alias="clf")
                again = client.fit(x, y, FitSettings(parent=made.hash, steps=3))
                right = client.infer("clf", x)["output"].argmax(1) == y
        finally:
            server.should_exit = True
            thread.join(20)
        assert right.all()
        assert again.hash != made.hash
        assert service.recorder.flush()
        audit, blobs = service.registry.audit, service.registry.rollouts.blobs
        here = list(replay(net().to(DEVICE), audit, blobs, service.registry.load))
        assert [r.verdict for r in here] == ["identical"] * 3
        (start,) = audit.read(kinds=["server.start"])
        machines = [start.body, *(e.body["machine"] for e in audit.read(kinds=["delta.fit"]))]
        name = torch.cuda.get_device_name() if DEVICE == "cuda" else None
        assert [m.get("device") for m in machines] == [name] * 3
        # Elsewhere it may be another, and then the device is named.
        for one in replay(net(), audit, blobs, service.registry.load):
            assert one.verdict in ("identical", "different")
            if one.verdict == "different":
                assert f"device {name} then, the CPU now" in one.detail

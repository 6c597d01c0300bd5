"""A server that adapts by itself: the world drifts, feedback tells, a candidate passes its gate.

    pip install 'tessera-lifelong[serve]'
    python examples/continual/serve_learning.py                 # about 20 s
    python examples/continual/serve_learning.py --stay          # and leave the dashboard up

A base learns handwritten digits and is served. Each answer gets its feedback: what the digit really
was. Then the scanner slips by two columns. Nobody trains anything from here on: the server sees its
answers get worse, fits a delta to the newest feedback while it rehearses older images under elastic
weight consolidation, lets a gate compare it with what is served on examples that no fit has seen,
and moves the alias. What it may spend on that is a budget of milliseconds and joules.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
import time
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from tessera import data, random, recipes
from tessera.serve import Client, FitSettings, Policy, Service, ServiceSettings
from tessera.serve.learning_values import LearningPolicy

ROWS, SEED, PATIENCE_S = 8, 0, 60.0

# --- the base: a run of tessera learn, and its checkpoint --------------------------------------

folder = Path(tempfile.mkdtemp(prefix="tessera-demo-"))
recipes.learn(recipes.Settings(recipe="joint"), folder=folder / "run")
base = recipes.trained_model(folder / "run")
tasks = list(data.benchmark("digits", "class"))
x_seen, y_seen = (torch.cat([getattr(t.train, part) for t in tasks]) for part in ("x", "y"))
x_test, y_test = (torch.cat([getattr(t.test, part) for t in tasks]) for part in ("x", "y"))


def straight(x: Tensor) -> Tensor:
    """The scanner as it was."""
    return x


def slipped(x: Tensor) -> Tensor:
    """The scanner since it slipped."""
    return x.roll(2, -1)


# --- the server, and an alias that learns --------------------------------------------------------

where = ServiceSettings(db=f"sqlite:///{folder}/registry.db", blobs=str(folder / "blobs"))
service = Service(base, where)
server = service.server(port=0)
thread = threading.Thread(target=server.run, daemon=True)
thread.start()
while not server.started:
    time.sleep(0.01)
url = f"http://127.0.0.1:{server.port}"
with Client(url, service.admin_key or "", tenant="acme") as root:
    root.create_tenant("acme")
    client = Client(url, root.create_key(["infer", "manage"])[1])
client.set_alias("digits", "", generation=0)
client.learn(
    LearningPolicy(
        alias="digits",
        on="drift",
        min_new=256,
        rho=0.7,
        fit=FitSettings(r=8, steps=60, lr=2e-2, budget={"ms": 8000, "joules": 200}),
        gate=Policy(min_n=30),
    )
)
requests = count()


def asked(scanner, times: int) -> None:
    """Traffic, and feedback on each answer."""
    for _, number in zip(range(times), requests, strict=False):
        rows = random.permutation(len(y_seen), SEED, "asked", number)[:ROWS]
        client.infer("digits", {"input": scanner(x_seen[rows])}, request_id=f"r-{number}")
        client.feedback(f"r-{number}", label=y_seen[rows].tolist())


def accuracy(scanner) -> float:
    """On images that nobody has asked about, through HTTP."""
    parts = [client.infer("digits", {"input": x})["output"] for x in scanner(x_test).split(60)]
    return float((torch.cat(parts).argmax(1) == y_test).float().mean())


# --- the world drifts, and the server goes after it ----------------------------------------------

asked(straight, 32)
print(f"straight {accuracy(straight):.3f}   the scanner is as it was")
print(f"slipped  {accuracy(slipped):.3f}   and now it slips")
until = time.monotonic() + PATIENCE_S
while client.aliases()[0].generation == 1 and time.monotonic() < until:
    asked(slipped, 4)
while (told := client.learning("digits")).busy:
    time.sleep(0.05)
for step in told.steps:
    print(f"    {step.kind:12s} {step.text}")
print(f"slipped  {accuracy(slipped):.3f}   by itself, generation {client.aliases()[0].generation}")
print(f"straight {accuracy(straight):.3f}   and not forgotten")
spent = told.spending
print(f"spent {spent.ms:.0f} of {spent.cap_ms:.0f} ms, {spent.joules:.1f} joules")
if "--stay" in sys.argv:
    print(f"dashboard {url}/  admin key {service.admin_key}  (Ctrl-C ends it)")
    with contextlib.suppress(KeyboardInterrupt):
        thread.join()
server.should_exit = True
thread.join()
service.close()

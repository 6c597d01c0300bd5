"""The whole loop on one machine: learn, serve, fit two tenants, gate, roll back, replay.

    pip install 'tessera-lifelong[serve]'
    python examples/continual/fewshot_lora_server.py            # about half a minute
    python examples/continual/fewshot_lora_server.py --stay     # and leave the dashboard up

A base learns handwritten digits. One tenant's scanner is two columns off, another's mirrors the
page: the base is lost on both. Each fits a LoRA of its own over HTTP, from a few labelled images,
and is served by it from the next request on; a better fit passes a gate and takes its place, a
spoilt one does not; and at the end every answer is computed again and compared to the last bit.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from tessera import data, random, recipes
from tessera.serve import Blobs, Client, FitSettings, Service, ServiceSettings, Shots, replay

ASKED, SEED = 300, 0
HOW = FitSettings(r=8, steps=60, lr=2e-2)
SCANNERS = {"acme": lambda x: x.roll(2, -1), "globex": lambda x: x.flip(-1)}

# --- the base: a run of tessera learn, and its checkpoint --------------------------------------

folder = Path(tempfile.mkdtemp(prefix="tessera-demo-"))
recipes.learn(recipes.Settings(recipe="joint"), folder=folder / "run")
base = recipes.trained_model(folder / "run")
tasks = list(data.benchmark("digits", "class"))
train = [torch.cat([getattr(t.train, part) for t in tasks]) for part in ("x", "y")]
test = [torch.cat([getattr(t.test, part) for t in tasks]) for part in ("x", "y")]
order = random.permutation(len(test[1]), SEED, "asked")[:ASKED]
x_asked, y_asked = test[0][order], test[1][order]
with torch.no_grad():
    known = (base(x_asked).argmax(1) == y_asked).float().mean()
print(f"the base on digits as it knows them   {known:.3f}")


def few(each: int, seed: int) -> tuple[Tensor, Tensor]:
    """`each` images of every digit."""
    shuffled = random.permutation(len(train[1]), seed, "few")
    rows = torch.cat([shuffled[train[1][shuffled] == digit][:each] for digit in range(10)])
    return train[0][rows], train[1][rows]


# --- the server ----------------------------------------------------------------------------------

where = ServiceSettings(db=f"sqlite:///{folder}/registry.db", blobs=str(folder / "blobs"))
service = Service(base, where)
server = service.server(port=0)
thread = threading.Thread(target=server.run, daemon=True)
thread.start()
while not server.started:
    time.sleep(0.01)
url = f"http://127.0.0.1:{server.port}"
clients = {}
for name in SCANNERS:
    with Client(url, service.admin_key or "", tenant=name) as root:
        root.create_tenant(name)
        clients[name] = Client(url, root.create_key(["infer", "manage"])[1])


def accuracy(name: str, model: str) -> float:
    """Of a tenant's requests, through HTTP."""
    x = SCANNERS[name](x_asked)
    answers = [clients[name].infer(model, {"input": part})["output"] for part in x.split(50)]
    return float((torch.cat(answers).argmax(1) == y_asked).float().mean())


# --- each tenant fits a delta of its own -------------------------------------------------------

for name, scanner in SCANNERS.items():
    clients[name].set_alias("base", "", generation=0)
    x, y = few(5, SEED)
    made = clients[name].fit({"input": scanner(x)}, y, HOW, alias="digits", generation=0)
    before, after = accuracy(name, "base"), accuracy(name, "digits")
    print(f"{name:7s} base {before:.3f}, fitted on {made.rows} images {after:.3f}")

# --- a gate: what is better takes the place, what is worse does not ----------------------------

acme, scanner = clients["acme"], SCANNERS["acme"]
x_held, y_held = few(30, SEED + 1)
held = Shots(inputs={"input": scanner(x_held)}, labels=y_held.tolist())
x, y = few(25, SEED + 2)
better = acme.fit({"input": scanner(x)}, y, HOW)
spoilt = acme.fit({"input": scanner(x)}, (y + 1) % 10, HOW)
for title, candidate in (("better", better), ("spoilt", spoilt)):
    found = acme.gate("digits", candidate=candidate.hash, shots=held, promote=True)
    print(f"gate: the {title} candidate {'passes' if found.alias else 'is refused'}")
improved = accuracy("acme", "digits")
acme.rollback("digits")
print(f"acme    promoted {improved:.3f}, rolled back {accuracy('acme', 'digits'):.3f}")

# --- and all of it again -----------------------------------------------------------------------

service.recorder.flush()
audit = service.registry.audit
past = replay(base, audit, Blobs(where.blobs), service.registry.load)
verdicts = [one.verdict for one in past]
same = verdicts.count("identical")
print(f"the log is a whole chain of {audit.verify()} events")
share = f"{same / len(verdicts):.1%}"
print(f"replayed {len(verdicts)} answers, fits and gates, identical to the last bit: {share}")
if "--stay" in sys.argv:
    print(f"dashboard {url}/  admin key {service.admin_key}  (Ctrl-C ends it)")
    with contextlib.suppress(KeyboardInterrupt):
        thread.join()
server.should_exit = True
thread.join()
service.close()

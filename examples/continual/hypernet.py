"""A delta for a new task in one forward, by a hypernetwork, read top to bottom.

    python examples/continual/hypernet.py

Each user sorts digits in a way of their own: of the ten, five mean yes. There are 252 such ways. A
hypernetwork sees 200 of them in training, and then, of ways it never saw, 30 labelled images each:
it writes the LoRA that turns one frozen base into that user's model, without a step of descent.
The figures are over the 52 new ways and test images that no part of it was trained on.
"""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from torch import Tensor, nn

from tessera import arch, data, meta, peft, random
from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch

SHOTS, QUERIES, TASKS, STEPS, LR, SEED = 30, 30, 16, 1000, 7e-4, 0

torch.set_num_threads(1)
torch.manual_seed(SEED)
(digits,) = data.benchmark("digits", num_tasks=1)

# The base knows digits. Its last layer answers yes or no, and does not know which digits are which.
body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
ten = nn.Sequential(body, nn.Linear(64, 10))
optimizer = tg.Adam(ten.parameters(), lr=2e-3)


@tg.training_step(optimizer=optimizer)
def recognise(batch: Batch) -> Tensor:
    return T.cross_entropy(ten(batch.x), batch.y)


for _ in range(400):
    rows = torch.randint(len(digits.train.y), (64,))
    recognise(Batch(digits.train.x[rows], digits.train.y[rows]))
model = nn.Sequential(body, nn.Linear(64, 2)).requires_grad_(False).eval()
before = arch.base_hash(model)

ways = torch.tensor(list(itertools.combinations(range(10), 5)))
yes = torch.zeros(len(ways), 10, dtype=torch.int64).scatter_(1, ways, 1)
yes = yes[random.permutation(len(yes), SEED, "ways")]
known, new = yes[:200], yes[200:]


def draw(rules: Tensor, rows: Tensor, part: Batch) -> Batch:
    """Images [tasks, n, ...] and, for each task, its own answers [tasks, n]."""
    return Batch(part.x[rows], rules.gather(1, part.y[rows]))


# Encoder and hypernetwork are trained together: the loss is that of the model under their deltas.
# The encoder reads what the base makes of an image, 64 features, rather than its pixels.
net = meta.Hypernetwork(model, in_dim=64, num_classes=2, embed_dim=64, rank=4, seed=SEED)
trainer = tg.Adam(net.parameters(), lr=LR)


def answers(context: Batch, queries: Tensor) -> Tensor:
    """One task: examples in, the model's answers under the delta they lead to out."""
    fast = net.hypernet(net.task_encoder(Batch(body(context.x), context.y)))
    with net.fastweights(model, fast):
        logits: Tensor = model(queries)
    return logits


@tg.training_step(optimizer=trainer)
def step(tasks: Batch) -> Tensor:
    def one(x: Tensor, y: Tensor) -> Tensor:
        return answers(Batch(x[:SHOTS], y[:SHOTS]), x[SHOTS:])

    logits = torch.func.vmap(one)(tasks.x, tasks.y)
    return T.cross_entropy(logits.flatten(0, 1), tasks.y[:, SHOTS:].flatten())


started = time.perf_counter()
for _ in range(STEPS):
    some = torch.randint(len(known), (TASKS,))
    rows = torch.randint(len(digits.train.y), (TASKS, SHOTS + QUERIES))
    step(draw(known[some], rows, digits.train))
print(f"trained over {len(known)} ways in {time.perf_counter() - started:.1f} s")
print("the base is, bit for bit, what it was:", arch.base_hash(model) == before)


def right(run: nn.Module | peft.Applied, rule: Tensor) -> float:
    """Per cent of all test images that are answered as `rule` has it."""
    with torch.no_grad():
        found = run(digits.test.x).argmax(1)
    return 100 * (found == rule[digits.test.y]).float().mean().item()


base, hyper, fitted, hyper_ms, fit_ms = [], [], [], [], []
for i, rule in enumerate(new):
    rows = random.permutation(len(digits.train.y), SEED, "context", i)[:SHOTS]
    x, y = digits.train.x[rows], rule[digits.train.y[rows]]
    base.append(right(model, rule))

    started = time.perf_counter()
    with torch.no_grad():
        fast = net.hypernet(net.task_encoder(Batch(body(x), y)))
    hyper_ms.append(1000 * (time.perf_counter() - started))
    with net.fastweights(model, fast):
        hyper.append(right(model, rule))

    # What descent makes of the same images, from a fresh LoRA of the same size.
    started = time.perf_counter()
    delta = peft.fit(peft.lora(model, 4, sites=["0.1", "0.3"], head="1"), Batch(x, y), seed=i)
    fit_ms.append(1000 * (time.perf_counter() - started))
    fitted.append(right(peft.apply(model, delta), rule))

print(f"new ways, {SHOTS} images each      right       made in")
print(f"the base                    {statistics.mean(base):5.1f} %")
for name, found, ms in (("a fitted LoRA", fitted, fit_ms), ("a hypernetwork", hyper, hyper_ms)):
    print(f"{name:<27} {statistics.mean(found):5.1f} %   {statistics.median(ms):7.2f} ms")

# What it wrote is a delta like any other: a folder that PEFT reads and `tessera serve` takes.
fast.save("digits-way")
again = arch.Delta.load("digits-way")
with torch.no_grad(), net.fastweights(model, fast):
    same = torch.equal(model(x), peft.apply(model, again.snapshot())(x))
print(f"saved, loaded and applied, it answers the same: {same}")

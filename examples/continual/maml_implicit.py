"""Learning to learn characters, with implicit gradients, read top to bottom.

    python examples/continual/maml_implicit.py

A task shows five characters nobody has seen, one picture of each, and asks which of the five other
pictures are. A network is looked for from which a few steps of gradient descent on these five
pictures lead to the answers: iMAML, whose outer gradient comes from the curvature where the steps
end (`meta.implicit_bilevel`), not from the way there. It learns on some scripts and is judged on
others, Latin, Greek and Cyrillic among them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import data, meta
from tessera import graph as tg

WAYS, WIDTH, META_STEPS, TASKS, TESTS, SEED = 5, 24, 120, 4, 100, 0

torch.set_num_threads(1)
torch.manual_seed(SEED)
# Five iterations need not reach the solver's tolerance; how often they do is printed.
warnings.filterwarnings("ignore", message="implicit_bilevel: the solver ended")


def conv(inner: int) -> list[nn.Module]:
    # Statistics of the batch: a task has its own.
    norm = nn.BatchNorm2d(WIDTH, track_running_stats=False)
    return [nn.Conv2d(inner, WIDTH, 3, stride=2, padding=1), norm, nn.ReLU()]


model = nn.Sequential(
    *(layer for inner in (1, WIDTH, WIDTH, WIDTH) for layer in conv(inner)),
    nn.Flatten(),
    nn.Linear(4 * WIDTH, WAYS),
)
nn.init.zeros_(model[-1].weight)
meta_opt = torch.optim.Adam(model.parameters(), lr=5e-3)


def inner(m: nn.Module) -> tg.SGD:
    """The few steps."""
    return tg.SGD(m, lr=0.3, steps=8)


LossFn = Callable[[Tensor, Tensor], Tensor]


def solved(support: data.Batch, query: data.Batch, val_loss: LossFn = F.cross_entropy) -> Tensor:
    """The query's loss at the solution of the support's: lowest loss, near the model."""
    return meta.implicit_bilevel(
        model,
        inner=inner,
        train_batch=support,
        val_batch=query,
        prox=0.5,  # how strongly the solution is pulled towards the model
        damping=1.0,  # a biased but steadier gradient: after eight steps it is no minimum yet
        tol=0.1,
        max_iter=5,
        val_loss_fn=val_loss,
    )


def single(episode: tuple[data.Batch, data.Batch]) -> list[tuple[data.Batch, data.Batch]]:
    """The tasks of an episode, one by one."""
    support, query = episode
    return [
        (data.Batch(support.x[i], support.y[i]), data.Batch(query.x[i], query.y[i]))
        for i in range(len(support.y))
    ]


# Meta-training: each step sees four new tasks.
learn = data.glyphs("train")
drawn = data.episodes(learn, ways=WAYS, shots=1, queries=5, tasks=TASKS, seed=SEED)
converged = 0
for step in range(META_STEPS):
    meta_opt.param_groups[0]["lr"] = 5e-3 * (1 - step / META_STEPS)
    meta_opt.zero_grad()
    mean = 0.0
    for support, query in single(drawn[step]):
        outer = solved(support, query)
        (outer / TASKS).backward()
        mean += outer.item() / TASKS
        converged += outer.stopped == "converged"
    meta_opt.step()
    if (step + 1) % 30 == 0:
        print(f"meta-step {step + 1}: loss of the queries {mean:.2f}", flush=True)
print(f"{converged} of {META_STEPS * TASKS} linear solves reached their tolerance")

# Held-out scripts: the same inner problem, and the pixels alone for comparison.
held_out = data.glyphs("test")
assert not set(held_out.scripts) & set(learn.scripts)
judge = data.episodes(held_out, ways=WAYS, shots=1, queries=15, tasks=TESTS, seed=SEED)
before = {name: p.clone() for name, p in model.state_dict().items()}
fitted: list[float] = []
pixels: list[float] = []


def look(logits: Tensor, y: Tensor) -> Tensor:
    fitted.append((logits.argmax(1) == y).double().mean().item())
    return F.cross_entropy(logits, y)


for support, query in single(judge[0]):
    with tg.no_grad():
        solved(support, query, look)
    nearest = torch.cdist(query.x.flatten(1), support.x.flatten(1)).argmin(1)
    pixels.append((support.y[nearest] == query.y).double().mean().item())


def interval(shares: list[float]) -> str:
    t = 100 * torch.tensor(shares, dtype=torch.float64)
    return f"{t.mean():5.1f} +- {1.96 * t.std() / math.sqrt(len(t)):.1f} %"


print(f"{WAYS} new characters from one picture each, {TESTS} tasks of held-out scripts:")
print(f"  nearest picture, pixels   {interval(pixels)}")
print(f"  adapted model             {interval(fitted)}")

# Adapting wrote nothing into the model.
assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())

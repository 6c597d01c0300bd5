"""The guide's code blocks run as written, once their free names are defined."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tessera.data
import tessera.opt
from tessera import arch, graph, loss, meta, ops, peft
from tessera.data import Batch
from tessera.recipes import Settings, learn

REGULARISE = """
from tessera import graph as tg, ops as T, loss, arch

# After Task t:
anchor = arch.anchor_from(model, name=f"task{t}", fisher="diagonal")  # stores theta_t and F_t

@tg.training_step
def step(batch):
    yhat = model(batch.x)
    task_loss = T.cross_entropy(yhat, batch.y)

    # EWC penalty
    reg = loss.ewc(model, anchor, lam=1e-2)

    # (optional) LwF: distill onto older model's logits at temperature T
    with tg.no_grad():
        y_prev = anchor.model(batch.x)
    kd = loss.kl_divergence(T.log_softmax(yhat/2.0), T.softmax(y_prev/2.0)) * (2.0**2)

    return task_loss + reg + 0.3*kd
"""

REHEARSE = """
buf = data.ReplayBuffer(capacity=200_000, policy="reservoir")
# write streaming
buf.add(batch.x, batch.y)

# mixed batch: new + replay
x_new,y_new = batch.x, batch.y
x_rep,y_rep = buf.sample_like(x_new, ratio=0.25)
x_mix = T.concat([x_new, x_rep]); y_mix = T.concat([y_new, y_rep])
"""

STREAMING = """
buf = data.ReplayBuffer(200_000, "reservoir")
anchor = arch.anchor_from(model, "pre_task")

@tg.training_step
def continual(batch):
    buf.add(batch.x, batch.y)
    x_r, y_r = buf.sample_like(batch.x, ratio=0.25)
    x = T.concat([batch.x, x_r]); y = T.concat([batch.y, y_r])

    logits = model(x)
    task = T.cross_entropy(logits, y)
    reg  = loss.ewc(model, anchor, lam=5e-3)
    return task + reg
"""

FEW_SHOTS = """
# 3-shot adaptation at inference
delta = peft.lora(model, r=8)
peft.fit(delta, shots)           # tiny inner loop on support examples
yhat = peft.apply(model, delta)(x_query)
"""

OVERLAY = """
delta = peft.lora(model.layers.attn, r=8, alpha=16)
peft.fit(delta, support_batch, steps=20, lr=5e-3)   # quick inner loop
pred = peft.apply(model, delta)(query.x)
"""

MAML = """
from tessera import meta

def bilevel_step(task_batch, val_batch):
    # inner loop: adapt K steps
    adapted, meta_state = meta.maml_step(model, task_batch, inner_opt=tg.SGD(1e-2), K=5,
                                         create_graph=True)  # higher-order
    # outer loss on held-out
    yhat = adapted(val_batch.x)
    outer = T.cross_entropy(yhat, val_batch.y)
    return outer
"""

HYPERNETWORK = """
task_embed = meta.task_encoder(context)     # few examples -> embedding
fast = meta.hypernet(task_embed)            # produces low-rank deltas
with meta.fastweights(model, fast):         # scoped overlay
    yhat = model(x_support)
"""

IMPLICIT = """
outer = meta.implicit_bilevel(
    model,
    inner=lambda m: tg.SGD(m, lr=1e-2, steps=5),
    train_batch=task_support,
    val_batch=task_query,
    hvp="pearlmutter", tol=1e-3
)
outer.backward(); meta_opt.step()
"""


@pytest.fixture
def names() -> dict[str, Any]:
    """A model that tg.Adam has trained a little, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batch = Batch(torch.randn(32, 8), torch.randint(0, 4, (32,)))
    optimizer = graph.Adam(model.parameters(), lr=1e-2)

    @graph.training_step
    def warm_up(batch: Batch) -> torch.Tensor:
        return ops.cross_entropy(model(batch.x), batch.y)

    warm_up(batch)
    return {
        "model": model,
        "batch": batch,
        "optimizer": optimizer,
        "t": 1,
        "T": ops,
        "tg": graph,
        "arch": arch,
        "loss": loss,
        "data": tessera.data,
        "opt": tessera.opt,
    }


def run(block: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(textwrap.dedent(block), names)
    return names


@pytest.mark.parametrize(("block", "step"), [(REGULARISE, "step"), (STREAMING, "continual")])
def test_a_training_step_of_the_guide_learns(block: str, step: str, names: dict[str, Any]) -> None:
    run(block, names)
    losses = [names[step](names["batch"]).item() for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_guides_anchor_is_recycled_from_adam_and_says_so(names: dict[str, Any]) -> None:
    stats = run(REGULARISE, names)["anchor"].stats
    assert stats["estimator"] == "recycled"
    assert stats["approximate"] is True
    assert stats["batch_size"] == 32


def test_rehearsal_mixes_a_quarter(names: dict[str, Any]) -> None:
    run(REHEARSE, names)
    assert names["x_mix"].shape == (40, 8)
    assert names["y_mix"].dtype == torch.int64


def test_three_shots_are_learned() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    shots = Batch(torch.randn(3, 8), torch.tensor([0, 1, 2]))
    d = {"model": model, "shots": shots, "x_query": shots.x, "peft": peft}
    run(FEW_SHOTS, d)
    assert d["yhat"].argmax(1).tolist() == [0, 1, 2]
    assert model(shots.x).argmax(1).tolist() != [0, 1, 2]


def test_a_part_of_a_model_is_fitted() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Module()
            self.layers.attn = nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.layers.attn(x)))

    model = Layers()
    arch.root(model)
    batch = Batch(torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2]))
    d = {"model": model, "support_batch": batch, "query": batch, "peft": peft}
    before = ops.cross_entropy(model(batch.x), batch.y)
    run(OVERLAY, d)
    assert ops.cross_entropy(d["pred"], batch.y) < 0.9 * before


def test_a_meta_step_of_the_guide_teaches_to_adapt(names: dict[str, Any]) -> None:
    run(MAML, names)
    support, query = names["batch"], Batch(torch.randn(32, 8), torch.randint(0, 4, (32,)))
    optimizer = torch.optim.Adam(names["model"].parameters(), lr=1e-2)
    before = names["bilevel_step"](support, query).item()
    for _ in range(30):
        optimizer.zero_grad()
        names["bilevel_step"](support, query).backward()
        optimizer.step()
    assert names["bilevel_step"](support, query).item() < 0.7 * before


def test_the_guides_hypernetwork_makes_a_delta_that_begins_as_the_base() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    names = {
        "model": model,
        "meta": meta.Hypernetwork(model, in_dim=8, num_classes=4),
        "context": Batch(torch.randn(10, 8), torch.randint(0, 4, (10,))),
        "x_support": torch.randn(3, 8),
    }
    run(HYPERNETWORK, names)
    assert torch.equal(names["yhat"], model(names["x_support"]))
    assert isinstance(names["fast"], arch.Delta)


def test_the_guides_implicit_step_lowers_the_loss_after_adaptation(names: dict[str, Any]) -> None:
    support = names["batch"]
    names |= {
        "meta": meta,
        "task_support": support,
        "task_query": support,
        "meta_opt": torch.optim.Adam(names["model"].parameters(), lr=1e-2),
    }
    losses = []
    for _ in range(20):
        names["meta_opt"].zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # five steps are far from a minimum, which it says
            run(IMPLICIT, names)
        losses.append(names["outer"].item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_recipe_in_the_docs_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "guide" / "learn.md").read_text()
    block = next(b for b in page.split("```python\n")[1:] if b.startswith("# mine.py"))
    (tmp_path / "mine.py").write_text(block.split("```")[0])
    result = learn(Settings(recipe=str(tmp_path / "mine.py")))
    assert result["weights_sha256"] == learn(Settings(recipe="er"))["weights_sha256"]


PAGES = (
    *("ir", "replay", "durable-store", "generative-replay", "streams", "online", "budgets"),
    *("streaming-statistics", "retrieval", "deltas", "few-shot"),
    *("isolation", "fit-command", "meta"),
)


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parent.parent / "docs" / "guide" / f"{page}.md").read_text()
    monkeypatch.chdir(tmp_path)
    path, names = tmp_path / "page.py", {"__name__": "page"}
    blocks = [b.split("```")[0] for b in text.split("```python\n")[1:]]
    assert blocks
    path.write_text("\n".join(blocks))
    exec(compile(path.read_text(), str(path), "exec"), names)

"""EWC and replay in a training loop of your own, on a real stream, read top to bottom.

    python examples/continual/own_loop.py

Five tasks of two digits each arrive one after the other. The loop is plain PyTorch; Tessera adds a
buffer, an anchor after each task, and one plugin of the optimizer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessera import arch, checkpoint, data, metrics, opt
from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch

EPOCHS, BATCH, LR, LAM, SEED = 10, 32, 1e-3, 10.0, 0

torch.manual_seed(SEED)
bench = data.benchmark("digits", scenario="class")
model = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
)

replay = data.ReplayBuffer(capacity=200, seed=SEED)  # an exact uniform sample of all that came
anchors: list[arch.Anchor] = []  # what the model was after each task, and what mattered
matrix = metrics.AccuracyMatrix(len(bench))


def measure(after: int) -> None:
    """Accuracy on every task, the ones to come included."""
    for t in bench:
        with tg.no_grad():
            right = model(t.test.x).argmax(1) == t.test.y
        matrix.record(after, t.id, right.float().mean().item())


measure(after=0)
for task in bench:
    # The plugin adds EWC's gradient in one pass; loss.ewc(model, anchors, lam=LAM) is the same
    # penalty as a term of the loss.
    optimizer = tg.Adam(model.parameters(), lr=LR, plugin=opt.consolidate(anchors, lam=LAM))

    @tg.training_step
    def step(batch: Batch) -> Tensor:
        x_old, y_old = replay.sample_like(batch.x, ratio=1.0)
        x, y = T.concat([batch.x, x_old]), T.concat([batch.y, y_old])
        return T.cross_entropy(model(x), y)

    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(task.train.x)).split(BATCH):
            batch = Batch(task.train.x[rows], task.train.y[rows])
            step(batch)
            if epoch == 0:
                replay.add(batch.x, batch.y)

    anchors.append(arch.anchor_from(model, f"task{task.id}", data=[task.train]))
    measure(after=task.id)
    print(f"after task {task.id}: ", [f"{a:.2f}" for a in matrix.rows[task.id]])

print(f"average accuracy {matrix.average_accuracy():.3f}, forgetting {matrix.forgetting():.3f}")

# Everything that was learned, in one file without pickle; anchors load back as data and are bound
# to a model again with anchor.bind(model).
state = checkpoint.State(
    weights=model.state_dict(), anchors=anchors, replay=replay.state_dict(), step=len(bench)
)
checkpoint.save("own_loop.safetensors", state)
loaded = checkpoint.load("own_loop.safetensors")
print("saved own_loop.safetensors with", len(loaded.anchors), "anchors")

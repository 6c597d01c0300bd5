"""Online runs: they beat what learns nothing, repeat themselves, resume anywhere, and adapt."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tessera import checkpoint, data
from tessera.errors import (
    CheckpointError,
    InputError,
    MissingDataError,
    NonFiniteError,
    UnknownNameError,
)
from tessera.recipes import (
    ONLINE_RECIPES,
    OnlineProgress,
    OnlineSettings,
    Standardize,
    learn_online,
    saved_online_settings,
    small_mlp,
)

FAST: dict[str, Any] = {"rows": 3000, "threads": 1}


class Killed(Exception):
    """Stands for the end of the process: nothing is saved on its way out."""


def killer(at: int) -> Any:
    def watch(p: OnlineProgress) -> None:
        if p.rows >= at:
            raise Killed

    return watch


@pytest.mark.parametrize("name", ONLINE_RECIPES)
def test_a_run_beats_the_predictors_that_learn_nothing(name: str) -> None:
    result = learn_online(OnlineSettings(recipe=name, **FAST))
    assert result["rows"] == 3000
    assert result["accuracy"] > max(result["no_change"], result["majority"]) + 0.1
    assert len(result["curve"]) == 15
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("name", ONLINE_RECIPES)
@pytest.mark.parametrize("at", [40, 1000, 2300])
def test_a_run_interrupted_anywhere_ends_with_the_same_bits(
    name: str, at: int, tmp_path: Path
) -> None:
    settings = OnlineSettings(recipe=name, window=64, **FAST)
    whole = learn_online(settings)
    with pytest.raises(Killed):
        learn_online(settings, folder=tmp_path, every=3, watch=killer(at))
    assert 0 < checkpoint.load(tmp_path / "checkpoint.safetensors").step < whole["steps"]
    resumed = learn_online(settings, folder=tmp_path, resume=True)
    for key in ("weights_sha256", "accuracy", "curve", "drifts", "steps"):
        assert resumed[key] == whole[key], key


def test_forgetting_a_part_of_the_checkpoint_is_noticed(tmp_path: Path) -> None:
    settings = OnlineSettings(**FAST)
    whole = learn_online(settings)
    with pytest.raises(Killed):
        learn_online(settings, folder=tmp_path, every=3, watch=killer(1500))
    s = checkpoint.load(tmp_path / "checkpoint.safetensors")
    for lost in ("replay", "optimizer"):
        parts = {n: getattr(s, n) for n in s.__dataclass_fields__} | {lost: None}
        checkpoint.save(tmp_path / lost / "checkpoint.safetensors", checkpoint.State(**parts))
        resumed = learn_online(settings, folder=tmp_path / lost, resume=True)
        assert resumed["weights_sha256"] != whole["weights_sha256"], lost


def test_after_an_abrupt_drift_the_schedule_is_ahead_of_a_constant_rate() -> None:
    gains = []
    for seed in range(5):
        rows = data.sea(8000, drifts=[2000, 4000, 6000], seed=seed)
        a, b = (
            learn_online(OnlineSettings(recipe=name, seed=seed), rows=rows)
            for name in ("online", "steady")
        )
        assert a["drifts"], "no drift was seen"
        gains.append(a["accuracy"] - b["accuracy"])
    assert statistics.mean(gains) > 0.01
    assert min(gains) > 0


def test_dropout_resumes_exactly_too(tmp_path: Path) -> None:
    settings = OnlineSettings(model=f"{__name__}:dropout", **FAST)
    whole = learn_online(settings)
    with pytest.raises(Killed):
        learn_online(settings, folder=tmp_path, every=3, watch=killer(1000))
    resumed = learn_online(settings, folder=tmp_path, resume=True)
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def dropout(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.1), small_mlp(input_shape, num_classes))


def test_shards_on_disk_and_rows_in_memory_give_the_same_weights(tmp_path: Path) -> None:
    rows = data.stagger(900, drifts=[450], seed=1)
    for i in range(3):
        part = slice(300 * i, 300 * (i + 1))
        np.savez(tmp_path / f"{i}.npz", x=rows.x[part].numpy(), y=rows.y[part].numpy())
    settings = OnlineSettings(stream=str(tmp_path), num_classes=2)
    from_disk = learn_online(settings)
    in_memory = learn_online(settings, rows=rows)
    assert from_disk["weights_sha256"] == in_memory["weights_sha256"]


def test_a_stream_of_files_wants_its_number_of_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2), np.float32), y=np.arange(3))
    with pytest.raises(InputError, match=r"--classes C; labels are 0 .. C-1"):
        learn_online(OnlineSettings(stream=str(tmp_path)))
    with pytest.raises(InputError, match=r"labels 0 .. 1, got int64 0 .. 2"):
        learn_online(OnlineSettings(stream=str(tmp_path), num_classes=2))


@pytest.mark.parametrize("cap", ["budget_ms", "budget_joules"])
def test_a_budget_holds_the_steps_down(cap: str) -> None:
    free = learn_online(OnlineSettings(**FAST))
    # No step of this model takes less than a microsecond, or a microjoule.
    small = {"budget_ms": 1e-3, "budget_joules": 1e-6}[cap]
    tight = learn_online(OnlineSettings(**{cap: small}, **FAST))
    assert tight["steps"] < free["steps"] / 2
    assert tight["rows"] == 3000


def test_standardize_follows_the_stream_so_far() -> None:
    torch.manual_seed(0)
    rows = 3 + 5 * torch.randn(4000, 3)
    layer = Standardize(3)
    for part in rows.split(7):
        layer(part)
    torch.testing.assert_close(layer.mean, rows.mean(0))
    torch.testing.assert_close(layer.square, rows.var(0, correction=0))
    layer.eval()
    before = {n: b.clone() for n, b in layer.named_buffers()}
    out = layer(rows)
    torch.testing.assert_close(out, (rows - rows.mean(0)) / rows.std(0, correction=0))
    assert all(torch.equal(before[n], b) for n, b in layer.named_buffers())
    assert layer(torch.full((2, 3), 7.0)).isfinite().all()
    constant = Standardize(1)
    assert constant(torch.ones(4, 1)).tolist() == [[0.0]] * 4


def test_standardize_forgets_a_scale_that_is_gone() -> None:
    layer = Standardize(1, memory=100.0)
    layer(torch.zeros(10_000, 1))
    for _ in range(100):
        layer(torch.full((10, 1), 4.0))
    assert abs(layer.mean.item() - 4.0) < 1e-3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, InputError, "batch_size must be a whole number >= 1, got 0"),
        ({"lr": float("nan")}, InputError, "lr must be a finite number > 0"),
        ({"budget_ms": 0.0}, InputError, "budget_ms must be a finite number > 0"),
        ({"budget_joules": -1.0}, InputError, "budget_joules must be a finite number > 0"),
        ({"num_classes": 1}, InputError, "num_classes must be >= 2"),
        ({"recipe": "nonsense"}, UnknownNameError, "choose one of: online, steady"),
        ({"stream": "no/such/file.npz", "num_classes": 2}, MissingDataError, "no/such/file.npz"),
        ({"stream": __file__}, InputError, "is no shard|not a shard|shards are"),
    ],
)
def test_what_it_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        learn_online(OnlineSettings(**change))


def test_settings_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    learn_online(OnlineSettings(**FAST), folder=tmp_path)
    s = checkpoint.load(tmp_path / "checkpoint.safetensors")
    parts = {n: getattr(s, n) for n in s.__dataclass_fields__}
    newer = {**parts["counters"], "online": {**parts["counters"]["online"], "mood": 1}}
    changed = checkpoint.State(**(parts | {"counters": newer}))
    checkpoint.save(tmp_path / "checkpoint.safetensors", changed)
    with pytest.raises(CheckpointError, match=r"does not know: \['mood'\]"):
        saved_online_settings(tmp_path)


def test_an_unfinished_run_is_neither_overwritten_nor_resumed_as_another(tmp_path: Path) -> None:
    settings = OnlineSettings(**FAST)
    with pytest.raises(Killed):
        learn_online(settings, folder=tmp_path, every=3, watch=killer(1000))
    with pytest.raises(InputError, match="holds an unfinished run"):
        learn_online(settings, folder=tmp_path)
    other = OnlineSettings(**{**FAST, "seed": 1})
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 here"):
        learn_online(other, folder=tmp_path, resume=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_standardize_is_not_moved_by_a_batch_that_is_not_finite(bad: float) -> None:
    layer = Standardize(2)
    layer(torch.randn(8, 2))
    before = {n: b.clone() for n, b in layer.named_buffers()}
    with pytest.raises(NonFiniteError, match="not finite"):
        layer(torch.tensor([[1.0, bad], [0.0, 1.0]]))
    assert all(torch.equal(before[n], b) for n, b in layer.named_buffers())

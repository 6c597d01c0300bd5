"""Every recipe learns, repeats itself bit for bit, and survives an interruption anywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera import checkpoint
from tessera.errors import (
    CheckpointError,
    InputError,
    MissingDataError,
    NonFiniteError,
    UnknownNameError,
)
from tessera.recipes import RECIPES, Progress, Settings, learn, mlp

FAST: dict[str, Any] = {"epochs": 2, "threads": 1}


class Killed(Exception):
    """Stands for the end of the process: nothing is saved on its way out."""


def killer(at: int) -> Any:
    def watch(p: Progress) -> None:
        if p.step == at:
            raise Killed

    return watch


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, dict[str, Any]]:
    return {name: learn(Settings(recipe=name, **FAST)) for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_a_full_result(name: str, uninterrupted: dict[str, Any]) -> None:
    result = uninterrupted[name]
    rows = result["accuracy_matrix"]
    assert len(rows) == 6
    assert all(len(row) == 5 for row in rows)
    assert result["average_accuracy"] == pytest.approx(sum(rows[-1]) / 5)
    assert (result["forgetting"] is None) == (name == "joint")
    assert result["settings"]["recipe"] == result["recipe"] == name
    assert len(result["weights_sha256"]) == 64


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("at", [24, 57])
def test_a_run_interrupted_inside_a_task_ends_with_the_same_bits(
    name: str, at: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    with pytest.raises(Killed):
        learn(Settings(recipe=name, **FAST), folder=tmp_path, every=3, watch=killer(at))
    state = checkpoint.load(tmp_path / "checkpoint.safetensors")
    assert 0 < state.step < at
    assert state.stream["batch"] > 0, "the checkpoint should lie inside an epoch"
    resumed = learn(Settings(recipe=name, **FAST), folder=tmp_path, resume=True)
    expected = uninterrupted[name]
    assert resumed["weights_sha256"] == expected["weights_sha256"]
    assert resumed["accuracy_matrix"] == expected["accuracy_matrix"]
    assert resumed["curve"] == expected["curve"]


def test_forgetting_a_part_of_the_checkpoint_is_noticed(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    # The test above can fail: without the replay, or with a fresh optimizer, the bits differ.
    for lost in ("replay", "optimizer", "anchors"):
        folder = tmp_path / lost
        with pytest.raises(Killed):
            learn(Settings(recipe="er+ewc", **FAST), folder=folder, every=3, watch=killer(57))
        s = checkpoint.load(folder / "checkpoint.safetensors")
        parts = {n: getattr(s, n) for n in s.__dataclass_fields__}
        parts[lost] = () if lost == "anchors" else None
        checkpoint.save(folder / "checkpoint.safetensors", checkpoint.State(**parts))
        resumed = learn(Settings(recipe="er+ewc", **FAST), folder=folder, resume=True)
        assert resumed["weights_sha256"] != uninterrupted["er+ewc"]["weights_sha256"], lost


def test_the_seed_decides_everything(uninterrupted: dict[str, Any]) -> None:
    again = learn(Settings(recipe="er", **FAST))
    other = learn(Settings(recipe="er", seed=1, **FAST))
    assert again["weights_sha256"] == uninterrupted["er"]["weights_sha256"]
    assert other["weights_sha256"] != again["weights_sha256"]


def test_a_run_leaves_the_process_wide_generator_and_thread_count_alone() -> None:
    rng, threads = torch.random.get_rng_state(), torch.get_num_threads()
    learn(Settings(recipe="finetune", epochs=1, threads=2))
    assert torch.equal(rng, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


def dropout(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.3), mlp(input_shape, num_classes))


def test_dropout_resumes_exactly_too(tmp_path: Path) -> None:
    settings = Settings(recipe="er", model=f"{__name__}:dropout", **FAST)
    whole = learn(settings)
    with pytest.raises(Killed):
        learn(settings, folder=tmp_path, every=3, watch=killer(40))
    assert (
        learn(settings, folder=tmp_path, resume=True)["weights_sha256"] == whole["weights_sha256"]
    )


def test_replay_remembers_where_finetuning_forgets(uninterrupted: dict[str, Any]) -> None:
    # Two epochs on digits, class-incremental. Finetuning keeps the last task alone.
    assert uninterrupted["finetune"]["average_accuracy"] < 0.25
    for name in ("er", "der", "er+ewc"):
        assert uninterrupted[name]["average_accuracy"] > 0.45, name
    assert uninterrupted["joint"]["average_accuracy"] > 0.85


def test_regularisers_alone_do_not_solve_class_incremental(uninterrupted: dict[str, Any]) -> None:
    # As in every published comparison: a "fix" here would be a leak.
    for name in ("ewc", "online-ewc", "si", "lwf", "l2sp"):
        assert uninterrupted[name]["average_accuracy"] < 0.5, name


@pytest.mark.parametrize("scenario", ["task", "domain", "permuted"])
def test_the_other_scenarios_run_and_ewc_forgets_less(scenario: str) -> None:
    plain = learn(Settings(recipe="finetune", scenario=scenario, **FAST))
    held = learn(Settings(recipe="ewc", scenario=scenario, **FAST))
    assert held["forgetting"] < plain["forgetting"] + 0.005


def test_in_the_task_scenario_other_tasks_classes_are_never_answered() -> None:
    result = learn(Settings(recipe="finetune", scenario="task", **FAST))
    # Two classes a task: even the untrained row is near one half, not one tenth.
    assert sum(result["accuracy_matrix"][0]) / 5 > 0.3


def test_a_validation_split_measures_other_rows() -> None:
    on_test = learn(Settings(recipe="finetune", **FAST))
    held_out = learn(Settings(recipe="finetune", validation=0.2, **FAST))
    assert on_test["weights_sha256"] != held_out["weights_sha256"]


def test_a_users_own_file_is_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "from tessera import graph as tg, ops as T\n"
        "def recipe(run):\n"
        "    for task in run.tasks():\n"
        "        o = run.keep('optimizer', torch.optim.SGD(run.model.parameters(), lr=0.1))\n"
        "        @tg.training_step(optimizer=o)\n"
        "        def step(batch):\n"
        "            return T.cross_entropy(run.model(batch.x), batch.y)\n"
        "        for batch in run.batches(task):\n"
        "            run.log(step(batch))\n"
    )
    assert learn(Settings(recipe=str(file), epochs=1))["num_tasks"] == 5


def bad_model(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes + 1))


def not_a_model(input_shape: tuple[int, ...], num_classes: int) -> Any:
    return lambda x: x


class Exploding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.flatten(1)[:, :10] * (float("inf") if self.training else 1.0)


def exploding(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return Exploding()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"recipe": "ewcc"}, UnknownNameError, r"no recipe 'ewcc'; choose one of: finetune, joint"),
        ({"recipe": "none.py"}, UnknownNameError, r"no recipe file 'none.py'"),
        ({"scenario": "klass"}, UnknownNameError, r"no scenario 'klass'; choose one of"),
        ({"stream": "no/such/folder"}, MissingDataError, r"no/such/folder"),
        ({"model": "nowhere:f"}, UnknownNameError, r"no model function 'nowhere:f'.*PKG:FUNC"),
        ({"model": "tessera"}, UnknownNameError, r"no model function 'tessera'"),
        ({"model": f"{__name__}:bad_model"}, InputError, r"to \[n, 10\].*it gave \(2, 11\)"),
        ({"model": f"{__name__}:not_a_model"}, InputError, r"returned function, not an nn.Module"),
        ({"model": f"{__name__}:exploding"}, NonFiniteError, r"loss of step is nan"),
        ({"num_tasks": 3}, InputError, r"3"),
    ],
)
def test_what_cannot_work_is_one_clear_error(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        learn(Settings(**{"recipe": "finetune", "epochs": 1, **settings}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("buffer", 0),
        ("num_tasks", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lam", -1.0),
        ("lam", math.inf),
        ("validation", 1.0),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        Settings(**{name: value})


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        learn(Settings(recipe="er", **FAST), folder=tmp_path, every=3, watch=killer(30))
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"unfinished run \(step 29\).*--resume"):
        learn(Settings(recipe="er", **FAST), folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"other settings \(seed: 0 there, 5 here\)"):
        learn(Settings(recipe="er", seed=5, **FAST), folder=tmp_path, resume=True)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_finished_run_resumes_to_its_result(tmp_path: Path) -> None:
    first = learn(Settings(recipe="er", **FAST), folder=tmp_path)
    again = learn(Settings(recipe="er", **FAST), folder=tmp_path, resume=True)
    assert again["weights_sha256"] == first["weights_sha256"]
    assert again["accuracy_matrix"] == first["accuracy_matrix"]


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint.save(
        tmp_path / "checkpoint.safetensors", checkpoint.State(weights={"w": torch.zeros(1)})
    )
    with pytest.raises(CheckpointError, match=r"not of `tessera learn`"):
        learn(Settings(recipe="er", **FAST), folder=tmp_path, resume=True)

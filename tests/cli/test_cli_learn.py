"""The command as a user meets it: words in, files and an exit status out."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tessera import checkpoint
from tessera.cli import main
from tessera.errors import CheckpointError

QUICK = ["learn", "--epochs", "1", "--compare", "--quiet", "--threads", "1"]


def tessera(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tessera", *words], capture_output=True, text=True, check=False
    )


def test_a_run_prints_the_matrix_the_metrics_and_the_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["learn", "--recipe", "er", "--epochs", "1", "--report", str(tmp_path / "r")]
    words += ["--json", str(tmp_path / "r.json"), "--checkpoint", str(tmp_path / "c")]
    assert main(words) == 0
    out = capsys.readouterr().out
    for part in ("untrained", "after task 5", "on task 5", "ACC %", "forgetting"):
        assert part in out
    for row in ("er ", "finetune ", "joint "):
        assert f"\n{row}" in out
    assert str(tmp_path / "r" / "index.html") in out
    assert str(tmp_path / "c" / "checkpoint.safetensors") in out
    assert "next" in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert {
        "accuracy_matrix",
        "average_accuracy",
        "backward_transfer",
        "forward_transfer",
        "forgetting",
        "seconds",
        "seed",
        "recipe",
        "scenario",
        "stream",
        "weights_sha256",
    } <= set(result)
    assert [b["recipe"] for b in result["baselines"]] == ["finetune", "joint"]
    assert (tmp_path / "r" / "index.html").stat().st_size > 10_000


def test_the_printed_command_reproduces_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert main([*QUICK, "--recipe", "der", "--seed", "3", "--json", str(file)]) == 0
    first = json.loads(file.read_text())
    words = first["settings"]["command"].split()[1:]
    assert main([*words, "--compare", "--quiet", "--threads", "1", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["weights_sha256"] == first["weights_sha256"]


def test_report_makes_a_page_of_saved_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("er", "finetune"):
        assert main([*QUICK, "--recipe", name, "--json", str(tmp_path / f"{name}.json")]) == 0
    files = [str(tmp_path / "er.json"), str(tmp_path / "finetune.json")]
    assert main(["report", *files, "--out", str(tmp_path / "page")]) == 0
    assert (tmp_path / "page" / "index.html").exists()
    assert "index.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["learn", "--recipe", "ewcc"], 2, "there is no recipe 'ewcc'; choose one of: finetune"),
        (["learn", "--scenario", "klass"], 2, "there is no scenario 'klass'"),
        (["learn", "--stream", "nowhere"], 2, "there is no stream 'nowhere'"),
        (["learn", "--lam", "-1"], 2, "lam must be a finite number >= 0"),
        (["learn", "--epochs", "0"], 2, "epochs must be a whole number >= 1"),
        (["learn", "--resume"], 2, "--resume needs --checkpoint DIR"),
        (["learn", "--compare", "er", "nope"], 2, "there is no recipe 'nope'"),
        (["learn", "--checkpoint-every", "0"], 2, "--checkpoint-every must be >= 1"),
        (["report", "nowhere.json"], 2, "nowhere.json cannot be read as JSON"),
    ],
)
def test_wrong_words_are_one_line_and_a_status(
    words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == status
    err = capsys.readouterr().err
    assert err.startswith("tessera: ")
    assert message in err
    assert "Traceback" not in err


def test_a_truncated_checkpoint_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, "--checkpoint", str(tmp_path)]) == 0
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    before = file.read_bytes()
    assert main([*QUICK, "--checkpoint", str(tmp_path), "--resume"]) == 1
    assert str(file) in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.parametrize("option", ["--json", "--report", "--checkpoint"])
def test_a_place_that_cannot_be_written_is_one_error(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main([*QUICK, option, str(tmp_path / "file" / "x")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("tessera: ")
    assert str(tmp_path / "file") in err
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_is_one_error_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    words = [*QUICK, "--checkpoint", str(tmp_path)]
    assert tessera(*words).returncode == 0
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    # A limit on the size of files stands for a disk with no room left.
    code = (
        "import resource, sys; from tessera.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        f"sys.exit(main({words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "checkpoint.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_help_has_examples() -> None:
    done = tessera("learn", "--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert "--resume" in done.stdout


def step_of(folder: Path) -> tuple[int, int]:
    """(step, batches into the epoch) of the newest checkpoint; (0, 0) where there is none."""
    try:
        state = checkpoint.load(folder / "checkpoint.safetensors")
    except (CheckpointError, OSError):
        return 0, 0
    return state.step, state.stream["batch"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["er+ewc", "si"])
def test_killed_with_sigkill_inside_tasks_a_run_ends_with_the_same_bits(
    recipe: str, tmp_path: Path
) -> None:
    words = ["learn", "--recipe", recipe, "--epochs", "4", "--compare", "--quiet", "--threads", "1"]
    assert tessera(*words, "--json", str(tmp_path / "whole.json")).returncode == 0
    folder, rng = tmp_path / "run", random.Random(0)
    interrupted = 0
    for _ in range(3):
        more = ["--checkpoint", str(folder), "--checkpoint-every", "3", "--resume"]
        child = subprocess.Popen([sys.executable, "-m", "tessera", *words, *more])
        begun, _ = step_of(folder)
        deadline = time.monotonic() + 60
        while step_of(folder)[0] < begun + 20 and time.monotonic() < deadline:
            if child.poll() is not None:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        interrupted += child.returncode == -signal.SIGKILL
    assert interrupted >= 2
    assert step_of(folder)[0] > 0
    last = ["--checkpoint", str(folder), "--resume", "--json", str(tmp_path / "resumed.json")]
    assert tessera(*words, *last).returncode == 0

    def read(name: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((tmp_path / name).read_text())
        return result

    whole, resumed = read("whole.json"), read("resumed.json")
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["accuracy_matrix"] == whole["accuracy_matrix"]

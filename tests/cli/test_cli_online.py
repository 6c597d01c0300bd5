"""`tessera learn --online` as a user meets it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tessera import checkpoint, data
from tessera.cli import main
from tessera.errors import CheckpointError

QUICK = ["learn", "--online", "--rows", "2000", "--compare", "--quiet"]


def test_a_run_prints_accuracy_beside_the_floors_and_marks_the_drifts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["learn", "--online", "--rows", "8000", "--report", str(tmp_path / "r")]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    for row in ("online ", "steady ", "no-change ", "majority "):
        assert f"\n{row}" in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["drifts"]
    assert f"drifts       after row {result['drifts'][0]:,}" in out
    page = (tmp_path / "r" / "index.html").read_text()
    assert page.count("<polyline") == 2 * 4
    # One rule at every drift, in the drawing for wide pages and in that for phones.
    assert page.count('class="boundary"') == 2 * len(result["drifts"])


def test_the_printed_command_reproduces_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert main([*QUICK, "--lr", "0.02", "--seed", "3", "--json", str(file)]) == 0
    first = json.loads(file.read_text())
    words = first["settings"]["command"].split()[1:]
    assert main([*words, "--compare", "--quiet", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["weights_sha256"] == first["weights_sha256"]


def test_a_users_own_file_and_own_recipe(tmp_path: Path) -> None:
    rows = data.stagger(600, seed=2)
    np.savez(tmp_path / "rows.npz", x=rows.x.numpy(), y=rows.y.numpy())
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "def recipe(run):\n    for batch in run.batches():\n        run.test(batch)\n"
    )
    words = ["learn", "--online", "--stream", str(tmp_path / "rows.npz"), "--classes", "2"]
    words += ["--recipe", str(recipe), "--compare", "online", "--json", str(tmp_path / "r.json")]
    assert main([*words, "--quiet"]) == 0
    mine = json.loads((tmp_path / "r.json").read_text())
    assert mine["steps"] == 0
    assert mine["baselines"][0]["accuracy"] > mine["accuracy"] + 0.1


def test_report_makes_the_page_of_a_saved_online_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "online.json")
    assert main([*QUICK, "--json", file, "--report", str(tmp_path / "a")]) == 0
    assert main(["report", file, "--out", str(tmp_path / "b")]) == 0
    one, two = ((tmp_path / n / "index.html").read_text() for n in "ab")
    assert one == two
    tasks = str(tmp_path / "tasks.json")
    assert main(["learn", "--epochs", "1", "--compare", "--quiet", "--json", tasks]) == 0
    assert main(["report", file, tasks, "--out", str(tmp_path / "c")]) == 2
    assert "make two reports" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learn", "--online", "--scenario", "class"], "--scenario is for a sequence of tasks"),
        (["learn", "--online", "--epochs", "2"], "--epochs is for a sequence of tasks"),
        (["learn", "--budget-ms", "5"], "--budget-ms is for streams without tasks; add --online"),
        (["learn", "--online", "--recipe", "der"], "choose one of: online, steady"),
        (["learn", "--online", "--resume"], "--resume needs --checkpoint DIR"),
    ],
)
def test_wrong_words_are_told_apart(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--quiet"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tessera", "learn", "--online", "--rows", "12000", "--compare"]
    words += ["--quiet"]
    whole, rest, folder = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "run"
    subprocess.run([*words, "--json", str(whole)], check=True)
    words += ["--checkpoint", str(folder), "--checkpoint-every", "5"]
    process = subprocess.Popen(words)
    file = folder / "checkpoint.safetensors"
    while not file.exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(random.Random(1).random() / 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        assert checkpoint.load(file).step > 0
    except CheckpointError as error:
        pytest.fail(f"a killed run left a damaged checkpoint: {error}")
    subprocess.run([*words, "--resume", "--json", str(rest)], check=True)
    a, b = (json.loads(f.read_text()) for f in (whole, rest))
    assert a["weights_sha256"] == b["weights_sha256"]
    assert a["curve"] == b["curve"]

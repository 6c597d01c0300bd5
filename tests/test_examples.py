"""The examples run as a reader would run them, and learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# What each promises: a figure in its output and the least it may be.
PROMISES = {
    "own_loop.py": (r"average accuracy ([\d.]+)", 0.7),  # finetuning ends near 0.2
    # Majority gets 62 %; printed only with the line that the resumed weights are the same.
    "lora_tasks.py": (r"average accuracy, routed by retrieval ([\d.]+)", 0.9),
    # Printed only where a better candidate passed its gate and a spoilt one did not.
    "fewshot_lora_server.py": (
        r"passes\n.*is refused\n(?:.*\n)*.*to the last bit: ([\d.]+)%",
        99.9,
    ),
    # Of the frozen base, by class means, it is 79.6.
    "few_shot.py": (r"fitted delta\s+([\d.]+)[^\n]*\n.*\nloaded again: True", 82.0),
    # What conditioning on retrieved passages gains, with nothing trained.
    "retrieve.py": (r"passages are worth ([\d.]+) points", 6.0),
    # Accuracy on what had changed, after the server had learned it from feedback; 0.2 before.
    "serve_learning.py": (r"slipped  ([\d.]+)   by itself, generation 2", 0.7),
    # Of the frozen base it is 49.7 %.
    "hypernet.py": (r"a hypernetwork\s+([\d.]+) %[^\n]*\n.*answers the same: True", 82.0),
    # Of five characters of unseen scripts, from one picture each; the nearest by pixels gets 52.3.
    "maml_implicit.py": (r"adapted model\s+([\d.]+)", 70.0),
    "online_journal.py": (r"prequential accuracy ([\d.]+)%[^\n]*\n.*bit for bit: True", 80.0),
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda p: p.name)
def test_an_example_runs_from_any_folder_and_keeps_its_promise(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "MissingDataError" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    pattern, least = PROMISES[path.name]
    found = re.search(pattern, done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) > least
    assert len(path.read_text().splitlines()) <= 150

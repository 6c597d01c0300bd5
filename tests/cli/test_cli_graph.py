"""`tessera graph`: a file in, a graph out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera import graph as tg
from tessera.cli import main

STEP = """
import torch

model = torch.nn.Linear(4, 2)

def step(x, y):
    return torch.nn.functional.cross_entropy(model(x), y)

def branch(x, y):
    return x.sum() if x.sum() > 0 else y.sum()

inputs = (torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "step.py"
    path.write_text(STEP)
    return path


def test_it_prints_the_text_and_writes_what_it_is_asked_to(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dot, saved = tmp_path / "step.dot", tmp_path / "step.graph"
    assert main(["graph", f"{file}:step", "--dot", str(dot), "--save", str(saved)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("func @step(%x: tensor<5x4xf32>, %y: tensor<5xi64>) -> tensor<f32> {")
    assert tg.Graph.load(saved).text() == out
    assert dot.read_text().startswith('digraph "step" {')


def test_ops_and_joint(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", f"{file}:step", "--ops"]) == 0
    assert "step.py:7" in capsys.readouterr().out
    assert main(["graph", f"{file}:step", "--joint"]) == 0
    assert "func @step_joint" in capsys.readouterr().out


def test_inputs_may_be_a_function(file: Path) -> None:
    file.write_text(STEP.replace("inputs = (", "def inputs():\n    return ("))
    assert main(["graph", f"{file}:step"]) == 0


@pytest.mark.parametrize(
    ("target", "status", "message"),
    [
        ("step", 2, "FILE.py:FUNCTION"),
        ("nowhere.py:step", 2, "there is no file 'nowhere.py'"),
        ("{file}:stop", 2, "there is no function in"),
        ("{file}:branch", 1, "torch.where"),
    ],
)
def test_what_it_cannot_do_it_says(
    file: Path, target: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["graph", target.format(file=file)]) == status
    assert message in capsys.readouterr().err


def test_a_file_without_inputs_is_told_how_to_write_them(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(STEP.replace("inputs =", "examples ="))
    assert main(["graph", f"{file}:step"]) == 2
    assert "inputs = (torch.zeros(5, 4),)" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["graph", "--help"])
    assert "tessera graph step.py:step" in capsys.readouterr().out

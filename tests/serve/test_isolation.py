"""No answer is another tenant's or half swapped, none is lost or there twice, while all is swapped.

At full size: python benchmarks/serve_isolation.py, or TESSERA_ISOLATION=10000 with this test.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

REQUESTS = int(os.environ.get("TESSERA_ISOLATION", "100"))  # of each of 16 clients


@pytest.fixture
def isolation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("serve_isolation")
    for name in ("serve_isolation", "_served", "_timing"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_every_answer_is_of_one_whole_version_of_its_own_tenant(isolation, tmp_path):
    found = isolation.trial(tmp_path, REQUESTS)
    asked = isolation.CLIENTS * REQUESTS
    assert {what: found[what] for what in isolation.NONE} == dict.fromkeys(isolation.NONE, 0)
    assert found["asked"] == found["answered"] == found["in the log"] == asked
    assert found["swaps"] > 20  # else nothing was tried


def test_a_wrong_answer_would_be_seen(isolation, tmp_path):
    """The judge itself: another tenant's answer, half a delta's, another version than is named."""
    trial = isolation.Trial(tmp_path)

    def said(output, delta):
        return isolation.Said(
            status=200, request="r", generation=1, delta=delta, outputs={"output": output}
        )

    own, other = trial.right[0][0], trial.right[0][isolation.VERSIONS]
    assert trial.judge(0, 0, said(own, trial.hashes[0])) == []
    assert trial.judge(0, 0, said(other, trial.hashes[0])) == ["of another tenant"]
    assert trial.judge(0, 0, said((own + other) / 2, trial.hashes[0])) == ["of no whole delta"]
    wrong = trial.judge(0, 0, said(own, trial.hashes[1]))
    assert wrong == ["of another delta than it names"]

"""No answer is another tenant's or half swapped, none lost or there twice, in swaps and fits.

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
    assert found["fits"] > 0
    assert found["of fitted deltas"] > 0


def test_a_wrong_answer_would_be_seen(isolation, tmp_path):
    """The judge itself: another tenant's answer, half a delta's, another version than is named."""
    trial = isolation.Trial(tmp_path)

    def judged(output, **other):
        right = {"tenant": 0, "input": 0, "request": "r", "said": "r", "least": 3, "generation": 3}
        got = isolation.Got(**{**right, "delta": trial.hashes[0], "output": output, **other})
        return trial.judge(got)

    own, others = trial.right[0][0], trial.right[0][isolation.VERSIONS]
    assert judged(own) == []
    assert judged(own[:0]) == ["of another shape"]
    assert judged(others) == ["of another tenant"]
    assert judged((own + others) / 2) == ["of no whole delta"]
    assert judged(own, delta=trial.hashes[1]) == ["of another delta than it names"]
    assert judged(own, said="s") == ["of another request"]
    assert judged(own, generation=2) == ["older than was acknowledged"]

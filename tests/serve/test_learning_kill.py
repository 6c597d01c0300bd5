"""A server is killed in the middle of a round: another one goes on, nothing is half done."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.serve._learning import ROUND_MS, Place, policy

from tessera.serve.fitting_values import FitSettings
from tessera.serve.records import SYSTEM

CHILD = """
import sys
from pathlib import Path
from tests.serve._learning import Place
place = Place(sys.argv[1], Path(sys.argv[2]))
place.learner.look()
"""


def test_a_round_that_kill_9_broke_off_is_run_by_another(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    place = Place(url, tmp_path)
    long = FitSettings(r=2, steps=1000, lr=1e-6, head="2", budget={"ms": ROUND_MS})
    place.learning.set(policy(fit=long, replay=64), by=SYSTEM)
    place.traffic(12)
    place.traffic(12, drifted=True)
    root = Path(__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", CHILD, url, str(tmp_path)], cwd=root)
    try:
        while not place.learning.state("acme", "clf").busy:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(20)
    assert place.learning.spending("acme").ms == ROUND_MS
    assert place.steps() == ["policy", "drift"]
    place.learner.look()  # its turn is not over yet
    assert place.steps() == ["policy", "drift"]
    place.clock.now += 121
    place.learning.set(policy(), by=SYSTEM)
    place.learner.look()
    assert place.steps() == ["policy", "drift", "policy", "fit", "gate"]
    assert place.alias()[0] == 2
    assert place.learning.spending("acme").ms > ROUND_MS
    place.registry.audit.verify()
    place.close()

"""The watcher: sees what became of answers, fits candidates behind them, lets gates decide."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import final

from tessera.errors import BusyError, InputError, StorageError, TesseraError
from tessera.serve.learning_going import Going, Means, Stopped
from tessera.serve.learning_values import LearningPolicy, Round
from tessera.serve.records import Key

__all__ = ["Learner"]

_LOG = logging.getLogger("tessera.serve")
_LOOK_S = 1.0


@final
class Learner:
    """Looks about once a second at the feedback of aliases that learn, and runs what is due.

    Any number of servers on one database may each have one: a row of feedback is looked at once,
    and a round is run by whoever takes its turn. No request waits for it: it has no lock of the
    engine's, and begins a fit only where none that came with a request is there.

    Args:
        means: What it works with.
        every_s: How often it looks.
    """

    def __init__(self, means: Means, *, every_s: float = _LOOK_S) -> None:
        self._means, self._every_s = means, every_s
        self._learning = means.registry.learning
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tessera-learn", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking; a round under way is left to whoever goes on."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def set(self, policy: LearningPolicy, *, by: Key) -> LearningPolicy:
        """Let an alias learn, if this server could run its rounds.

        Raises:
            InputError: It could not; the message says why.
            UnknownNameError: As `Learning.set`; so AccessError.
        """
        if self._means.keep != "inputs":
            raise InputError(
                "learning needs the inputs of past requests, and this server keeps "
                f"{self._means.keep}; start it with --keep inputs"
            )
        most = self._means.fitter.settings
        if policy.window + policy.replay > most.rows:
            raise InputError(
                f"window and replay are {policy.window + policy.replay} examples together, and a "
                f"fit here takes {most.rows}"
            )
        if not 1 <= policy.fit.steps <= most.steps:
            raise InputError(f"fit.steps is 1 to {most.steps}, got {policy.fit.steps}")
        return self._learning.set(policy, by=by)

    def look(self) -> None:
        """Look at new feedback, and run the rounds that are due.

        Raises:
            StorageError: The database is away.
        """
        failed: Exception | None = None
        for tenant, alias in self._learning.rounds.behind():
            try:
                while not self._stop.is_set() and self._learning.rounds.look(tenant, alias):
                    pass
            except StorageError:
                raise
            except Exception as error:  # one alias that cannot be read does not stop the others
                failed = error
        for tenant, alias, why in self._learning.rounds.ready():
            if self._stop.is_set():
                return
            with contextlib.suppress(BusyError, Stopped):  # then the next look finds it again
                self._round(tenant, alias, why)
        if failed is not None:
            raise failed

    def run(self, tenant: str, alias: str) -> Round:
        """Run a round now, on all feedback so far.

        Raises:
            UnknownNameError: The alias does not learn.
            BusyError: A round or a fit is under way, or the budget is spent.
        """
        while self._learning.rounds.look(tenant, alias):
            pass
        try:
            found = self._round(tenant, alias, "asked")
        except Stopped as error:
            raise BusyError(f"the round of {alias!r} was broken off: {error}") from error
        assert found is not None
        return found

    # ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        said = ""  # the same trouble is told once, not every second
        while not self._stop.wait(self._every_s):
            try:
                self.look()
                said = ""
            except StorageError as error:
                if said != "away":
                    _LOG.error("the registry is away, and learning waits for it: %s", error)
                said = "away"
            except Exception as error:  # a watcher that ended would be missed by nobody
                if said != repr(error):
                    _LOG.exception("learning failed, and goes on")
                said = repr(error)

    def _round(self, tenant: str, alias: str, why: str) -> Round | None:
        with self._means.fitter.place(tenant, behind=True):
            task = self._learning.rounds.begin(tenant, alias, why)
            if task is None:
                return None
            going = Going(self._means, task, self._stop)
            try:
                return going.run()
            except (BusyError, Stopped):
                self._learning.rounds.drop(task, going.spent)
                raise
            except StorageError:  # the turn ends by itself
                raise
            except TesseraError as error:
                return going.skip(f"the round failed: {error}")
            except Exception as error:
                going.skip(f"the round failed: {error!r:.300}")
                raise

"""A whole server, put together: what the command starts, and a test can start in process."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import final

from prometheus_client import Gauge
from torch import nn

from tessera.arch import base_hash
from tessera.errors import StorageError
from tessera.serve.app import App, make_app
from tessera.serve.batch import device_of, form_of
from tessera.serve.blobs import Blobs
from tessera.serve.dashboard import add_dashboard
from tessera.serve.engine import Engine
from tessera.serve.fitting import Fitter, FitterSettings
from tessera.serve.fitting_values import Origin
from tessera.serve.fitting_web import add_adaptation
from tessera.serve.learning_going import Means
from tessera.serve.learning_watcher import Learner
from tessera.serve.learning_web import add_learning
from tessera.serve.listen import Server
from tessera.serve.recorder import Recorder
from tessera.serve.registry import Registry
from tessera.serve.resolve import Ways
from tessera.serve.rollout_desk import Desk
from tessera.serve.rollout_web import add_rollouts
from tessera.serve.settings import AppSettings

__all__ = ["Service", "ServiceSettings"]

_LOG = logging.getLogger("tessera.serve")
_LOOK_S = 0.5


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServiceSettings:
    """Where a server keeps its things, and how much it takes on.

    Attributes:
        db: ``sqlite:///path`` or ``postgresql+psycopg://...``.
        blobs: A folder, or ``s3://bucket/prefix``.
        keep: What the audit log keeps of requests and of shots: see `Recorder`.
        slots: Deltas in use at a time.
        max_rows: Rows of a batch.
        deadline_ms: How long a request waits for company.
        queue_rows: Rows that may wait.
        app: Bounds of the HTTP face.
        fits: How many fits, and how large, it runs for its tenants.

    Example:
        >>> ServiceSettings(db="sqlite:///registry.db", blobs="blobs").slots
        64
    """

    db: str
    blobs: str
    keep: str = "inputs"
    slots: int = 64
    max_rows: int = 64
    deadline_ms: float = 2.0
    queue_rows: int = 1024
    app: AppSettings = field(default_factory=AppSettings)
    fits: FitterSettings = field(default_factory=FitterSettings)


@final
class Service:
    """One model, served: registry, engine, recorder and application.

    Args:
        model: The base. It is this server's alone while it runs.
        settings: See `ServiceSettings`.
        origin: How another process builds the same base: fits then run in one that stands back.
            None: in a thread of this one.

    Attributes:
        app: The ASGI application.
        registry: Tenants, keys, deltas, aliases, and the audit log.
        engine: Runs batches.
        recorder: Writes what was answered into the log.
        fitter: Fits deltas to shots that come with a request.
        learner: Fits them to feedback, in the background.
        admin_key: The secret that was made at the first start; None at later ones. It is shown
            once, and kept nowhere.

    Raises:
        StorageError: The database or the blobs are not to be had.
        CheckpointError: The audit log is damaged, or of a newer version.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> where = ServiceSettings(db=f"sqlite:///{folder}/registry.db", blobs=f"{folder}/blobs")
        >>> with Service(nn.Linear(2, 1), where) as service:
        ...     [event.kind for event in service.registry.audit.read()][-1]
        'server.start'
    """

    def __init__(
        self, model: nn.Module, settings: ServiceSettings, origin: Origin | None = None
    ) -> None:
        self.model = model.eval()
        blobs = Blobs(settings.blobs)
        base = base_hash(model)
        self.registry = Registry(settings.db, blobs, base_hash=base)
        try:
            self.admin_key = self.registry.first_admin_key(
                os.environ.get("TESSERA_ADMIN_KEY") or None
            )
            self.recorder = Recorder(
                self.registry.audit,
                blobs,
                base_hash=base,
                keep=settings.keep,
                device=device_of(model),
            )
        except BaseException:
            self.registry.close()
            raise
        self.engine = Engine(
            self.model,
            self.registry.load,
            slots=settings.slots,
            max_rows=settings.max_rows,
            deadline_ms=settings.deadline_ms,
            queue_rows=settings.queue_rows,
            on_batch=self.recorder.batch,
        )
        self.app: App = make_app(
            self.registry,
            self.engine,
            settings=settings.app,
            recorder=self.recorder,
            ways=Ways(
                sessions=self.registry.sessions, experiments=self.registry.rollouts.experiments
            ),
        )
        self.fitter = Fitter(self.model, self.registry, settings.fits, origin)
        limits, keep = settings.app.limits, settings.keep
        add_adaptation(self.app.management, self.registry, self.fitter, limits=limits, keep=keep)
        desk = Desk(self.registry.rollouts, self.engine, self.recorder)
        add_rollouts(self.app.management, self.registry, desk, limits=settings.app.limits)
        self.learner = self._learns(blobs, desk, keep)
        self.registry.sessions.keep = settings.keep == "inputs"
        self.registry.sessions.after_end = self.engine.forget
        self._measures()
        self._dashboard = add_dashboard(self.app, self.registry, self.engine)
        self._stop = threading.Event()
        self._looking = threading.Thread(target=self._look, name="tessera-look", daemon=True)
        self._looking.start()
        self.learner.start()

    def _measures(self) -> None:
        meters = self.app.meters
        for name, about, read in (
            ("tessera_queue_rows", "Rows that wait for a batch", self.engine.waiting),
            ("tessera_slots_used", "Deltas in the bank", lambda: self.engine.slots_used),
            (
                "tessera_log_lost",
                "Events the audit log could not take",
                lambda: self.recorder.failed,
            ),
        ):
            Gauge(name, about, registry=meters.registry).set_function(read)
        self.registry.audit.told = meters.event

    def _learns(self, blobs: Blobs, desk: Desk, keep: str) -> Learner:
        learner = Learner(
            Means(
                registry=self.registry,
                blobs=blobs,
                fitter=self.fitter,
                desk=desk,
                keep=keep,
                padding=form_of(self.model).padding,
            )
        )
        add_learning(self.app.management, self.registry, learner)
        return learner

    def _look(self) -> None:
        """Pick up what other processes changed."""
        away = False
        while not self._stop.wait(_LOOK_S):
            try:
                self.registry.refresh()
                self.registry.sessions.sweep()
                self._dashboard.sample()
                away = False
            except StorageError as error:
                if not away:
                    _LOG.error("the registry cannot be read, and is served as it was: %s", error)
                away = True

    def server(self, host: str = "127.0.0.1", port: int = 8080) -> Server:
        """uvicorn over the application; ``run()`` it."""
        return Server(self.app, host=host, port=port)

    def close(self) -> None:
        """Answer what is queued, write the log, and let go of everything."""
        self._stop.set()
        self._looking.join()
        self.learner.close()
        self.fitter.close()
        self.engine.close()
        self.app.close()
        self.recorder.close()
        self.registry.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

"""A client of the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, final

import httpx
from torch import Tensor

from tessera.arch import Delta
from tessera.errors import InputError, TesseraError
from tessera.serve import fitting_questions, learning_questions, questions, rollout_questions
from tessera.serve.fitting_values import Adapted, FitSettings
from tessera.serve.gates import Policy
from tessera.serve.learning_values import LearningPolicy, LearningState, Round
from tessera.serve.questions import Question
from tessera.serve.records import Alias, DeltaRecord, Key, Session, Tenant
from tessera.serve.rollout import Experiment
from tessera.serve.rollout_values import Asked, Feedback, Gate, Gated, Shots, Watch

__all__ = ["Client"]

T = TypeVar("T")


@final
class Client:
    """A client of the server.

    A request that fails raises the error that the server raised: `AccessError`, `BusyError` with
    its `retry_after_s`, and so on. Any number of threads may share it.

    Args:
        url: For example "http://127.0.0.1:8080".
        key: The secret of a key.
        tenant: Whose things are meant; needed with an admin's key, else the key's own.
        timeout_s: For each step of a request: to connect, to send, to wait.
        transport: In place of the network.

    Example:
        >>> with Client("http://127.0.0.1:1", "tsr_secret") as client:  # where no server is
        ...     client.ready()
        False
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        tenant: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        if tenant is not None:
            headers["X-Tessera-Tenant"] = tenant
        self._tenant = tenant
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=timeout_s, transport=transport
        )

    def close(self) -> None:
        """Let the connections go."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, question: Question[T]) -> T:
        try:
            response = self._http.request(**question.arguments())
        except httpx.HTTPError as error:
            raise TesseraError(
                f"{self._http.base_url} did not answer: {error or type(error).__name__}"
            ) from error
        questions.check(response)
        return question.read(response)

    def _own(self) -> str:
        if self._tenant is None:
            self._tenant = (self._ask(questions.own_key())).tenant
        if self._tenant is None:
            raise InputError("an admin's client says whom it acts for: Client(.., tenant=NAME)")
        return self._tenant

    # --- the data ----------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether the server takes requests; False also where there is none."""
        try:
            return self._ask(questions.ready())
        except TesseraError:
            return False

    def metadata(self, model: str) -> dict[str, Any]:
        """What a model takes and gives, and its version."""
        return self._ask(questions.metadata(model))

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Tensor],
        *,
        outputs: Sequence[str] = (),
        request_id: str = "",
        timeout_s: float | None = None,
        session: str = "",
    ) -> dict[str, Tensor]:
        """What a model makes of some inputs.

        Args:
            model: An alias of the tenant.
            inputs: Name -> [rows, ...].
            outputs: What is wanted; empty: everything.
            request_id: Under which the server's log has it.
            timeout_s: Refused where it has not started by then.
            session: Whose request it is, so that an experiment gives all of them one arm; "": all
                of this key are.

        Returns:
            Name -> [rows, ...].
        """
        return self._ask(
            questions.infer(
                model,
                inputs,
                outputs=outputs,
                request_id=request_id,
                timeout_s=timeout_s,
                session=session,
            )
        )

    # --- the management ----------------------------------------------------------------------

    def create_tenant(self, name: str) -> Tenant:
        """Make a tenant; with an admin's key."""
        return self._ask(questions.create_tenant(name))

    def tenants(self) -> list[Tenant]:
        """All tenants; with a tenant's key, itself."""
        return self._ask(questions.tenants())

    def create_key(self, scopes: Sequence[str]) -> tuple[Key, str]:
        """Make a key of the tenant, or the admins: (key, secret, which is said this once)."""
        return self._ask(questions.create_key(self._tenant, scopes))

    def keys(self) -> list[Key]:
        """The tenant's keys that are in force; the admins', where an admin's client has none."""
        return self._ask(questions.keys(self._tenant))

    def revoke_key(self, id: str) -> None:
        """Put one of `keys` out of force."""
        self._ask(questions.revoke_key(self._tenant, id))

    def upload(self, delta: Delta, *, parent: str = "") -> DeltaRecord:
        """Upload a delta as it is now; `parent` is the hash of the one it came from."""
        return self._ask(questions.upload(self._own(), delta, parent))

    def deltas(self) -> list[DeltaRecord]:
        """The tenant's deltas."""
        return self._ask(questions.deltas(self._own()))

    def aliases(self) -> list[Alias]:
        """The tenant's aliases: the models it can ask."""
        return self._ask(questions.aliases(self._own()))

    def set_alias(self, name: str, delta: str, *, generation: int, reason: str = "") -> Alias:
        """Point an alias to a delta, if nobody has changed it since it was read.

        Args:
            name: The alias.
            delta: A delta's hash; "": the base alone.
            generation: That was read; 0: there is none yet.
            reason: For the history, in a line.

        Raises:
            ConflictError: It is at another generation by now.
        """
        return self._ask(
            questions.set_alias(self._own(), name, delta, generation=generation, reason=reason)
        )

    def rollback(self, name: str, *, generation: int | None = None, reason: str = "") -> Alias:
        """Point an alias to the delta before; `generation`: if it is still the one read."""
        return self._ask(questions.rollback(self._own(), name, generation, reason))

    def history(self, name: str) -> list[Alias]:
        """All generations of an alias, the oldest first."""
        return self._ask(questions.history(self._own(), name))

    # --- what adapts -------------------------------------------------------------------------

    def fit(
        self,
        inputs: Mapping[str, Tensor],
        labels: Tensor | None = None,
        how: FitSettings | None = None,
        *,
        alias: str = "",
        generation: int = 0,
        reason: str = "",
        session_s: float | None = None,
    ) -> Adapted:
        """Fit a delta to some shots on the server, which keeps it.

        Args:
            inputs: Name -> [shots, ...].
            labels: int64 [shots]; None: among the inputs, for a model that computes its own loss.
            how: Kind, rank, sites, steps, budget; None: a LoRA as the server makes it.
            alias: Points to it afterwards, if it is still at `generation`.
            generation: As for `set_alias`.
            reason: As for `set_alias`.
            session_s: Keep it for so long only, as a session.

        Raises:
            BusyError: A fit of the tenant's is under way, or too many are.
            ConflictError: The alias is at another generation; if by then the delta was fitted, the
                message has its hash.
        """
        means = {"alias": alias, "generation": generation, "reason": reason} if alias else {}
        return self._ask(
            fitting_questions.fit(
                self._own(), inputs, labels, how, {**means, "session_s": session_s}
            )
        )

    def session(
        self,
        delta: str = "",
        *,
        ttl_s: float,
        inputs: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        how: FitSettings | None = None,
    ) -> Session:
        """Begin a session: its `name` is a model's until it ends.

        Args:
            delta: Over one that the tenant holds.
            ttl_s: How long, 1 to 86,400 s.
            inputs: In place of `delta`: over a new one, fitted to these shots.
            labels: As for `fit`.
            how: As for `fit`.
        """
        return self._ask(fitting_questions.session(self._own(), delta, ttl_s, inputs, labels, how))

    def sessions(self) -> list[Session]:
        """The tenant's sessions that are not over."""
        return self._ask(fitting_questions.sessions(self._own()))

    def end_session(self, id: str) -> None:
        """End a session before its time."""
        self._ask(fitting_questions.end_session(self._own(), id))

    def keep_session(self, id: str) -> DeltaRecord:
        """Let the tenant hold a session's delta; the session ends all the same."""
        return self._ask(fitting_questions.keep_session(self._own(), id))

    # --- rollouts ----------------------------------------------------------------------------

    def begin_experiment(
        self, alias: str, candidate: str, *, share: float, mode: str = "split", salt: str = ""
    ) -> Experiment:
        """Give a candidate a share of an alias's traffic, or change the share it has.

        Args:
            alias: Beside what it points to.
            candidate: A delta's hash; "": the base alone.
            share: 0 to 1; a larger one takes nobody the candidate away.
            mode: "shadow": the candidate computes the same besides, and nobody sees it.
            salt: Deals the keys; "": a new one.

        Raises:
            ConflictError: One with another candidate is running.
        """
        return self._ask(
            rollout_questions.begin_experiment(
                self._own(), alias, candidate, share=share, mode=mode, salt=salt
            )
        )

    def experiment(self, alias: str) -> dict[str, Any]:
        """The experiment of an alias, whether it holds, its feedback and its shadows."""
        return self._ask(rollout_questions.experiment(self._own(), alias))

    def end_experiment(self, alias: str, *, reason: str = "") -> None:
        """End the experiment of an alias; `reason`: for the log, in a line."""
        self._ask(rollout_questions.end_experiment(self._own(), alias, reason))

    def feedback(
        self,
        request: str,
        *,
        label: int | Sequence[int] | None = None,
        correct: bool | Sequence[bool] | None = None,
        metric: float | None = None,
        slices: Mapping[str, str | int | bool] | None = None,
    ) -> Feedback:
        """Say what became of an answer; on the server's disk when this returns.

        Args:
            request: The `request_id` it was asked under, or the answer's X-Request-Id.
            label: The right class, or that of each row: the server compares.
            correct: Whether the answer was right, or each row of it.
            metric: Any measure.
            slices: Feature -> value, for gates by slice.

        Raises:
            UnknownNameError: The log has no such answer.
            ConflictError: Other feedback was given for it.
        """
        return self._ask(
            rollout_questions.feedback(
                self._own(),
                request,
                label=label,
                correct=correct,
                metric=metric,
                slices=slices or {},
            )
        )

    def gate(
        self,
        alias: str,
        policy: Policy | None = None,
        *,
        candidate: str | None = None,
        shots: Shots | None = None,
        output: str = "",
        promote: bool = False,
        watch: Watch | None = None,
    ) -> Gated:
        """Decide whether a candidate may take an alias's place.

        Args:
            alias: Its place.
            policy: What is to be shown; None: `Policy()`.
            candidate: A delta's hash; None: the experiment's.
            shots: Held-out examples, on which both are run; None: the experiment's feedback.
            output: Which output has the scores of classes; "": the only one, or "logits".
            promote: Move the alias where the candidate passes.
            watch: Move it back where live accuracy falls; None: never.

        Raises:
            ConflictError: The alias moved meanwhile, or there is no such experiment.
        """
        asked = Asked(
            candidate=candidate,
            policy=policy or Policy(),
            shots=shots,
            output=output,
            promote=promote,
            watch=watch,
        )
        return self._ask(rollout_questions.gate(self._own(), alias, asked))

    def gates(self, alias: str) -> list[Gate]:
        """The last 100 gates of an alias, the newest first."""
        return self._ask(rollout_questions.gates(self._own(), alias))

    def gate_evidence(self, alias: str, id: str) -> dict[str, Any]:
        """What a gate was decided on: `gates.decide` of it is the decision."""
        return self._ask(rollout_questions.gate_evidence(self._own(), alias, id))

    def learn(self, policy: LearningPolicy) -> LearningPolicy:
        """Let an alias learn from its feedback, or otherwise than so far."""
        return self._ask(learning_questions.learn(self._own(), policy))

    def learning(self, alias: str) -> LearningState:
        """How far the learning of an alias is; UnknownNameError: it does not learn."""
        return self._ask(learning_questions.state(self._own(), alias))

    def learn_now(self, alias: str) -> Round:
        """Run a round; it returns when the gate has decided."""
        return self._ask(learning_questions.run(self._own(), alias))

    def end_learning(self, alias: str) -> None:
        """Let an alias learn no more."""
        self._ask(learning_questions.end(self._own(), alias))

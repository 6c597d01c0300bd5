"""A client of the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, final

import httpx
from torch import Tensor

from tessera.arch import Delta
from tessera.errors import InputError, TesseraError
from tessera.serve import questions
from tessera.serve.questions import Question
from tessera.serve.records import Alias, DeltaRecord, Key, Tenant

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
    ) -> dict[str, Tensor]:
        """What a model makes of some inputs.

        Args:
            model: An alias of the tenant.
            inputs: Name -> [rows, ...].
            outputs: What is wanted; empty: everything.
            request_id: Under which the server's log has it.
            timeout_s: Refused where it has not started by then.

        Returns:
            Name -> [rows, ...].
        """
        return self._ask(
            questions.infer(
                model, inputs, outputs=outputs, request_id=request_id, timeout_s=timeout_s
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
        """Make a key of the tenant: (key, secret). The secret is said this once."""
        return self._ask(questions.create_key(self._own(), scopes))

    def keys(self) -> list[Key]:
        """The tenant's keys that are in force."""
        return self._ask(questions.keys(self._own()))

    def revoke_key(self, id: str) -> None:
        """Put a key of the tenant out of force."""
        self._ask(questions.revoke_key(self._own(), id))

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

    def rollback(self, name: str, *, generation: int | None = None) -> Alias:
        """Point an alias to the delta before; `generation`: if it is still the one read."""
        return self._ask(questions.rollback(self._own(), name, generation=generation))

    def history(self, name: str) -> list[Alias]:
        """All generations of an alias, the oldest first."""
        return self._ask(questions.history(self._own(), name))

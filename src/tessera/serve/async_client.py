"""A client of the server for asyncio; `client.Client`, awaited."""

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

__all__ = ["AsyncClient"]

T = TypeVar("T")


@final
class AsyncClient:
    """A client of the server for asyncio: `Client`, awaited.

    A request that fails raises the error that the server raised: `AccessError`, `BusyError` with
    its `retry_after_s`, and so on. Any number of tasks of one loop may share it.

    Args:
        url: For example "http://127.0.0.1:8080".
        key: The secret of a key.
        tenant: Whose things are meant; needed with an admin's key, else the key's own.
        timeout_s: For each step of a request: to connect, to send, to wait.
        transport: In place of the network.

    Example:
        >>> import asyncio
        >>> async def main() -> bool:
        ...     async with AsyncClient("http://127.0.0.1:1", "tsr_secret") as client:
        ...         return await client.ready()  # where no server is
        >>> asyncio.run(main())
        False
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        tenant: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        if tenant is not None:
            headers["X-Tessera-Tenant"] = tenant
        self._tenant = tenant
        self._http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=timeout_s, transport=transport
        )

    async def close(self) -> None:
        """Let the connections go."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _ask(self, question: Question[T]) -> T:
        try:
            response = await self._http.request(**question.arguments())
        except httpx.HTTPError as error:
            raise TesseraError(
                f"{self._http.base_url} did not answer: {error or type(error).__name__}"
            ) from error
        questions.check(response)
        return question.read(response)

    async def _own(self) -> str:
        if self._tenant is None:
            self._tenant = (await self._ask(questions.own_key())).tenant
        if self._tenant is None:
            raise InputError(
                "an admin's client says whom it acts for: AsyncClient(.., tenant=NAME)"
            )
        return self._tenant

    # --- the data ----------------------------------------------------------------------------

    async def ready(self) -> bool:
        """Whether the server takes requests; False also where there is none."""
        try:
            return await self._ask(questions.ready())
        except TesseraError:
            return False

    async def metadata(self, model: str) -> dict[str, Any]:
        """What a model takes and gives, and its version."""
        return await self._ask(questions.metadata(model))

    async def infer(
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
        return await self._ask(
            questions.infer(
                model, inputs, outputs=outputs, request_id=request_id, timeout_s=timeout_s
            )
        )

    # --- the management ----------------------------------------------------------------------

    async def create_tenant(self, name: str) -> Tenant:
        """Make a tenant; with an admin's key."""
        return await self._ask(questions.create_tenant(name))

    async def tenants(self) -> list[Tenant]:
        """All tenants; with a tenant's key, itself."""
        return await self._ask(questions.tenants())

    async def create_key(self, scopes: Sequence[str]) -> tuple[Key, str]:
        """Make a key of the tenant: (key, secret). The secret is said this once."""
        return await self._ask(questions.create_key(await self._own(), scopes))

    async def keys(self) -> list[Key]:
        """The tenant's keys that are in force."""
        return await self._ask(questions.keys(await self._own()))

    async def revoke_key(self, id: str) -> None:
        """Put a key of the tenant out of force."""
        await self._ask(questions.revoke_key(await self._own(), id))

    async def upload(self, delta: Delta, *, parent: str = "") -> DeltaRecord:
        """Upload a delta as it is now; `parent` is the hash of the one it came from."""
        return await self._ask(questions.upload(await self._own(), delta, parent))

    async def deltas(self) -> list[DeltaRecord]:
        """The tenant's deltas."""
        return await self._ask(questions.deltas(await self._own()))

    async def aliases(self) -> list[Alias]:
        """The tenant's aliases: the models it can ask."""
        return await self._ask(questions.aliases(await self._own()))

    async def set_alias(self, name: str, delta: str, *, generation: int, reason: str = "") -> Alias:
        """Point an alias to a delta, if nobody has changed it since it was read.

        Args:
            name: The alias.
            delta: A delta's hash; "": the base alone.
            generation: That was read; 0: there is none yet.
            reason: For the history, in a line.

        Raises:
            ConflictError: It is at another generation by now.
        """
        return await self._ask(
            questions.set_alias(
                await self._own(), name, delta, generation=generation, reason=reason
            )
        )

    async def rollback(self, name: str, *, generation: int | None = None) -> Alias:
        """Point an alias to the delta before; `generation`: if it is still the one read."""
        return await self._ask(questions.rollback(await self._own(), name, generation=generation))

    async def history(self, name: str) -> list[Alias]:
        """All generations of an alias, the oldest first."""
        return await self._ask(questions.history(await self._own(), name))

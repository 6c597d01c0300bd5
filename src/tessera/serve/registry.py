"""The registry: tenants, keys, deltas and aliases, changed in transactions, seen in a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import final

from tessera.arch import Delta
from tessera.errors import UnknownNameError
from tessera.serve import access, pointers, tenancy
from tessera.serve.blobs import Blobs
from tessera.serve.holdings import Holdings
from tessera.serve.learning import Learning
from tessera.serve.ledger import Ledger
from tessera.serve.listing import Listing
from tessera.serve.records import Alias, DeltaRecord, Key, Tenant, View, content_hash
from tessera.serve.rollout_desk import Rollouts
from tessera.serve.sessions import Sessions, Ticks, machine_ticks

__all__ = ["Registry"]


@final
class Registry:
    """Who may ask, and what answers: one a process, any thread, any number of processes.

    Every change is one transaction: the state, the history of an alias, the event in the audit
    chain and the revision are there together or not at all, and on the disk when the call returns.
    Names of tenants that a key has no business with are unknown to it.

    Args:
        url: ``sqlite:///path`` or ``postgresql+psycopg://user:password@host/name``; its tables are
            made, or brought up to date.
        blobs: Where the deltas' files are kept.
        base_hash: `arch.base_hash` of the model that is served.
        clock: Seconds since 1970.
        ticks: Counts how long sessions last; None: the machine's.

    Raises:
        InputError: No such URL.
        StorageError: The database is away, or cannot be written to.
        CheckpointError: A newer Tessera has changed its tables.

    Example:
        >>> import tempfile, torch
        >>> place = tempfile.mkdtemp()
        >>> registry = Registry(f"sqlite:///{place}/r.db", Blobs(f"{place}/blobs"), base_hash="")
        >>> admin = registry.authenticate(registry.first_admin_key(None))
        >>> _ = registry.create_tenant("acme", by=admin)
        >>> delta = Delta(kind="prompt", tensors={"prompt": torch.zeros(2, 4)})
        >>> record = registry.put_delta("acme", delta, by=admin)
        >>> _ = registry.set_alias("acme", "mini", record.hash, generation=0, by=admin)
        >>> registry.view().aliases["acme", "mini"].delta == delta.hash, registry.audit.verify()
        (True, 4)
        >>> registry.close()
    """

    def __init__(
        self,
        url: str,
        blobs: Blobs,
        *,
        base_hash: str,
        clock: Callable[[], float] = time.time,
        ticks: Ticks | None = None,
    ) -> None:
        self.base_hash = content_hash(base_hash) if base_hash else ""
        self._ledger = Ledger(url, clock)
        self._holdings = Holdings(self._ledger, blobs, self.base_hash)
        self.sessions = Sessions(
            self._ledger, self._holdings, blobs, self.base_hash, ticks=ticks or machine_ticks()
        )
        self.rollouts = Rollouts(self._ledger, blobs, self.base_hash)
        self.learning = Learning(self._ledger)
        self.listing = Listing(self._ledger)
        self.audit = self._ledger.audit
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the database go; what is called later raises StorageError."""
        self._ledger.database.close()

    # -- the picture --------------------------------------------------------------------------

    def view(self) -> View:
        """The keys and aliases in force, as this process knows them; costs nothing.

        A change by this process is in it when the change's call returns; one by another, after
        `refresh`.
        """
        return self._ledger.picture.view

    def refresh(self) -> View:
        """Look for changes by other processes; to be called about once a second.

        Raises:
            StorageError: The database is away; `view` stays as it was.
        """
        self._ledger.refresh()
        self.sessions.refresh()
        self.rollouts.refresh()
        return self._ledger.picture.view

    def authenticate(self, secret: str) -> Key:
        """The key of a secret, by `view`; it takes as long whatever the secrets are.

        Raises:
            AccessError: No key in force has it.
        """
        return access.find_key(self._ledger.picture.view.keys, secret)

    # -- tenants and keys ---------------------------------------------------------------------

    def create_tenant(self, name: str, *, by: Key, max_deltas: int = 1000) -> Tenant:
        """Make a namespace.

        Args:
            name: 1 to 63 of ``a-z 0-9 -``, no hyphen first.
            by: An admin's.
            max_deltas: How many deltas it may hold, 0 to 10^9.

        Raises:
            InputError: It may not be called that.
            ConflictError: There is one of that name.
            AccessError: `by` is no admin's key in force.
            StorageError: The database is away or full; so with every method below.
        """
        return tenancy.create_tenant(self._ledger, name, max_deltas, by)

    def tenant(self, name: str) -> Tenant:
        """The tenant of that name.

        Raises:
            UnknownNameError: There is none.
        """
        with self._ledger.read() as connection:
            return access.find_tenant(connection, name)

    def tenants(self) -> list[Tenant]:
        """All of them, by name."""
        return tenancy.tenants(self._ledger)

    def create_key(
        self, tenant: str | None, scopes: Collection[str], *, by: Key
    ) -> tuple[Key, str]:
        """Make a key.

        Args:
            tenant: Whose; None: an admin's.
            scopes: Of a tenant's "infer", "manage" or both; of an admin's "admin".
            by: An admin's, or one that may manage this tenant.

        Returns:
            (key, secret). The secret is kept nowhere; who loses it needs a new key.

        Raises:
            InputError: No such scopes.
            UnknownNameError: No such tenant, or it is none of the key's business.
            AccessError: `by` may not.
            BusyError: The tenant has as many keys as it may, 100.
        """
        return tenancy.create_key(self._ledger, tenant, scopes, by)

    def keys(self, tenant: str | None) -> list[Key]:
        """The keys of a tenant (None: of the admins) that are in force, the oldest first.

        Raises:
            UnknownNameError: No such tenant.
        """
        return tenancy.keys(self._ledger, tenant)

    def revoke_key(self, id: str, *, by: Key) -> None:
        """Put a key out of force, for good; again is no harm.

        Raises:
            UnknownNameError: There is none of that id, or it is none of the key's business.
            AccessError: `by` may not.
            ConflictError: It is the last admin's key.
        """
        tenancy.revoke_key(self._ledger, id, by)

    def first_admin_key(self, secret: str | None) -> str | None:
        """Make sure that an admin can get in; called at each start.

        Args:
            secret: The operator's own (TESSERA_ADMIN_KEY): 20 to 256 printable characters. It is
                in force afterwards, and one that was given at an earlier start is not. None: where
                no admin has a key, make one.

        Returns:
            The secret that was made; None where none was needed.

        Raises:
            InputError: `secret` can be none.
            AccessError: It is a tenant's, or was revoked.
        """
        return tenancy.first_admin_key(self._ledger, secret)

    # -- deltas -------------------------------------------------------------------------------

    def put_delta(self, tenant: str, delta: Delta, *, by: Key, parent: str = "") -> DeltaRecord:
        """Keep a delta as it is now; the same content again gives the same record.

        Args:
            tenant: Who is to hold it.
            delta: For this server's base; one that names no base is taken to be, so its names and
                shapes should have been checked.
            by: An admin's, or one that may manage this tenant.
            parent: The hash of the one it came from, which the tenant holds.

        Raises:
            DeltaError: It is for another base, or not finite.
            InputError: It is larger than a file may be.
            UnknownNameError: No such tenant, or it is none of the key's business; no such parent.
            AccessError: `by` may not.
            BusyError: The tenant holds `max_deltas`.
        """
        return self._holdings.put(tenant, delta, parent=parent, by=by)

    def deltas(self, tenant: str) -> list[DeltaRecord]:
        """What a tenant holds, the oldest first.

        Raises:
            UnknownNameError: No such tenant.
        """
        return self._holdings.all(tenant)

    def delta(self, tenant: str, hash: str) -> DeltaRecord:
        """One that a tenant holds.

        Raises:
            InputError: `hash` is none.
            UnknownNameError: No such tenant, or it holds no such delta.
        """
        return self._holdings.get(tenant, hash)

    def load(self, hash: str, *, tenant: str | None = None) -> Delta:
        """A delta from its file, every byte checked: a snapshot on the CPU.

        Args:
            hash: Its hash.
            tenant: Whose file. None: anybody's; they compute the same, and may differ in what
                `info` says, so what is handed to a tenant should be read from that one's.

        Raises:
            InputError: `hash` is none.
            UnknownNameError: Nobody, or not this tenant, holds it; nor is it a session's.
            DeltaError: It is for another base than this server's.
            MissingDataError: Its file is lost.
            CheckpointError: Its file is damaged, or another's.
        """
        try:
            return self._holdings.load(hash, tenant)
        except UnknownNameError:
            if tenant is not None:
                raise
            return self.sessions.load(hash)

    # -- aliases ------------------------------------------------------------------------------

    def set_alias(
        self, tenant: str, name: str, delta_hash: str, *, generation: int, by: Key, reason: str = ""
    ) -> Alias:
        """Point an alias to a delta, if it is still what was read.

        Args:
            tenant: Whose.
            name: 1 to 128 of ``A-Z a-z 0-9 . _ -``, a letter or digit first.
            delta_hash: One that the tenant holds; "": the base alone.
            generation: The one that was read; 0: there is no such alias yet.
            by: An admin's, or one that may manage this tenant.
            reason: For the history, in a line of up to 500 characters.

        Returns:
            The alias, one generation on.

        Raises:
            ConflictError: It has changed since; the message says to what.
            InputError: A name, hash, generation or reason that can be none.
            UnknownNameError: No such tenant, or it is none of the key's business; no such delta.
            DeltaError: The delta is for another base than this server's.
            AccessError: `by` may not.
            BusyError: The tenant has as many aliases as it may, 1000.
        """
        return pointers.set_alias(
            self._ledger,
            Alias(
                tenant=tenant,
                name=name,
                generation=generation,
                delta=delta_hash,
                changed_s=0.0,
                reason=reason,
            ),
            base_hash=self.base_hash,
            by=by,
        )

    def rollback(
        self, tenant: str, name: str, *, by: Key, generation: int | None = None, reason: str = ""
    ) -> Alias:
        """Point an alias to what it pointed to before; again goes one further back.

        Args:
            tenant: Whose.
            name: The alias.
            by: An admin's, or one that may manage this tenant.
            generation: Roll back only if it is still at this one; None: in any case.
            reason: For the history, after what is said there anyway.

        Returns:
            The alias, one generation on.

        Raises:
            ConflictError: There is nothing before, or it has changed since.
            UnknownNameError: No such alias or tenant, or it is none of the key's business.
            DeltaError: The one before is for another base than this server's.
            AccessError: `by` may not.
        """
        return pointers.rollback(
            self._ledger,
            tenant,
            name,
            generation=generation,
            base_hash=self.base_hash,
            by=by,
            reason=reason,
        )

    def aliases(self, tenant: str) -> list[Alias]:
        """Those of a tenant, by name, as the database has them.

        Raises:
            UnknownNameError: No such tenant.
        """
        return pointers.aliases(self._ledger, tenant)

    def alias(self, tenant: str, name: str) -> Alias:
        """One of a tenant's, as the database has it.

        Raises:
            UnknownNameError: No such tenant or alias.
        """
        return pointers.alias(self._ledger, tenant, name)

    def history(self, tenant: str, name: str) -> list[Alias]:
        """All generations of an alias, the oldest first.

        Raises:
            UnknownNameError: No such tenant or alias.
        """
        return pointers.history(self._ledger, tenant, name)

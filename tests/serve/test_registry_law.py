"""The registry beside a model of dicts: any changes, by two processes, give the same."""

from __future__ import annotations

import os
import shutil
import tempfile

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

from tessera.arch import Delta
from tessera.errors import BusyError, ConflictError, UnknownNameError
from tessera.serve.blobs import Blobs
from tessera.serve.records import SYSTEM
from tessera.serve.registry import Registry

MOST = 3
DELTAS = [Delta(kind="prompt", tensors={"prompt": torch.full((1, 2), float(n))}) for n in range(5)]
TENANTS, ALIASES = st.sampled_from(["one", "two", "three"]), st.sampled_from(["a", "b"])
WHO = st.sampled_from([0, 1])  # of two registries over the same database


class Beside(RuleBasedStateMachine):
    """Each rule changes both, and compares what they say."""

    secrets: Bundle[tuple[str, str]] = Bundle("secrets")

    @initialize()
    def open(self) -> None:
        memory = "/dev/shm"  # where there is one: a change waits for the disk else
        self.folder = tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)
        self.both = [self.make(), self.make()]
        self.tenants: dict[str, set[str]] = {}
        self.keys: dict[str, str] = {}  # secret -> tenant
        # (tenant, alias) -> [(delta, which one it is a way back to, or None)]
        self.aliases: dict[tuple[str, str], list[tuple[str, int | None]]] = {}
        self.events = 0

    def make(self) -> Registry:
        return Registry(
            f"sqlite:///{self.folder}/r.db", Blobs(f"{self.folder}/blobs"), base_hash=""
        )

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            for registry in self.both:
                registry.close()
            shutil.rmtree(self.folder)

    def expect(self, error: type[Exception] | None, act: object, *args: object, **named: object):
        """What `act` returns; None where it raises this error, as it must."""
        found = None
        try:
            found = act(*args, **named, by=SYSTEM)
        except (ConflictError, UnknownNameError, BusyError) as raised:
            got = type(raised)
        else:
            got = None
            self.events += 1
        assert got is error
        return found

    @rule(who=WHO, tenant=TENANTS)
    def create_tenant(self, who: int, tenant: str) -> None:
        error = ConflictError if tenant in self.tenants else None
        self.expect(error, self.both[who].create_tenant, tenant, max_deltas=MOST)
        self.tenants.setdefault(tenant, set())

    @rule(target=secrets, who=WHO, tenant=TENANTS)
    def create_key(self, who: int, tenant: str):
        error = None if tenant in self.tenants else UnknownNameError
        made = self.expect(error, self.both[who].create_key, tenant, ["infer"])
        if made is None:
            return multiple()
        self.keys[made[1]] = tenant
        return made[0].id, made[1]

    @rule(who=WHO, key=secrets)
    def revoke_key(self, who: int, key: tuple[str, str]) -> None:
        id, secret = key
        self.expect(None, self.both[who].revoke_key, id)
        if self.keys.pop(secret, None) is None:
            self.events -= 1  # it was revoked already: nothing happened

    @rule(who=WHO, tenant=TENANTS, delta=st.sampled_from(DELTAS))
    def put_delta(self, who: int, tenant: str, delta: Delta) -> None:
        held, error = self.tenants.get(tenant), None
        if held is None:
            error = UnknownNameError
        elif len(held) == MOST and delta.hash not in held:
            error = BusyError
        record = self.expect(error, self.both[who].put_delta, tenant, delta)
        if record is not None and held is not None:
            assert record.hash == delta.hash
            self.events -= delta.hash in held
            held.add(delta.hash)

    @rule(
        who=WHO, tenant=TENANTS, name=ALIASES, delta=st.sampled_from(DELTAS), off=st.integers(0, 3)
    )
    def set_alias(self, who: int, tenant: str, name: str, delta: Delta, off: int) -> None:
        versions = self.aliases.get((tenant, name), [])
        error: type[Exception] | None = None
        if tenant not in self.tenants:
            error = UnknownNameError
        elif off == 1:
            error = ConflictError
        elif delta.hash not in self.tenants[tenant]:
            error = UnknownNameError
        generation = len(versions) + (off == 1)
        new = self.expect(
            error, self.both[who].set_alias, tenant, name, delta.hash, generation=generation
        )
        if new is not None:
            self.aliases[tenant, name] = [*versions, (delta.hash, None)]
            assert new.generation == len(versions) + 1

    @rule(who=WHO, tenant=TENANTS, name=ALIASES)
    def rollback(self, who: int, tenant: str, name: str) -> None:
        versions = self.aliases.get((tenant, name), [])
        error, at = None, -1
        if not versions:
            error = UnknownNameError
        else:
            at = len(versions) - 1 if versions[-1][1] is None else versions[-1][1]
            error = None if at else ConflictError
        new = self.expect(error, self.both[who].rollback, tenant, name)
        if new is not None:
            before = at - 1 if versions[at - 1][1] is None else versions[at - 1][1]
            versions.append((versions[before][0], before))
            assert new.delta == versions[before][0]

    @rule(who=WHO, n=st.integers(1, 3))
    def log(self, who: int, n: int) -> None:
        self.both[who].audit.extend([("request", None, {"n": i}) for i in range(n)])
        self.events += n

    @rule(who=WHO)
    def start_again(self, who: int) -> None:
        self.both[who].close()
        self.both[who] = self.make()

    @invariant()
    def they_say_the_same(self) -> None:
        for registry in self.both:
            view = registry.refresh()
            assert {at: (a.generation, a.delta) for at, a in view.aliases.items()} == {
                at: (len(versions), versions[-1][0]) for at, versions in self.aliases.items()
            }
            assert sorted(str(key.tenant) for key in view.keys.values()) == sorted(
                self.keys.values()
            )
        assert {t.name for t in registry.tenants()} == set(self.tenants)
        for tenant, held in self.tenants.items():
            assert {record.hash for record in registry.deltas(tenant)} == held
        for (tenant, name), versions in self.aliases.items():
            history = registry.history(tenant, name)
            assert [h.delta for h in history] == [delta for delta, _ in versions]
        for secret, tenant in self.keys.items():
            assert registry.authenticate(secret).tenant == tenant
        assert registry.audit.verify() == self.events


Beside.TestCase.settings = settings(
    max_examples=30, stateful_step_count=25, suppress_health_check=list(HealthCheck)
)
TestBeside = Beside.TestCase

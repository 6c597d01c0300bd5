"""What /v2 tells of the server and of a tenant's models, without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from tessera.errors import InputError, UnknownNameError
from tessera.serve.ports import Answering, Call, Viewing, only, reader
from tessera.serve.records import Alias
from tessera.serve.resolve import SESSION, Ways, resolve
from tessera.serve.settings import AppSettings
from tessera.serve.web import HttpError

__all__ = ["Catalogue", "Tally"]

_EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
_PLATFORM = "pytorch_tessera"


@final
class Tally:
    """What a model was asked for: requests answered and failed, their time, rows."""

    __slots__ = ("bad", "bad_ns", "good", "good_ns", "last_ms", "rows")

    def __init__(self) -> None:
        self.good = self.good_ns = self.rows = self.last_ms = 0
        self.bad = self.bad_ns = 0


@final
class Catalogue:
    """Metadata, configuration and statistics.

    Args:
        registry: Keys and aliases.
        engine: Its `signature`, if it has one, is what a model takes and gives.
        settings: The server's name.
        version: Of the server.
        ways: What besides aliases a model's name may stand for.
    """

    def __init__(
        self, registry: Viewing, engine: Answering, settings: AppSettings, version: str, ways: Ways
    ) -> None:
        self._registry, self._engine, self._ways = registry, engine, ways
        self._settings, self._version = settings, version
        self.tallies: dict[tuple[str, str], Tally] = {}

    def read(self, call: Call, parts: Sequence[str], *, draining: bool) -> Any:
        """The JSON of a GET; `parts` is its path behind /v2.

        Raises:
            HttpError: 503 of what would need a server that is not shutting down.
            UnknownNameError: There is no such thing, or none of this key's.
        """
        only(call, "GET")
        call.route = "metadata"
        match parts:
            case []:
                name = self._settings.name
                return {"name": name, "version": self._version, "extensions": _EXTENSIONS}
            case ["health", "live"]:
                return {"live": True}
            case ["health", "ready"]:
                if draining:
                    raise HttpError(503, "the server is shutting down")
                return {"ready": True}
            case ["models", "stats"]:
                tenant, view = reader(self._registry, call)
                names = sorted(n for t, n in view.aliases if t == tenant)
                stats = [self._stats(view.aliases[tenant, n]) for n in names]
                if (tenant, SESSION) in self.tallies:
                    stats.append(self._tallied(tenant, SESSION, ""))
                return {"model_stats": stats}
            case ["models", name]:
                return self._metadata(self._named(call, name))
            case ["models", name, "versions", version]:
                return self._metadata(self._named(call, name, version))
            case ["models", name, "versions", version, ("ready" | "config" | "stats") as word]:
                alias = self._named(call, name, version)
            case ["models", name, ("ready" | "config" | "stats") as word]:
                alias = self._named(call, name)
            case _:
                raise UnknownNameError(f"there is no {call.path[:80]!r}")
        if word == "stats":
            return {"model_stats": [self._stats(alias)]}
        if word == "config":
            return self._config(alias)
        if draining:
            raise HttpError(503, "the server is shutting down")
        return {"name": alias.name, "ready": True}

    def _named(self, call: Call, name: str, version: str | None = None) -> Alias:
        return resolve(self._registry, self._ways, call, name, version)

    def _metadata(self, alias: Alias) -> dict[str, Any]:
        signature = getattr(self._engine, "signature", None)
        sides = {}
        for side in ("inputs", "outputs"):
            sides[side] = [
                {"name": t.name, "datatype": t.datatype, "shape": list(t.shape)}
                for t in getattr(signature, side, ())
            ]
        version = str(alias.generation)
        return {"name": alias.name, "versions": [version], "platform": _PLATFORM, **sides}

    def _config(self, alias: Alias) -> dict[str, Any]:
        about = self._metadata(alias)
        sides = {}
        for side, word in (("inputs", "input"), ("outputs", "output")):
            sides[word] = [
                {"name": t["name"], "data_type": f"TYPE_{t['datatype']}", "dims": t["shape"]}
                for t in about[side]
            ]
        return {"name": alias.name, "platform": _PLATFORM, "backend": "tessera", **sides}

    def _stats(self, alias: Alias) -> dict[str, Any]:
        if alias.name.startswith(SESSION):
            raise UnknownNameError(
                f"a session has no statistics of its own; those of all are {SESSION!r} in "
                "/v2/models/stats"
            )
        return self._tallied(alias.tenant, alias.name, str(alias.generation))

    def _tallied(self, tenant: str, name: str, version: str) -> dict[str, Any]:
        tally = self.tallies.get((tenant, name), Tally())
        return {
            "name": name,
            "version": version,
            "last_inference": tally.last_ms,
            "inference_count": tally.rows,
            "execution_count": tally.good,
            "inference_stats": {
                "success": {"count": tally.good, "ns": tally.good_ns},
                "fail": {"count": tally.bad, "ns": tally.bad_ns},
            },
        }

    def repository(self, call: Call, parts: Sequence[str]) -> Any:
        """The JSON of a POST below /v2/repository.

        Raises:
            InputError: A model is to be loaded or unloaded.
            UnknownNameError: There is no such thing.
        """
        call.route = "repository"
        only(call, "POST")
        tenant, view = reader(self._registry, call)
        match parts:
            case ["index"]:
                return [
                    {"name": a.name, "version": str(a.generation), "state": "READY", "reason": ""}
                    for (owner, _), a in sorted(view.aliases.items())
                    if owner == tenant
                ]
            case ["models", _, "load" | "unload"]:
                raise InputError(
                    "models are not loaded and unloaded here: point an alias to a delta with "
                    f"PUT /v1/tenants/{tenant}/aliases/NAME"
                )
        raise UnknownNameError(f"there is no {call.path[:80]!r}")

"""/v2: the Open Inference Protocol on raw requests.

A model's name is an alias of the tenant whose key it is; its version is the alias's generation.
Nothing here waits for a disk: keys and aliases come from `registry.view()`, and a delta that is
not in memory is read in a thread.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from typing import Any, final

import orjson
from starlette.types import Receive, Send

from tessera.errors import InputError
from tessera.serve.catalogue import Catalogue, Tally
from tessera.serve.oip import InferRequest, decode, encode, length_of
from tessera.serve.ports import (
    Answered,
    Answering,
    Call,
    Recording,
    Viewing,
    only,
)
from tessera.serve.records import Alias
from tessera.serve.resolve import SESSION, Ways, choose, resolve
from tessera.serve.rollout import Arm
from tessera.serve.rollout_shadow import Shadows
from tessera.serve.settings import AppSettings
from tessera.serve.web import Disconnected, HttpError, Room, read_body, respond

__all__ = ["Inference"]

_JSON = [(b"content-type", b"application/json")]
# JSON of that many bytes takes long enough to hold up the others on the loop.
_ASIDE_BYTES = 128 << 10


@final
class Inference:
    """The answers of /v2.

    Args:
        registry: Keys and aliases.
        engine: Computes.
        settings: Bounds.
        room: For bodies.
        version: Of the server, in its metadata.
        recorder: Told of each answer before it is sent, on the event loop.
        ways: What besides aliases a model's name may stand for.
    """

    def __init__(
        self,
        registry: Viewing,
        engine: Answering,
        settings: AppSettings,
        room: Room,
        version: str,
        recorder: Recording | None = None,
        ways: Ways | None = None,
    ) -> None:
        self._registry, self._engine, self._settings = registry, engine, settings
        self._ways = ways or Ways()
        self.shadows = Shadows(engine, recorder)
        self._room, self._recorder = room, recorder
        self._catalogue = Catalogue(registry, engine, settings, version, self._ways)
        self.draining = False

    async def handle(self, call: Call, receive: Receive, send: Send) -> None:
        """Answer a request; errors are raised.

        Raises:
            TesseraError: It could not be answered.
            Disconnected: Its client went.
        """
        parts = [p for p in call.path.split("/") if p][1:]
        match parts:
            case ["models", name, "infer"]:
                await self._infer(call, name, None, receive, send)
                return
            case ["models", name, "versions", version, "infer"]:
                await self._infer(call, name, version, receive, send)
                return
            case ["repository", *rest]:
                body = await self._body(call, receive, self._settings.management_bytes)
                self._room.give(len(body))
                said = self._catalogue.repository(call, rest)
            case _:
                said = self._catalogue.read(call, parts, draining=self.draining)
        await self._send(call, send, orjson.dumps(said), list(_JSON))

    async def _send(
        self, call: Call, send: Send, body: bytes, headers: list[tuple[bytes, bytes]]
    ) -> None:
        headers.append((b"x-request-id", call.id.encode()))
        call.status, call.sent = 200, len(body)
        await respond(send, 200, body, headers, within_s=self._settings.send_timeout_s)

    async def _infer(
        self, call: Call, name: str, version: str | None, receive: Receive, send: Send
    ) -> None:
        call.route = "infer"
        only(call, "POST")
        self._refuse_if_draining()
        alias = resolve(self._registry, self._ways, call, name, version)
        call.tenant, call.alias = alias.tenant, alias.name
        body = await self._body(call, receive, self._settings.limits.body_bytes)
        call.received = len(body)
        tally = self._tally(alias)
        try:
            # As it is now that the body is there.
            alias = resolve(self._registry, self._ways, call, name, version)
            written, length, arm = await self._run(call, alias, body, receive)
        except BaseException:
            tally.bad += 1
            tally.bad_ns += int(1e9 * (time.monotonic() - call.began_s))
            raise
        finally:
            self._room.give(len(body))
        headers = [(b"x-tessera-delta", arm.delta.encode()), *arm.headers()]
        if length is None:
            headers += _JSON
        else:
            headers.append((b"content-type", b"application/octet-stream"))
            headers.append((b"inference-header-content-length", b"%d" % length))
        await self._send(call, send, written, headers)

    async def _run(
        self, call: Call, alias: Alias, body: bytearray, receive: Receive
    ) -> tuple[bytes, int | None, Arm]:
        """The answer's body, the length of its JSON, and which delta computed it."""
        header = call.headers.get(b"inference-header-content-length")
        length, limits = length_of(header), self._settings.limits
        if (len(body) if length is None else length) > _ASIDE_BYTES:
            asked = await asyncio.to_thread(decode, body, length, limits=limits)
        else:
            asked = decode(body, length, limits=limits)
        call.rows = len(next(iter(asked.inputs.values()), ()))
        arm = choose(self._registry, self._ways, call, alias, asked.parameters)
        call.delta = arm.delta
        answer = await self._answer(call, alias, arm, asked, receive)
        written, length = encode(
            alias.name,
            str(alias.generation),
            asked.id,
            answer.outputs,
            asked.outputs,
            asked.binary,
        )
        took = time.monotonic() - call.began_s
        if self._recorder is not None:
            self._recorder.request(
                call.id,
                tenant=alias.tenant,
                alias=alias.name,
                generation=alias.generation,
                answer=answer,
                inputs=asked.inputs,
                arm=arm.note(),
            )
        tally = self._tally(alias)
        tally.good += 1
        tally.good_ns += int(1e9 * took)
        tally.rows += call.rows
        tally.last_ms = int(1e3 * time.time())
        return written, length, arm

    def _tally(self, alias: Alias) -> Tally:
        # Names of sessions come and go: they are counted together.
        name = SESSION if alias.name.startswith(SESSION) else alias.name
        return self._catalogue.tallies.setdefault((alias.tenant, name), Tally())

    async def _answer(
        self, call: Call, alias: Alias, arm: Arm, asked: InferRequest, receive: Receive
    ) -> Answered:
        within_s = _timeout_s(asked, self._settings.infer_timeout_s)
        if self._engine.has(arm.delta):
            future = self._submit(call, alias, arm, asked, within_s)
        else:
            future = await asyncio.to_thread(self._submit, call, alias, arm, asked, within_s)
        waiter = asyncio.wrap_future(future)
        gone: asyncio.Future[Any] | None = None
        try:
            # Most are answered before it is worth looking whether the client is still there.
            until = call.began_s + within_s
            await asyncio.wait((waiter,), timeout=min(self._settings.look_s, within_s))
            while not waiter.done():
                left = until - time.monotonic()
                if left <= 0:
                    raise HttpError(503, f"there was no answer within {within_s:g} s")
                gone = gone or asyncio.ensure_future(receive())
                await asyncio.wait(
                    (waiter, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
                if gone.done() and not waiter.done():
                    raise Disconnected
            if waiter.cancelled():
                raise HttpError(503, "the request was dropped: the server is shutting down")
            answered: Answered = waiter.result()
            return answered
        finally:
            # Nobody waits any more; of what is done already, neither changes anything.
            waiter.cancel()
            future.cancel()
            if gone is not None:
                gone.cancel()

    def _submit(
        self, call: Call, alias: Alias, arm: Arm, asked: InferRequest, within_s: float
    ) -> Future[Any]:
        future = self._engine.submit(
            asked.inputs, arm.delta, tenant=alias.tenant, timeout_s=within_s
        )
        if arm.shadow is not None:
            self.shadows.mirror(call.id, alias, arm, asked.inputs, future)
        return future

    async def _body(self, call: Call, receive: Receive, limit: int) -> bytearray:
        return await read_body(
            receive,
            call.headers,
            limit=limit,
            within_s=self._settings.body_timeout_s,
            room=self._room,
        )

    def _refuse_if_draining(self) -> None:
        if self.draining:
            retry = b"%d" % max(1, round(self._settings.drain_retry_s))
            headers = [(b"retry-after", retry), (b"connection", b"close")]
            raise HttpError(503, "the server is shutting down", headers=headers)


def _timeout_s(asked: InferRequest, most_s: float) -> float:
    """What the request allows, in the protocol's microseconds, or the server."""
    said = asked.parameters.get("timeout")
    if said is None:
        return most_s
    if type(said) is not int or said < 1:
        raise InputError(f"the parameter timeout is in microseconds, 1 or more; got {said!r:.40}")
    return min(most_s, said / 1e6)

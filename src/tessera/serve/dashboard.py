"""The dashboard at /: pages rendered here, behind an admin's key; no page works without one.

Whoever signs in gets a cookie that is signed by this process and lasts an hour. The key itself is
asked for once, and kept neither in the cookie nor here; whether it is still in force is looked up
for each page.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, final
from urllib.parse import parse_qsl, quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tessera.errors import AccessError, BusyError, TesseraError, UnknownNameError
from tessera.serve import dashboard_words as words
from tessera.serve.app import App
from tessera.serve.dashboard_actions import Actions
from tessera.serve.dashboard_door import Door
from tessera.serve.dashboard_log import DULL, Chain, pretty, summary
from tessera.serve.dashboard_rollout import gate_named
from tessera.serve.dashboard_session import Session, Sessions
from tessera.serve.dashboard_traffic import Traffic
from tessera.serve.dashboard_views import Seen, Views, Watched
from tessera.serve.records import Key
from tessera.serve.registry import Registry
from tessera.serve.web import HttpError, describe, status_of

__all__ = ["Dashboard", "add_dashboard"]

_HERE = Path(__file__).parent
_COOKIE, _FORM_COOKIE = "tessera_session", "tessera_form"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_TENANT = "/tenants/{tenant}"
_ALIAS, _DELTA = _TENANT + "/aliases/{alias}", _TENANT + "/deltas/{delta}"
_GATE = _ALIAS + "/gates/{gate}"

_Form = Mapping[str, str]


def add_dashboard(
    app: App,
    registry: Registry,
    engine: Watched,
    *,
    session_s: float = 3600.0,
    clock: Callable[[], float] = time.time,
    ticks: Callable[[], float] = time.monotonic,
) -> Dashboard:
    """Add the pages to a server.

    Args:
        app: Gets them.
        registry: What they show and change.
        engine: Its queue, and if it is `Occupied` its slots.
        session_s: How long one is signed in.
        clock: Seconds since 1970.
        ticks: Seconds that only go forward.

    Returns:
        The dashboard, whose `sample` is to be called every second or so.
    """
    return Dashboard(app, registry, engine, session_s=session_s, clock=clock, ticks=ticks)


@final
class Dashboard:
    """The pages; `add_dashboard` makes it, with the same arguments."""

    def __init__(
        self,
        app: App,
        registry: Registry,
        engine: Watched,
        *,
        session_s: float,
        clock: Callable[[], float],
        ticks: Callable[[], float],
    ) -> None:
        self._registry, self._clock = registry, clock
        self._sessions, self._door = Sessions(session_s), Door(registry)
        self._traffic = Traffic(app.meters.registry, clock=ticks)
        chain = Chain(registry.audit, clock)
        self._views = Views(registry, engine, self._traffic, chain, clock)
        self._actions = Actions(registry, chain)
        self._files = {p.name: p.read_bytes() for p in sorted((_HERE / "static").iterdir())}
        self._templates = self._environment()
        self._add_routes(app)

    def sample(self) -> None:
        """Take a reading of the meters if it is time for one; cheap otherwise."""
        self._traffic.sample()

    def _environment(self) -> Environment:
        found = Environment(
            loader=FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        filters: dict[str, Callable[..., Any]] = {
            "duration": words.duration,
            "number": words.number,
            "size": words.size,
            "count": words.count,
            "percent": words.percent,
            "gain": words.gain,
            "sentence": words.sentence,
            "gate_named": gate_named,
            "pretty": pretty,
            "summary": summary,
        }
        found.filters.update(filters)
        versions = {n: hashlib.sha256(c).hexdigest()[:12] for n, c in self._files.items()}
        found.globals["dull"] = DULL
        found.globals["asset"] = lambda name: f"/static/{name}?v={versions[name]}"
        return found

    # -- routes -------------------------------------------------------------------------------

    def _add_routes(self, app: App) -> None:
        views, actions = self._views, self._actions
        # The values of a path come in its order, which is that of the arguments.
        pages: dict[str, Callable[[Request], Seen]] = {
            "/": lambda r: views.overview(r.query_params),
            _TENANT: lambda r: views.tenant(r.query_params, *r.path_params.values()),
            _TENANT + "/confirm": lambda r: views.confirm(r.query_params, *r.path_params.values()),
            _ALIAS: lambda r: views.alias(r.query_params, *r.path_params.values()),
            _GATE: lambda r: views.gate(r.query_params, *r.path_params.values()),
            _DELTA: lambda r: views.delta(*r.path_params.values()),
            "/events": lambda r: views.events(r.query_params, live="x-live" in r.headers),
        }
        acts: dict[str, Callable[[Request, _Form, Key], tuple[str, str]]] = {
            _TENANT: lambda r, form, by: actions.on_tenant(form, by, *r.path_params.values()),
            _ALIAS: lambda r, form, by: actions.on_alias(form, by, *r.path_params.values()),
            _DELTA: lambda r, form, by: actions.on_delta(form, by, *r.path_params.values()),
            "/events": lambda r, form, by: actions.on_events(form),
        }
        for path, page in pages.items():
            self._route(app, path, "GET", self._shown(page))
            if path in acts:
                self._route(app, path, "POST", self._acted(acts[path], page))
        self._route(app, "/sign-in", "GET", self._ask_key)
        self._route(app, "/sign-in", "POST", self._sign_in)
        self._route(app, "/sign-out", "POST", self._sign_out)
        self._route(app, _GATE + "/evidence", "GET", self._evidence)
        self._route(app, "/static/{name}", "GET", self._static)

    def _route(
        self, app: App, path: str, method: str, answer: Callable[[Request, _Form], Response]
    ) -> None:
        async def endpoint(request: Request) -> Response:
            request.scope["tessera.page"] = path  # for the log
            try:
                form = await _form_of(request) if method == "POST" else {}
                response = await run_in_threadpool(answer, request, form)
            except TesseraError as error:
                response = await run_in_threadpool(self._failed, request, error)
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        run: Callable[[Request], Awaitable[Response]] = endpoint
        app.management.router.routes.append(
            Route(path, run, methods=[method], include_in_schema=False)
        )

    def _shown(self, page: Callable[[Request], Seen]) -> Callable[[Request, _Form], Response]:
        def answer(request: Request, form: _Form) -> Response:
            session = self._session(request)
            if session is None:
                return self._away(request)
            return self._render(request, session, page(request))

        return answer

    def _acted(
        self,
        act: Callable[[Request, _Form, Key], tuple[str, str]],
        page: Callable[[Request], Seen],
    ) -> Callable[[Request, _Form], Response]:
        def answer(request: Request, form: _Form) -> Response:
            session = self._session(request)
            if session is None:
                return self._away(request)
            by = self._key(session)
            if by is None or not self._own_form(request, session.id, form):
                raise AccessError("this form is not of your session; go back, and load it again")
            try:
                where, said = act(request, form, by)
            except TesseraError as error:
                # The page as it is now, above it why nothing was done.
                seen = page(request)
                return self._render(
                    request, session, seen, status=status_of(error), error=str(error)
                )
            self._sessions.say(session, said)
            return RedirectResponse(where, 303)

        return answer

    # -- signing in and out -------------------------------------------------------------------

    def _session(self, request: Request) -> Session | None:
        """The session of a request, if its key is still in force."""
        found = self._sessions.find(request.cookies.get(_COOKIE, ""))
        return found if found is not None and self._key(found) is not None else None

    def _key(self, session: Session) -> Key | None:
        keys = self._registry.view().keys.values()
        return next((k for k in keys if k.id == session.key and k.is_admin), None)

    def _own_form(self, request: Request, id: str, form: _Form) -> bool:
        # Browsers say where a request comes from; those that do not are held to the token alone.
        site = request.headers.get("sec-fetch-site", "same-origin")
        return site in ("same-origin", "none") and self._sessions.check_form(
            id, form.get("token", "")
        )

    def _away(self, request: Request) -> Response:
        """To the sign-in page; a script, or a form, that comes too late is told so."""
        if "x-live" in request.headers:
            return Response(status_code=401)
        here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        query = "?" + urlencode({"next": here}) if here != "/" else ""
        return RedirectResponse(f"/sign-in{query}", 303)

    def _ask_key(self, request: Request, form: _Form) -> Response:
        if self._session(request) is not None:
            return RedirectResponse("/", 303)
        return self._sign_in_page(request, request.query_params.get("next", "/"))

    def _sign_in_page(
        self, request: Request, onward: str, *, status: int = 200, error: str = ""
    ) -> Response:
        own = request.cookies.get(_FORM_COOKIE, "")
        fresh = not 32 <= len(own) <= 64
        own = secrets.token_hex(16) if fresh else own
        page = self._templates.get_template("sign_in.html").render(
            token=self._sessions.form_token(f"sign-in {own}"), next=_onward(onward), error=error
        )
        response = Response(page, status, media_type="text/html")
        if fresh:
            self._set_cookie(request, response, _FORM_COOKIE, own, None)
        return response

    def _sign_in(self, request: Request, form: _Form) -> Response:
        own, onward = request.cookies.get(_FORM_COOKIE, ""), _onward(form.get("next", "/"))
        if not own or not self._own_form(request, f"sign-in {own}", form):
            words = "This page was too old, or cookies are switched off. Try again."
            return self._sign_in_page(request, onward, status=403, error=words)
        try:
            key = self._door.enter(form.get("key", "").strip(), request)
        except (AccessError, BusyError) as error:
            status, _, headers = describe(error, "")
            page = self._sign_in_page(request, onward, status=status, error=str(error))
            page.raw_headers += headers
            return page
        response = RedirectResponse(quote(onward, safe="/?&=%:;,.~-_+@!$'()*"), 303)
        token = self._sessions.begin(key.id)
        self._set_cookie(request, response, _COOKIE, token, int(self._sessions.last_s))
        return response

    def _sign_out(self, request: Request, form: _Form) -> Response:
        session = self._session(request)
        if session is not None:
            if not self._own_form(request, session.id, form):
                raise AccessError("this form is not of your session; go back, and load it again")
            self._sessions.end(session)
        response = RedirectResponse("/sign-in", 303)
        response.delete_cookie(_COOKIE, httponly=True, samesite="strict")
        return response

    def _set_cookie(
        self, request: Request, response: Response, name: str, value: str, last_s: int | None
    ) -> None:
        response.set_cookie(
            name,
            value,
            max_age=last_s,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )

    # -- answers ------------------------------------------------------------------------------

    def _render(
        self,
        request: Request,
        session: Session,
        seen: Seen,
        *,
        status: int = 200,
        error: str = "",
    ) -> Response:
        live = "x-live" in request.headers
        now_s = self._clock()
        page = self._templates.get_template(seen.template).render(
            **seen.values,
            state=seen.state,
            token=self._sessions.form_token(session.id),
            key=session.key,
            path=request.url.path,
            base=str(request.base_url).rstrip("/"),
            said="" if live else self._sessions.said(session),
            error=error,
            moment=lambda at_s: words.moment(at_s, now_s),
        )
        return Response(page, status, media_type="text/html")

    def _failed(self, request: Request, error: TesseraError) -> Response:
        status, session = status_of(error), self._session(request)
        if session is None:
            page = Response(f"{error}\n", status, media_type="text/plain")
        else:
            seen = Seen(template="problem.html", values={"status": status, "words": str(error)})
            page = self._render(request, session, seen, status=status)
        if isinstance(error, HttpError):
            page.raw_headers += list(error.headers)
        return page

    def _evidence(self, request: Request, form: _Form) -> Response:
        if self._session(request) is None:
            return self._away(request)
        content = self._views.evidence(*request.path_params.values())
        response = Response(content, media_type="application/json")
        name = f"gate-{request.path_params['gate']}.json"
        response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return response

    def _static(self, request: Request, form: _Form) -> Response:
        name = request.path_params["name"]
        content = self._files.get(name)
        if content is None:
            raise UnknownNameError("there is no such file")
        response = Response(content, media_type=_TYPES[Path(name).suffix])
        # Its address changes with its content.
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response


async def _form_of(request: Request) -> dict[str, str]:
    """The fields of a form, the last of each name.

    Raises:
        HttpError: 415, it is no plain form; 413 or 408 as for every body.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    if kind != "application/x-www-form-urlencoded":
        raise HttpError(415, "this takes a form of the dashboard's pages")
    try:
        text = body.decode("ascii")
        return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=20, errors="strict"))
    except ValueError as error:
        raise HttpError(400, "the form cannot be read") from error


def _onward(path: str) -> str:
    """An address on this server to go to after signing in; anything else is taken for "/".

    Example:
        >>> _onward("/tenants/acme"), _onward("//elsewhere.example"), _onward("javascript:1")
        ('/tenants/acme', '/', '/')
    """
    plain = path.isascii() and path.isprintable() and len(path) <= 2000 and "\\" not in path
    return path if plain and path.startswith("/") and not path.startswith("//") else "/"

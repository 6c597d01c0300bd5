"""The dashboard in a real browser: signing in, rolling back, live figures, both colour schemes."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tessera.arch import Delta
from tessera.serve.app import App, make_app
from tessera.serve.blobs import Blobs
from tessera.serve.dashboard import add_dashboard
from tessera.serve.listen import Server
from tessera.serve.registry import Registry

ADMIN = "an-admin-key-for-the-tests-only"
BASE = "0" * 64
INTENT = "/tenants/acme/aliases/intent"
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
SIZES = {"phone": (360, 740), "wide": (1600, 900)}


@dataclass(frozen=True)
class Engine:
    """Its queue is empty."""

    def waiting(self) -> int:
        return 0


@dataclass
class Site:
    """A server with the tenant acme, whose alias clf is at generation 2."""

    url: str
    registry: Registry
    app: App
    deltas: list[str]
    complaints: list[str] = field(default_factory=list)

    def open(self, browser: Browser, **options) -> Page:
        """A page that is signed in."""
        page = browser.new_context(base_url=self.url, **options).new_page()
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda r: r.url.startswith(self.url) or self.complaints.append(r.url))
        page.goto("/")
        page.get_by_label("Admin key").fill(ADMIN)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="Overview")).to_be_visible()
        return page

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        # As root, in a container, its sandbox cannot be had; it opens our own pages only.
        args = ["--no-sandbox"] if os.getuid() == 0 else []
        found = playwright.chromium.launch(executable_path=program, args=args)
        yield found
        found.close()


@contextlib.contextmanager
def serving(app: App) -> Iterator[str]:
    server = Server(app, port=0, drain_s=2)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.port}"
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    registry = Registry(f"sqlite:///{tmp_path}/r.db", Blobs(tmp_path / "blobs"), base_hash=BASE)
    registry.first_admin_key(ADMIN)
    by = registry.authenticate(ADMIN)
    registry.create_tenant("acme", by=by)
    registry.create_key("acme", {"infer"}, by=by)
    deltas = []
    for k in (1.0, 2.0):
        delta = Delta(kind="prompt", tensors={"prompt": torch.full((1, 4), k)}, base_hash=BASE)
        deltas.append(registry.put_delta("acme", delta, by=by).hash)
        registry.set_alias("acme", "clf", deltas[-1], generation=len(deltas) - 1, by=by)
    app = make_app(registry, Engine())
    add_dashboard(app, registry, Engine())
    with serving(app) as url:
        yield Site(url, registry, app, deltas)
    registry.close()


def test_sign_in_see_a_tenant_roll_back_and_see_the_new_generation(site, browser):
    page = site.open(browser)
    page.get_by_role("link", name="acme", exact=True).click()
    expect(page.get_by_role("heading", name="acme")).to_be_visible()
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="clf", exact=True))
    expect(row.first).to_contain_text(site.deltas[1][:12])
    page.get_by_role("link", name="Roll back clf").click()
    expect(page.get_by_role("heading", name="Roll back clf?")).to_be_visible()
    assert site.registry.alias("acme", "clf").generation == 2
    page.get_by_label("Reason").fill("worse")
    page.get_by_role("button", name="Roll back, as generation 3").click()
    expect(page.locator("#generation")).to_have_text("3")
    expect(page.get_by_role("status")).to_contain_text("Rolled back. clf is at generation 3")
    assert page.url.endswith("/tenants/acme/aliases/clf")
    assert site.registry.alias("acme", "clf").delta == site.deltas[0]
    # Promote the other one again, with a reason that would be markup elsewhere.
    page.locator("#promote").get_by_role("button", name="Promote…").click()
    page.get_by_label("Reason").fill(HOSTILE)
    page.get_by_role("button", name="Promote to generation 4").click()
    expect(page.locator("#generation")).to_have_text("4")
    expect(page.get_by_role("table")).to_contain_text(HOSTILE)
    page.get_by_role("link", name="Events", exact=True).click()
    page.get_by_role("button", name="Check the chain").click()
    expect(page.locator(".chain")).to_contain_text("The chain is whole")
    page.locator(".events summary").first.click()
    expect(page.locator(".events pre").first).to_contain_text('"kind": "alias.set"')
    assert page.title() == "Events · Tessera"
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Admin key")).to_be_visible()
    page.goto("/tenants/acme")
    expect(page.get_by_label("Admin key")).to_be_visible()
    assert not site.complaints


def test_revoking_takes_two_clicks(site, browser):
    page = site.open(browser)
    page.goto("/tenants/acme")
    (key,) = site.registry.keys("acme")
    button = page.get_by_role("button", name=f"Revoke {key.id}")
    expect(button).to_be_hidden()
    page.locator("summary", has_text="Revoke…").click()
    button.click()
    expect(page.get_by_role("status")).to_contain_text(f"The key {key.id} is revoked.")
    assert site.registry.keys("acme") == []
    assert not site.complaints


def test_figures_move_and_forms_do_not(site, browser):
    page = site.open(browser)
    page.clock.install()  # so that the seconds between two looks pass at once
    page.goto("/")
    expect(page.locator("#tenants")).not_to_contain_text("globex")
    site.registry.create_tenant("globex", by=site.registry.authenticate(ADMIN))
    page.evaluate("document.getElementById('tiles').mine = true")
    page.evaluate("document.getElementById('tenants').mine = true")
    page.clock.run_for(5000)
    expect(page.locator("#tenants")).to_contain_text("globex")
    # What did not change was not touched.
    assert page.evaluate("document.getElementById('tiles').mine")
    assert not page.evaluate("document.getElementById('tenants').mine")
    page.goto("/tenants/acme/confirm?do=rollback&alias=clf")
    page.get_by_label("Reason").fill("half written")
    page.clock.run_for(5000)
    expect(page.locator("#changed")).to_be_hidden()
    site.registry.rollback("acme", "clf", by=site.registry.authenticate(ADMIN))
    page.clock.run_for(5000)
    expect(page.locator("#changed")).to_be_visible()
    expect(page.get_by_label("Reason")).to_have_value("half written")
    page.get_by_role("button", name="Roll back, as generation 3").click()
    expect(page.get_by_role("alert")).to_contain_text("Nothing was changed.")
    expect(page.locator("#generation")).to_have_text("3")
    assert site.registry.alias("acme", "clf").generation == 3
    # The page of an answer that was refused; the browser says so itself.
    assert [c for c in site.complaints if "409" not in c] == []


@pytest.fixture(scope="module")
def past(tmp_path_factory) -> Iterator[tuple[ModuleType, Any]]:
    here = str(Path(__file__).parent)
    sys.path.insert(0, here)
    module = importlib.import_module("_state")
    sys.path.remove(here)
    yield module, module.build(tmp_path_factory.mktemp("past"))
    sys.modules.pop("_state", None)


@pytest.fixture
def house(past, tmp_path: Path) -> Iterator[Site]:
    """A server with a past: see _state.py."""
    module, written = past
    state = module.opened(written, tmp_path, busy=True)
    with serving(state.app) as url:
        yield Site(url, state.registry, state.app, written.deltas["acme"])
    state.close()


def test_what_is_looked_at_stays_where_it_is_when_figures_move(house, browser):
    page = house.open(browser, viewport={"width": 1440, "height": 900})
    page.clock.install()
    page.goto(INTENT)
    page.locator("#accuracy summary").click()
    page.locator("#accuracy .scroll").evaluate("box => { box.scrollTop = 60; }")
    link = page.locator("#gates").get_by_role("link", name="Promote…")
    link.focus()
    page.evaluate("scrollTo(0, 400)")
    places = "[...document.querySelectorAll('section')].map(s => s.getBoundingClientRect().top)"
    before = page.evaluate(places)
    house.registry.audit.append("gate.noted", "acme", {"alias": "intent", "note": "new"})
    house.registry.audit.append("gate.noted", "acme", {"alias": "intent", "note": "newer"})
    page.evaluate("document.getElementById('gates').mine = true")
    page.evaluate("document.querySelector('#gates time').textContent = 'long ago'")
    page.clock.run_for(5000)
    expect(page.locator("#happened")).to_contain_text("newer")
    expect(page.locator("#gates")).not_to_contain_text("long ago")
    assert not page.evaluate("document.getElementById('gates').mine")
    expect(link).to_be_focused()
    assert page.locator("#accuracy details").evaluate("fold => fold.open")
    assert page.locator("#accuracy .scroll").evaluate("box => box.scrollTop") == 60
    assert page.evaluate(places) == before
    assert not house.complaints


def test_a_gated_candidate_is_promoted_by_keyboard_alone(house, browser):
    page = house.open(browser)
    page.goto(INTENT)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#gates .do') !== null"):
            break
    # What has the focus can be seen to have it.
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Promote to intent?")).to_be_visible()
    page.get_by_label("Reason").press("End")
    page.keyboard.type(", and the table looks right")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#generation")).to_have_text("5")
    assert house.registry.alias("acme", "intent").reason.endswith(", and the table looks right")
    assert not house.complaints


@pytest.mark.parametrize(("size", "scheme"), [("phone", "dark"), ("wide", "light")])
def test_pages_fit_and_can_be_read(house, browser, past, size, scheme, tmp_path):
    width, height = SIZES[size]
    page = house.open(browser, viewport={"width": width, "height": height}, color_scheme=scheme)
    gates = {name: f"{INTENT}/gates/{gate.id}" for name, gate in past[1].gates.items()}
    paths = ["/", "/tenants/acme", "/tenants/initech", INTENT, gates["refused"], "/events"]
    paths += ["/tenants/acme/aliases/toxicity", "/tenants/globex/aliases/triage"]
    paths += ["/tenants/acme/confirm?do=rollback&alias=intent"]
    paths.append(f"/tenants/acme/deltas/{house.deltas[0]}")
    for number, path in enumerate(paths):
        page.goto(path)
        for fold in page.locator("details.data").all():
            fold.evaluate("fold => { fold.open = true; }")
        page.screenshot(path=tmp_path / f"{size}-{scheme}-{number}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        assert page.evaluate(FAINT) == [], path
    assert not house.complaints


# Elements with words of their own whose contrast with what is behind them is below WCAG's 4.5.
FAINT = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    throw new Error("the page has no background");
  };
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("svg")) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push(`${element.tagName} ${element.textContent.trim()}: ${ratio}`);
  }
  return faint;
}"""

# SPDX-License-Identifier: Apache-2.0
"""The router's web page in headless Chromium, and what it asks of the router."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvcached_core import Ledger
from tests.support.launched import launch
from tests.support.ledger_member import MIB, member
from tests.unit.test_router_process import LONG_S, engine, router

SCREENSHOT = os.environ.get("KVCACHED_SCREENSHOT", "")
"""Where to save one, for the docs, with names that make sense there."""
HOSTILE = "phi-4" if SCREENSHOT else "<img src=x onerror=document.title=1>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


@dataclass
class Site:
    """A router with a model awake, one asleep, and two members of a ledger."""

    url: str
    ledger: Path

    def members(self) -> dict[str, Any]:
        return {info.name: info for info in Ledger(self.ledger).members()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("page")
    path = folder / "host-0.ledger"
    sleeper = {**launch(folder), "gpu": 0}
    with (
        member(path, name="llama-8b", live=300 * MIB, parked=100 * MIB, cached=200 * MIB),
        member(path, name=HOSTILE, live=64 * MIB, guarantee=128 * MIB),
        engine(folder, 0, 3) as (upstream, _),
    ):
        settings = {
            "ledger_dir": str(folder),
            "gpus": {"0": {"mps": False, "max_running": 64}},
            "models": [
                {"name": "llama-8b", "replicas": [{"url": upstream, "gpu": 0}]},
                {"name": "org/qwen-8b", "sleep": {"kind": "cold", "at_start": True},
                 "replicas": [sleeper]},
            ],
        }  # fmt: skip
        with router(folder, settings) as (url, _):
            yield Site(url, path)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync.sync_playwright() as playwright:
        # Its sandbox does not work for root, as whom containers run tests.
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield found
        found.close()


@pytest.fixture
def page(site: Site, browser: Any) -> Iterator[Any]:
    found = browser.new_page(viewport={"width": 1240, "height": 700})
    found.set_default_timeout(LONG_S * 1000)
    problems: list[str] = []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda said: said.type == "error" and problems.append(said.text))
    found.goto(site.url)
    found.wait_for_selector("text=llama-8b")
    yield found
    found.close()
    # Chromium says so itself when something is refused.
    assert [said for said in problems if "409 (Conflict)" not in said] == []


def test_the_page_shows_models_and_memory(page: Any) -> None:
    row = page.locator("#models tbody tr", has_text="llama-8b")
    assert row.locator(".state").inner_text() == "active"
    row = page.locator("#models tbody tr", has_text="org/qwen-8b")
    assert row.locator(".state").inner_text() == "asleep"
    assert "stopped" in row.inner_text()
    assert "664 MiB leased, 360 MiB free of 1.0 GiB" in page.locator("h3").inner_text()
    cells = page.locator("#memory tbody tr", has_text="llama-8b").locator("td")
    assert cells.all_inner_texts()[1:8] == [
        "600 MiB", "300 MiB", "200 MiB", "0 B", "none", "100", "0"]  # fmt: skip
    # Names are text, whatever is in them.
    assert HOSTILE in page.locator("#memory").inner_text()
    assert page.locator("#memory img").count() == 0
    assert page.title() == "kvcached"
    assert page.locator("#queues tbody td").all_inner_texts()[:4] == ["gpu 0", "slack", "0", "64"]
    if SCREENSHOT:
        page.screenshot(path=SCREENSHOT, full_page=True)


def test_buttons_change_memory(page: Any, site: Site) -> None:
    row = page.locator("#memory tbody tr", has_text="llama-8b")
    row.locator("select").select_option("limit")
    row.locator("input").fill("400MiB")
    row.get_by_role("button", name="Set").click()
    page.wait_for_selector("#notice:has-text('limit 400.0 MiB (was none), in effect')")
    assert site.members()["llama-8b"].limit == 400 * MIB
    assert site.members()["llama-8b"].leased <= 400 * MIB
    page.locator("#memory", has_text="400 MiB").wait_for()

    row.get_by_role("button", name="Trim cache").click()
    page.wait_for_selector("#notice:has-text('gave back')")
    assert site.members()["llama-8b"].cached == 0

    row.locator("select").select_option("guarantee")
    row.locator("input").fill("5TiB")
    row.get_by_role("button", name="Set").click()
    page.wait_for_selector("#notice.bad:has-text('guarantee')")
    assert site.members()["llama-8b"].guarantee == 0


def test_buttons_wake_and_sleep(page: Any, site: Site) -> None:
    row = page.locator("#models tbody tr", has_text="org/qwen-8b")
    row.get_by_role("button", name="Wake").click()
    row.locator(".state.active").wait_for()
    assert "ready, process" in row.inner_text()
    row.get_by_role("button", name="Sleep").click()
    row.locator(".state.asleep").wait_for()
    states = httpx.get(f"{site.url}/sleep/status", trust_env=False).json()["states"]
    assert states["org/qwen-8b"] == "asleep"


def test_a_key_is_asked_for(site: Site, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    models = [{"name": "m", "replicas": [{"url": "http://127.0.0.1:9"}]}]
    settings = {"models": models, "keys": [{"file": "keys"}], "ledger_dir": str(tmp_path)}
    with router(tmp_path, settings) as (url, _):
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#login:not([hidden])")
        assert page.locator("#models tbody tr").count() == 0
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Use").click()
        page.wait_for_selector("#models tbody tr:has-text('failed')")
        page.close()


@pytest.mark.parametrize(
    ("order", "status", "said"),
    [
        ({"do": "limit", "value": "1GiB", "member": "nobody"}, 409, "nobody"),
        ({"do": "limit", "value": "1GiB", "ledger": "host-7"}, 409, "no ledger 'host-7'"),
        ({"do": "limit", "value": "much"}, 400, "value: "),
        ({"do": "weight", "value": "1.5"}, 400, "value: "),
        ({"do": "weight", "value": "0"}, 409, "weight"),
        ({"do": "explode"}, 400, "do: "),
        ({"do": "trim", "else": 1}, 400, "else: "),
    ],
)
def test_orders_that_are_refused(site: Site, order: Any, status: int, said: str) -> None:
    whole = {"ledger": "host-0", "member": "llama-8b", **order}
    answer = httpx.post(f"{site.url}/action/memory", json=whole, trust_env=False)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_other_pages_press_no_buttons(site: Site) -> None:
    url = f"{site.url}/action/sleep/nobody"
    port = site.url.rpartition(":")[2]
    for origin, host, status in (
        ("http://evil.example", f"127.0.0.1:{port}", 403),
        ("null", f"127.0.0.1:{port}", 403),
        ("http://[", "[", 403),
        # A name that its owner made lead to this machine.
        ("http://evil.example:81", "evil.example:81", 403),
        (site.url, f"127.0.0.1:{port}", 404),
        (f"http://localhost:{port}", f"localhost:{port}", 404),
        (f"http://[::1]:{port}", f"[::1]:{port}", 404),
    ):
        headers = {"origin": origin, "host": host}
        assert httpx.post(url, headers=headers, trust_env=False).status_code == status, origin


def test_the_page_has_nothing_from_elsewhere(site: Site) -> None:
    for path in ("/", "/page.js", "/page.css"):
        answer = httpx.get(site.url + path, trust_env=False)
        assert "http://" not in answer.text and "https://" not in answer.text
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")

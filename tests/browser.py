"""Chromium for the tests of both web pages: what a page may not do is an error of its test.

A conftest.py imports the fixtures: `from tests.browser import browser, visit`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

WIDTHS = {390: 844, 1440: 900}  # of screenshots, and their heights, in CSS pixels
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, Scheme] = ("light", "dark")
Visit = Callable[..., Page]

_ARGUMENTS = (
    "--no-sandbox",  # which root has none of
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # what it asks for, it never gets
)
expect.set_options(timeout=60_000)  # in milliseconds, as all of Playwright's
_SERIOUS = ("serious", "critical")


def chromium() -> str:
    """Where it is. Fails the test if it is nowhere."""
    named = os.environ.get("SWARM_CHROMIUM")
    for name in [named] if named else ["chromium", "chromium-browser", "google-chrome"]:
        if found := shutil.which(name):
            return found
    pytest.fail(
        f"no browser at {named or 'chromium'}: the pages are tested in Chromium; install it "
        "(`apt install chromium`, `brew install --cask chromium`) or set SWARM_CHROMIUM to it"
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One headless Chromium for a file of tests."""
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """`visit(url, width=1440, scheme="light")` opens a page with storage of its own.

    At the end of the test: no page may have asked another host for anything, said an error on the
    console, or raised one. (`expected`: what the console may say, as pieces of its messages.)
    """
    wrong: list[str] = []
    contexts: list[Any] = []

    def open_page(
        url: str, width: int = 1440, scheme: Scheme = "light", expected: tuple[str, ...] = ()
    ) -> Page:
        host = urlsplit(url).netloc
        context = browser.new_context(
            viewport={"width": width, "height": WIDTHS.get(width, 900)},
            color_scheme=scheme,
            reduced_motion="reduce",  # so that pictures are the same each time
            service_workers="block",
        )
        contexts.append(context)

        def ask(request: Request) -> None:
            parts = urlsplit(request.url)
            if parts.netloc != host and parts.scheme not in ("data", "blob", "about"):
                wrong.append(f"asks {request.url}")

        def said(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and not any(
                e in message.text for e in expected
            ):
                wrong.append(f"console: {message.text} ({message.location})")

        context.on("request", ask)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", said)
        page.on("pageerror", lambda error: wrong.append(f"raises {error}"))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong, wrong


def violations(page: Page) -> list[str]:
    """What axe-core finds on the page that is serious or worse, one line each."""
    found: list[Any] = Axe().run(page).response["violations"]
    return [
        f"{item['id']}: {node['target']} {node['failureSummary']}"
        for item in found
        if item["impact"] in _SERIOUS
        for node in item["nodes"]
    ]


def screenshots(tmp_path: Path) -> Path:
    """Where pictures of pages go: to $SWARM_SCREENSHOTS, which CI keeps, or they are forgotten."""
    folder = Path(os.environ.get("SWARM_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder

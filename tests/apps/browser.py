"""A headless Chromium with the page open, for tests and for the pictures of the documentation."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
LOOKED_FOR = f"a browser: one of {', '.join(BROWSERS)} on the PATH, or `playwright install chromium`"


@dataclass
class OpenPage:
    page: Page
    requests: list[str] = field(default_factory=list)
    # addresses that it asked for
    complaints: list[str] = field(default_factory=list)
    # errors and warnings of its console, and exceptions of its scripts


def find_browser() -> str | None:
    """Path of the first browser found."""
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return next(filter(None, map(shutil.which, BROWSERS)), own if Path(own).is_file() else None)


def wait_until(page: Page, expression: str) -> None:
    """Until an expression in JavaScript is true. Playwright's own way evaluates text in the page, whose policy forbids that."""
    for _ in range(500):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(10)
    raise AssertionError(f"never true: {expression}")


@contextmanager
def browsing(address: str, **options: object) -> Iterator[OpenPage]:
    """The page at an address. Options: of Playwright's `new_page` (viewport, color_scheme, has_touch, ...)."""
    path = find_browser()
    assert path is not None, LOOKED_FOR
    with sync_playwright() as playwright:
        # (the sandbox needs rights that containers do not give)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            page = browser.new_page(**options)
            opened = OpenPage(page)
            page.on("request", lambda request: opened.requests.append(request.url))
            page.on("pageerror", lambda error: opened.complaints.append(str(error)))
            page.on(
                "console",
                lambda message: opened.complaints.append(message.text) if message.type in ("error", "warning") else None,
            )
            page.goto(address)
            yield opened
        finally:
            browser.close()

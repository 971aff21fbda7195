"""`python -m tests.apps.page_screenshots`: the pictures of the page in docs/, light and wide, dark and on a phone."""

import io
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

from tests.apps.browser import browsing, wait_until
from tests.apps.server_process import DEMO, QUESTION, ROOT, serving

PICTURES = {
    "page.png": {"viewport": {"width": 1080, "height": 700}, "color_scheme": "light"},
    "page_phone.png": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}
MAX_BYTES = 300 << 10


def ask_about_the_demo(page: Page) -> None:
    """Choose the bundled clip, ask, and wait for the answer, its evidence and the evidence's pictures."""
    page.set_input_files("#file", DEMO)
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    page.wait_for_selector('#strip[data-state="drawn"]')
    page.wait_for_selector("#stop[disabled]")


def take(folder: Path) -> list[Path]:
    """Write the pictures; returns their paths."""
    with serving() as server:
        for name, options in PICTURES.items():
            with browsing(server.address, reduced_motion="reduce", **options) as opened:
                ask_about_the_demo(opened.page)
                opened.page.locator("button.time").first.click()
                opened.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
                wait_until(opened.page, "!document.getElementById('player').seeking")
                # (the player's own wheel turns a little longer)
                opened.page.wait_for_timeout(500)
                picture = Image.open(io.BytesIO(opened.page.screenshot(full_page=True)))
                picture.convert("RGB").save(folder / name, optimize=True)
    return [folder / name for name in PICTURES]


if __name__ == "__main__":
    for path in take(ROOT / "docs"):
        num_bytes = path.stat().st_size
        print(f"{path.relative_to(ROOT)}: {num_bytes:,} bytes")
        assert num_bytes < MAX_BYTES, f"{path} is too large for a repository"

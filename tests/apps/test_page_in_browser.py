"""The page in a real headless browser, before a real server: what a person sees, clicks and types."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import Page, TimeoutError

from tests.apps.browser import LOOKED_FOR, browsing, find_browser, wait_until
from tests.apps.page_screenshots import MAX_BYTES, PICTURES, ask_about_the_demo
from tests.apps.server_process import ANSWER, DEMO, QUESTION, ROOT, ServerProcess, serving

pytestmark = pytest.mark.skipif(find_browser() is None, reason=f"needs {LOOKED_FOR}")
PHONE = {"width": 360, "height": 740}
KEY = "sk-page"

CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour, under) => {
    canvas.fillStyle = under;
    canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (parts) => {
    const [r, g, b] = parts.map((part) => part / 255).map((p) => (p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const colour = element ? getComputedStyle(element).backgroundColor : "white";
    return !element || !colour.endsWith(", 0)") ? colour : ground(element.parentElement);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const is_told = walker.currentNode.textContent.trim() && element.checkVisibility() && !element.closest(":disabled");
    if (!is_told) continue;
    const under = ground(element);
    const [a, b] = [light(rgb(getComputedStyle(element).color, under)), light(rgb(under, "white"))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([walker.currentNode.textContent.trim().slice(0, 40), ratio]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving() as process:
        yield process


def current_seconds(page: Page) -> float:
    wait_until(page, "!document.getElementById('player').seeking")
    return page.evaluate("document.getElementById('player').currentTime")


def moments(page: Page) -> list[float]:
    """Seconds of every moment, as the slider tells them."""
    page.focus("#track")
    page.keyboard.press("Home")
    found = []
    for _ in range(int(page.get_attribute("#track", "aria-valuemax"))):
        found.append(float(page.get_attribute("#track", "aria-valuetext").split(" s, ")[0]))
        page.keyboard.press("ArrowRight")
    return found


def is_in_width(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_question_its_answer_and_its_evidence(server):
    with browsing(server.address, viewport={"width": 1180, "height": 900}) as opened:
        page = opened.page
        page.evaluate(
            "window.seen = []; new MutationObserver(() => seen.push(document.getElementById('answer').textContent))"
            ".observe(document.getElementById('answer'), { childList: true, subtree: true })"
        )
        ask_about_the_demo(page)
        assert page.inner_text("#answer") == ANSWER and "29 frames looked at" in page.inner_text("#status")
        seen = [text for text in page.evaluate("seen") if text]
        assert len(set(seen)) >= 5 and all(ANSWER.startswith(text) for text in seen), "the answer did not come in pieces"
        page.locator("button.time", has_text="8.3").click()
        assert current_seconds(page) == pytest.approx(8.3, abs=0.02)

        assert page.locator("rect.attention").count() == page.locator("rect.picked").count() == 29
        assert page.locator("rect.span").count() == 1 and "Sparse attention picked" in page.inner_text("#evidence-note")
        assert page.locator("#strip canvas").count() == 12 and 1 <= page.locator("#peaks button").count() <= 4
        colours = "[...document.querySelectorAll('#evidence canvas')].map((canvas) => new Set(canvas.getContext('2d')"
        drawn = page.evaluate(f"{colours}.getImageData(0, 0, canvas.width, canvas.height).data).size)")
        assert min(drawn) > 50, "a thumbnail is empty"
        assert all(request.startswith((f"{server.address}/", "blob:", "data:")) for request in opened.requests)
        assert any(request.startswith("blob:") for request in opened.requests) and not opened.complaints


def test_thumbnails_show_their_moments(server):
    with av.open(str(DEMO)) as container:
        frames = [(frame.time, frame.to_image()) for frame in container.decode(video=0)]
    with browsing(server.address) as opened:
        ask_about_the_demo(opened.page)
        script = "[...document.querySelectorAll('#evidence canvas')].map((canvas) => canvas.toDataURL())"
        pictures = [PIL.Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in opened.page.evaluate(script)]
        peaks = [float(text.removesuffix(" s")) for text in opened.page.locator("#peaks span:first-of-type").all_inner_texts()]
    middles = [(place + 0.5) / 12 * 14.7 for place in range(12)]
    differences = []
    for picture, seconds in zip(pictures, [*middles, *peaks], strict=True):
        shown = [image for time, image in frames if time <= seconds + 0.001][-1]
        first, second = (
            np.asarray(image.convert("RGB").resize((12, 12), PIL.Image.Resampling.BOX), float) for image in (picture, shown)
        )
        differences.append(np.abs(first - second).max())
    assert max(differences) < 30, differences


def test_arrow_keys_move_between_moments_and_enter_jumps(server):
    with browsing(server.address) as opened:
        page = opened.page
        ask_about_the_demo(page)
        times = moments(page)
        assert len(times) == 29 and times == sorted(times) and times[0] == 0
        page.keyboard.press("Home")
        before = current_seconds(page)
        for _ in range(12):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowLeft")
        assert current_seconds(page) == before, "an arrow key alone must not move the player"
        assert page.get_attribute("#track", "aria-valuenow") == "12" and page.get_attribute("#track", "role") == "slider"
        assert re.fullmatch(r"5\.7 s, [\d.]+% of attention, picked \d+%", page.get_attribute("#track", "aria-valuetext"))
        page.keyboard.press("Enter")
        assert current_seconds(page) == pytest.approx(times[11], abs=0.06)
        page.keyboard.press("End")
        page.keyboard.press(" ")
        assert current_seconds(page) == pytest.approx(times[-1], abs=0.06)
        assert page.evaluate("getComputedStyle(document.getElementById('track')).outlineStyle") == "solid"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('#peaks') !== null")
        told = page.evaluate("document.activeElement.querySelector('span').textContent")
        page.keyboard.press("Enter")
        assert current_seconds(page) == pytest.approx(float(told.removesuffix(" s")), abs=0.06)


def test_a_click_on_the_timeline_jumps_there(server):
    with browsing(server.address) as opened:
        page = opened.page
        ask_about_the_demo(page)
        box = page.locator("#track").bounding_box()
        page.locator("#track").click(position={"x": box["width"] * 0.5, "y": 20})
        assert current_seconds(page) == pytest.approx(14.7 / 2, abs=0.4)
        playhead = page.evaluate("parseFloat(document.getElementById('playhead').style.left)")
        assert playhead == pytest.approx(50, abs=3)
        assert page.inner_text("#moment").startswith("7.3 s")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_in_light_and_dark(server, scheme):
    options = {"viewport": PHONE, "color_scheme": scheme, "has_touch": True, "is_mobile": True}
    with browsing(server.address, **options) as opened:
        page = opened.page
        assert is_in_width(page)
        page.locator("summary", has_text="Settings").tap()
        assert is_in_width(page)
        ask_about_the_demo(page)
        assert is_in_width(page)
        place = "document.getElementById('answer').getBoundingClientRect()"
        assert page.evaluate(f"{place}.top >= 0 && {place}.bottom <= innerHeight"), "the evidence pushed the answer away"
        contrasts = dict(page.evaluate(CONTRASTS))
        assert {"OpenKeye", "Evidence", "Strongest moments", "attention", "8.3"} <= set(contrasts)
        assert min(contrasts.values()) >= 4.5, sorted(contrasts.items(), key=lambda item: item[1])[:5]
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground))) < 60) == (scheme == "dark")
        sizes = page.evaluate("[...document.querySelectorAll('button:not([hidden]), .button')].map((b) => b.offsetHeight)")
        assert min(size for size in sizes if size) >= 32, "a button is too small for a finger"
        assert not opened.complaints


def choose_file_by_key(page: Page) -> None:
    """Enter opens the dialog. Playwright's catch of it may come too late on a busy machine: then it is pressed again."""
    for attempt in range(3):
        try:
            with page.expect_file_chooser(timeout=10_000) as chooser:
                page.keyboard.press("Enter")
            chooser.value.set_files(DEMO)
            return
        except TimeoutError:
            if attempt == 2:
                raise


def test_a_video_is_chosen_and_asked_about_without_a_mouse(server):
    with browsing(server.address) as opened:
        page = opened.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "file"
        assert page.evaluate("getComputedStyle(document.querySelector('#file + label')).outlineStyle") == "solid"
        choose_file_by_key(page)
        page.wait_for_selector("#player:not([hidden])")
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "question":
                break
        page.keyboard.type(QUESTION)
        page.keyboard.press("Enter")
        page.wait_for_selector("#evidence:not([hidden])")
        assert page.inner_text("#answer") == ANSWER and not opened.complaints


def test_a_video_is_dropped_and_the_sample_is_at_hand(server):
    drop = """async () => {
      const clip = await (await fetch("/web/demo.mp4")).blob();
      const data = new DataTransfer();
      data.items.add(new File([clip], "dropped.mp4", { type: "video/mp4" }));
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    with browsing(server.address) as opened:
        page = opened.page
        page.evaluate(drop)
        page.wait_for_selector("#player:not([hidden])")
        assert page.inner_text("#file-name") == "dropped.mp4"
    with browsing(server.address) as opened:
        page = opened.page
        page.click("#sample")
        page.wait_for_selector("#player:not([hidden])")
        page.click("#ask")
        page.wait_for_selector('#strip[data-state="drawn"]')
        assert page.inner_text("#answer") == ANSWER
        page.evaluate(drop)
        page.wait_for_selector("#evidence", state="hidden")


def test_where_everything_was_attended_to_the_page_says_so(server):
    with browsing(server.address) as opened:
        page = opened.page
        page.locator("summary", has_text="Settings").click()
        page.fill("#fps", "0.4")
        ask_about_the_demo(page)
        assert page.locator("rect.attention").count() < 8 and page.locator("rect.picked").count() == 0
        assert "every part of it was attended to" in page.inner_text("#evidence-note")
        assert page.locator("#picked-key").is_hidden() and "picked" not in page.inner_text("#moment")


def test_what_is_no_video_gets_a_reason_and_no_evidence(server):
    with browsing(server.address) as opened:
        page = opened.page
        page.set_input_files("#file", ROOT / "README.md")
        page.fill("#question", QUESTION)
        page.click("#ask")
        page.wait_for_selector("#status.wrong")
        assert "not a readable video" in page.inner_text("#status") and page.locator("#evidence").is_hidden()


def test_nothing_moves_for_those_who_ask_for_it(server):
    for wish, expected in (("reduce", "none"), ("no-preference", "grow")):
        with browsing(server.address, reduced_motion=wish) as opened:
            ask_about_the_demo(opened.page)
            names = opened.page.evaluate("[...document.querySelectorAll('.bar')].map((b) => getComputedStyle(b).animationName)")
            assert set(names) == {expected}


def test_a_server_with_keys_asks_for_one(tmp_path: Path):
    (tmp_path / "keys.txt").write_text(f"{KEY}\n")
    with serving("--api-key-file", tmp_path / "keys.txt") as server, browsing(server.address) as opened:
        page = opened.page
        page.wait_for_selector("#status.wrong")
        page.fill("#key", KEY)
        page.press("#key", "Tab")
        wait_until(page, "document.getElementById('model').textContent.includes('openkeye-tiny')")
        ask_about_the_demo(page)
        assert page.inner_text("#answer") == ANSWER


def test_times_and_the_strongest_moments(server):
    with browsing(server.address) as opened:
        script = """async () => {
          const { clock, strongest, momentAt } = await import("/web/evidence.js");
          const weights = [1, 9, 8, 1, 1, 1, 1, 1, 1, 1, 1, 6, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1];
          const all = weights.map((weight, n) => ({ weight, seconds: n, start_seconds: n - 0.5, end_seconds: n + 0.5 }));
          const even = all.map((moment) => ({ ...moment, weight: 1 }));
          const clocks = [0, 5.68, 59.94, 65, 3605].map(clock);
          return [clocks, strongest(all, 4), strongest(even, 4), momentAt(all, 2.6), momentAt(all, 99)];
        }"""
        clocks, peaks, even, third, last = opened.page.evaluate(script)
        assert clocks == ["0.0 s", "5.7 s", "59.9 s", "1:05", "1:00:05"]
        assert peaks == [1, 11] and even == [0] and third == 3 and last == 23


def test_the_pictures_of_the_documentation_are_there_and_small():
    for name in PICTURES:
        assert 0 < (ROOT / "docs" / name).stat().st_size < MAX_BYTES
    assert all(name in (ROOT / "docs" / "serving.md").read_text() for name in PICTURES)

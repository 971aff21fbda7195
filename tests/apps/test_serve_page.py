"""The page at /: what it is made of, and how it finds times in words (run by Node where there is one)."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WEB = ROOT / "openkeye" / "apps" / "http_api" / "web"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("From 5.7 to 8.3 seconds.", [5.7, 8.3]),
        ("From 5.7", []),
        ("Between 3 and 4.5 s, then 10 s - 12 s.", [3, 4.5, 10, 12]),
        ("At 1:05 and 1:00:05, also at 7.", [65, 3605, 7]),
        ("It is shown 2.5 seconds long.", [2.5]),
        ("3 circles and 2 squares, 4 to 5 of them.", []),
        ("Dog.", []),
    ],
)
def test_times_in_words_become_pieces(text, seconds):
    module, words = json.dumps((WEB / "times.js").as_uri()), json.dumps(text)
    script = f"import {{ splitTimes }} from {module}; console.log(JSON.stringify(splitTimes({words})));"
    run = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True)
    pieces = json.loads(run.stdout)
    assert "".join(piece["text"] for piece in pieces) == text
    assert [piece["seconds"] for piece in pieces if piece["seconds"] is not None] == seconds


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("name", sorted(path.name for path in WEB.glob("*.js")))
def test_scripts_are_javascript(name, tmp_path):
    module = shutil.copy(WEB / name, tmp_path / "script.mjs")
    assert subprocess.run(["node", "--check", module], capture_output=True, text=True, check=False).stderr == ""


def test_the_page_takes_nothing_from_elsewhere():
    for path in WEB.iterdir():
        assert not re.search(r"(https?:)?//[a-z]", re.sub(r"^\s*//.*", "", path.read_text(), flags=re.M)), path


def test_scripts_find_what_they_ask_for():
    ids = set(re.findall(r'\bid="([\w-]+)"', (WEB / "index.html").read_text()))
    for script in WEB.glob("*.js"):
        assert set(re.findall(r'byId\("([\w-]+)"\)', script.read_text())) <= ids, script


def test_the_page_is_packed():
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["openkeye"]
    assert "apps/http_api/web/*" in packed

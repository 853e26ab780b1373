"""Pages in a real browser: nothing sticks out at any width, nothing fails to load."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import demo
from benchmarks.common.figures import Curve, line_figure
from benchmarks.common.report import Report, Table, write_page

PROBE = """<script>
addEventListener("load", () => {
  const root = document.documentElement;
  const broken = [...document.images].filter(image => !image.complete || !image.naturalWidth).length;
  parent.postMessage([innerWidth, root.scrollWidth, broken, document.images.length].join(" "), "*");
});
</script>"""
FRAME = """<script>addEventListener("message", event => document.documentElement.setAttribute("seen", event.data));</script>
<iframe src="{page}" style="border: 0; width: {width}px; height: 900px"></iframe>"""
"""The frame makes pages narrower than the narrowest window of the browser."""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian's package: chromium)")
    return found


def look(browser: str, page: Path, width: int) -> tuple[list[int], list[str]]:
    """``[width, content's width, broken pictures, pictures]`` and what the browser wrote to its console."""
    probed, frame = page.with_name("probed.html"), page.with_name("frame.html")
    probed.write_text(page.read_text().replace("</head>", PROBE + "</head>"))
    frame.write_text(FRAME.format(page=probed.name, width=width))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    command = [browser, *options, f"--window-size={max(width, 500)},900", "--dump-dom", frame.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    seen = re.search(r'<html seen="([^"]*)"', ended.stdout)
    assert seen is not None, ended.stderr
    return [int(number) for number in seen[1].split()], [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.multiprocess
@pytest.mark.parametrize("width", [1200, 400])
def test_wide_tables_long_words_and_figures_stay_inside_the_page(browser: str, tmp_path: Path, width: int):
    figure = line_figure("below " + "x" * 300, [Curve("a", [0, 1], [1.0, 0.1])], x_label="step", y_label="loss")
    numbers = Table.of("n" * 200, [{f"a long name of column {number}": number / 3 for number in range(40)}])
    words = Table.of("words", [{"the study": "one two three " * 30, "here": "yes", "rule": "w" * 300}], words=True)
    report = Report("T" * 150, ["y" * 400], [numbers, words], {"loss": figure}, notes=["z" * 400])
    page = write_page(tmp_path, "Title " * 40, [report, report])
    (inner, content, broken, pictures), console = look(browser, page, width)
    assert (inner, broken, pictures) == (width, 0, 2)
    assert content <= width
    assert console == []


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.main(["--out", str(tmp_path_factory.mktemp("demo")), "--scale", "0.02"])


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("width", [1200, 400])
def test_the_demo_page_stays_inside_the_window(browser: str, demo_page: Path, width: int):
    (inner, content, broken, pictures), console = look(browser, demo_page, width)
    assert (inner, broken) == (width, 0)
    assert pictures >= 15
    assert content <= width
    assert console == []


@pytest.mark.slow
def test_all_sections_of_the_demo_stand_on_its_page_and_open_their_figures(demo_page: Path):
    content = demo_page.read_text()
    assert all(f"<h2>{section.title}</h2>" in content for section in demo.SECTIONS)
    links = re.findall(r'<figure[^>]*>\s*<a href="([^"]+)"', content)
    assert len(links) == content.count("<img")
    assert all((demo_page.parent / link).is_file() for link in links)

"""The report for people in a browser: no script runs, nothing is asked for, a phone shows all of it, in light and dark.

Needs Chromium and the package playwright, which drives it; nothing is downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.review.report_page import build_report_page
from tests.unit.review.test_report_page import EVIL, make_report, make_summary

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
CONTRASTS = """() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const back = element => parse(getComputedStyle(element).backgroundColor);
  const behind = element => back(element)[3] === 0 ? behind(element.parentElement) : back(element);
  return [...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
}"""
"""The contrast of every text with what is behind it, by WCAG 2.2."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_is_quiet_and_fits_and_can_be_read(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    (tmp_path / "report.html").write_text(build_report_page(make_summary(EVIL, EVIL * 5, "x" * 500, kinds=30), make_report()))
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    complaints, requests = list[str](), list[str]()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.title() == "Report of slips"
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert min(page.evaluate(CONTRASTS)) >= 4.5


def test_a_screen_reader_has_names_for_pictures_and_tables(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(build_report_page(make_summary(), make_report()))
    page = browser.new_context().new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("svg").count() == page.locator("svg[role=img][aria-label]").count() == 3
    assert page.locator("table").count() == page.locator("table > caption:first-child").count() > 5
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert max(after - before for before, after in pairwise(levels)) == 1

"""Pictures of the review page and of the report: takes an output and writes docs/review.png and docs/report.png.

    python docs/draw_pages.py OUTPUT

The report shows the last two names of the output's path alone, `out/invoices`.
Needs Chromium, and playwright and Pillow of `.[dev]`; nothing is downloaded.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from pipeline.review.page import write_review_page

DOCS = Path(__file__).parent
WIDTH, HEIGHT = 1100, 760
COLORS = 64


def main(place: str) -> int:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        review, report = Path(folder) / "review.html", Path(folder) / "report.html"
        write_review_page(place, review, 3)
        output = Path(place).resolve()
        report.write_text((output / "report.html").read_text().replace(f"{output.parents[1]}/", ""))
        for page, file in ((review, "review.png"), (report, "report.png")):
            (DOCS / file).write_bytes(draw_page(browser, page))
    return 0


def draw_page(browser: Any, file: Path) -> bytes:
    """Return the first screen of a page as PNG with few colours."""
    page = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}).new_page()
    page.goto(file.as_uri())
    page.wait_for_timeout(1000)
    picture = io.BytesIO()
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(COLORS).save(picture, "PNG", optimize=True)
    return picture.getvalue()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""How well does the text layer tell true values from altered ones? Labelled digital PDFs in, a table out.

    python benchmarks/evidence.py FOLDER [FOLDER …] [--items] [--drawn 60]

A folder holds PDFs, in folders of their own perhaps, each with its true values beside it in a JSON file of the same name or NAME.gold.json:
an object, or a list whose first item is one. `--items` judges the rules about lines and columns, by values of objects in lists alone.
Every value is looked for, and altered copies of it in its place in the record: days one more and one less and with another digit, amounts
with another digit, texts with another digit or letter. "Printed" is decided without the matcher, by plain searches of the page's text
for many spellings of a value. "Same place": the altered value is witnessed where the true one stands, which is a defect of the matcher;
"elsewhere": it is printed at another place. Bounds: 98 % of the printed values with a box whose words are the value; altered at the same
place 0.2 %,
anywhere 1 % for texts and amounts; 2 ms of CPU a page beyond reading its words. `--ocr` reads images instead, receipts whose days come
first: true totals and dates 95 %, altered ones 2 %. `--pixels` reads the first pages of each PDF by OCR, too, and prints how their text
layers do, and which true values or pages raise the alert that they differ from the pixels: none should, in 0.5 % of the documents at most.
Then it changes a letter or digit of the layer where a value has its only place: an alert where OCR reads the value.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.demo import drawing
from pipeline.demo.documents import HELD_OUT, draw_sample
from pipeline.demo.truth import format_answer
from pipeline.errors import DocumentError
from pipeline.evidence.alerts import list_alerts
from pipeline.evidence.layers import judge_layer, order_witnesses
from pipeline.evidence.match import Evidence, Match, Witness, match_values
from pipeline.evidence.ocr import read_words_by_ocr
from pipeline.evidence.text_layer import PageWords, collect_page_words, pack_words, unpack_words
from pipeline.records import PageLayer
from pipeline.render.document import open_document
from pipeline.render.sandbox import ReadingSandbox
from pipeline.schema import parse_json

SEED = 7
FIRST_DRAWN = HELD_OUT + 7 * 10**6
MAX_PAGES = 40
MAX_FORGED = 12
"""Values of a document whose words in the layer are changed."""
NOT_PRINTED = {"file", "pages", "issues", "full", "has_text", "desc", "issuer"}
"""Keys of the labels that describe the file or its template."""
WITNESSED = {Match.EXACT, Match.NORMALIZED}
DAY_FORMS = (
    *(f"{day}{mark}{month}{mark}{year}" for mark in "./-" for day in ("%d", "%-d") for month in ("%m", "%-m") for year in ("%Y", "%y")),
    *(f"{month}{mark}{day}{mark}{year}" for mark in "/-" for day in ("%d", "%-d") for month in ("%m", "%-m") for year in ("%Y", "%y")),
    *(f"%Y{mark}%m{mark}%d" for mark in "-/."),
    *(f"{day} {month} %Y" for day in ("%d", "%-d") for month in ("%B", "%b")),
    *(f"{month} {day}, %Y" for day in ("%d", "%-d") for month in ("%B", "%b")),
    *("%b-%d-%y", "%d-%b-%Y", "%d-%b-%y"),
)
FOREIGN_MONTHS = {"april": ["avril"], "march": ["maart"], "july": ["juillet"], "may": ["mai"], "september": ["september"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--misses", action="store_true", help="print the printed values that were not found")
    parser.add_argument("--ocr", action="store_true", help="read images (*.jpg) by OCR instead of the text layers of PDFs")
    parser.add_argument("--pixels", action="store_true", help="compare the text layers of first pages with what OCR reads there")
    parser.add_argument("--pages", type=int, default=1, help="with --pixels: how many pages of each PDF (default: %(default)s)")
    parser.add_argument("--items", action="store_true", help="values of objects in lists alone")
    parser.add_argument("--altered", type=int, default=1000, help="values of a document that are altered, by chance (default: %(default)s)")
    parser.add_argument("--drawn", type=int, default=0, help="so many invoices of the demonstration's generator, too")
    options = parser.parse_args()
    if options.pixels:
        print_layers(options.folders, options.pages)
    else:
        print_matching(options)


def print_matching(options: argparse.Namespace) -> None:
    """Print how well and how fast true values and altered ones are told apart, and the alerts about hidden text."""
    chance, counts, documents, pages, spent_s = random.Random(SEED), Counter[tuple[str, str]](), 0, 0, 0.0
    for name, values, words in list_labelled(options):
        if not documents:
            match_values({}, values, words)  # what a process prepares once, 33 ms, is no page's
        began_s = time.process_time()
        evidence = match_values({}, values, words)
        spent_s += time.process_time() - began_s
        documents, pages = documents + 1, pages + len(words)
        text = "\n".join(" ".join(page.texts) for page in words)
        evidence = [found for found in evidence if not options.items or is_of_item(found.path)]
        altered = {found.path for found in chance.sample(evidence, min(len(evidence), options.altered))}
        for found in evidence:
            shown = name if options.misses else ""
            judge_value(found, values, text, words, counts, chance, options.ocr, shown, is_altered=found.path in altered)
    print(f"{documents} documents, {pages} pages with words, matching {1000 * spent_s / max(1, pages):.2f} ms of CPU a page\n")
    print_table(counts)
    if not options.ocr:
        print_alerts(options.folders)


def list_labelled(options: argparse.Namespace) -> Iterator[tuple[str, Any, list[PageWords]]]:
    """Yield the documents with their names, true values and words: those of the folders, and invoices of the demonstration's generator."""
    for file in sorted(found for folder in options.folders for found in folder.rglob("*.jpg" if options.ocr else "*.pdf")):
        if (values := read_labels(file)) and (words := read_words_of(file, options.ocr)):
            yield file.name, values, words
    for number in range(options.drawn):
        sample = draw_sample(FIRST_DRAWN + number, "invoice", 2 if number % 4 == 3 else 1)
        yield f"drawn-{number}", parse_json(format_answer(sample.truth)), read_words(drawing.draw_pdf(sample.sheets))


def is_of_item(path: str) -> bool:
    """Say whether a value is one of an object in a list, and printed: not a number that the label gives the object, nor a scale."""
    return "]." in path and not path.endswith((".array_index", ".scale"))


def print_alerts(folders: list[Path]) -> None:
    """Print how many PDFs of the folders, labelled or not, have alerts about hidden text, and which."""
    files = sorted(file for folder in folders for file in folder.rglob("*.pdf"))
    alerts = {file.name: found for file in files if (found := list_alerts(read_words_of(file), []))}
    print(f"\nalerts about hidden text: {len(alerts)} of {len(files)} PDFs ({len(alerts) / max(1, len(files)):.1%})")
    for name, found in alerts.items():
        print(f"  {name}: {found[0]['reason']}: {found[0]['text'][:100]}")


def print_layers(folders: list[Path], count: int) -> None:
    """Print how the layers of the first pages do, the alerts that OCR of their pixels raises, and how many changed words of layers do."""
    judged, alerts, forged, chance, alerted = Counter[str](), Counter[str](), Counter[str](), random.Random(SEED), set[Path]()
    files = sorted(file for folder in folders for file in folder.rglob("*.pdf"))
    with ReadingSandbox(RenderSettings(text_layer=True)) as sandbox:
        for file in files:
            try:
                last_page = sandbox.open(file.read_bytes())
            except DocumentError:
                judged["documents that do not open"] += 1
                continue
            read: dict[int, tuple[PageWords, PageWords]] = {}
            for page_no in range(1, min(last_page, count) + 1):
                with suppress(DocumentError):
                    (page,) = sandbox.draw_pages(page_no, page_no)
                    layer = collect_page_words(page)
                    judged[judge := str(judge_layer(layer, page.pixels, page.width_pt, page.height_pt))] += 1
                    if judge == PageLayer.USABLE:
                        read[page_no] = layer, replace(collect_page_words(sandbox.read_page(page_no)), is_ocr=True)
            values = read_labels(file)
            others = [page for page in read_words_of(file) if page.page_no not in read] if values else []
            words = [one for layer, ocr in read.values() for one in order_witnesses(layer, ocr, PageLayer.USABLE)]
            evidence = match_values({}, values, [*words, *others])
            forged.update(forge_layers(values, evidence, read, chance))
            for alert in list_alerts(words, evidence):
                if alert["kind"] == "different_text":
                    alerted.add(file)
                    alerts[alert["reason"]] += 1
                    print(f"{file.name}: {alert['reason']}, {alert['path']}: {alert['text'][:60]!r}")
    print(f"{len(files)} documents, pages {dict(judged)}; {len(alerted)} documents with alerts of different text: {dict(alerts)}")
    print(f"words of layers changed at a value: {dict(forged)}")


def read_labels(file: Path) -> Any:
    """Return the true values beside a PDF; none where there are none."""
    labels = [other for ending in (".json", ".gold.json") if (other := file.with_suffix(ending)).exists()]
    values = parse_json(labels[0].read_text()) if labels else {}
    values = values[0] if isinstance(values, list) else values
    return {key: value for key, value in values.items() if key not in NOT_PRINTED}


def forge_layers(
    values: Any, evidence: list[Evidence], read: dict[int, tuple[PageWords, PageWords]], chance: random.Random
) -> Iterator[str]:
    """Change for some values the only place of a layer that shows them, and yield what becomes of each."""
    once = [found for found in evidence if found.is_witnessed and found.places == 1 and found.page in read]
    once = [found for found in once if found.witness != Witness.OCR and sum(map(str.isalnum, found.words or "")) > 1]
    for found in chance.sample(once, min(len(once), MAX_FORGED)):
        assert found.page is not None
        layer, ocr = read[found.page]
        (at, *_) = find_words_inside(layer, found.box)
        places = [place for place, letter in enumerate(layer.texts[at]) if letter.isdigit()] or [*range(len(layer.texts[at]))]
        place = chance.choice(places)
        letter = chance.choice("0123456789" if layer.texts[at][place].isdigit() else "bdgkmpqz")
        if letter == layer.texts[at][place].lower():
            continue
        texts = [*layer.texts]
        texts[at] = texts[at][:place] + letter + texts[at][place + 1 :]
        pages = {**read, found.page: (replace(layer, texts=texts), ocr)}
        words = [one for pair in pages.values() for one in order_witnesses(*pair, PageLayer.USABLE)]
        changed = match_values({}, values, words)
        yield "all"
        if next(one for one in changed if one.path == found.path).witness == Witness.OCR:
            yield "read by OCR"
            if any(alert["path"] == found.path and alert["kind"] == "different_text" for alert in list_alerts(words, changed)):
                yield "alerts"


def find_words_inside(layer: PageWords, box: Any) -> list[int]:
    """Return the words of a layer whose middles are in a box."""
    x, y = (layer.boxes[:, 0] + layer.boxes[:, 2]) / 2, (layer.boxes[:, 1] + layer.boxes[:, 3]) / 2
    found: list[int] = ((x > box[0] - 1) & (x < box[2] + 1) & (y > box[1] - 1) & (y < box[3] + 1)).nonzero()[0].tolist()
    return found


def read_words_of(file: Path, by_ocr: bool = False) -> list[PageWords]:
    """Return the words of a document's pages, as a ledger keeps them; none for a scan or a file that does not open."""
    if by_ocr:
        page = open_document(file.read_bytes(), RenderSettings()).draw(1)
        return [read_words_by_ocr(1, page.pixels, page.width_pt, page.height_pt)]
    return read_words(file.read_bytes())


def read_words(data: bytes) -> list[PageWords]:
    """Return the words of a PDF's pages, as a ledger keeps them; none for a scan or a file that does not open."""
    try:
        opened = open_document(data, RenderSettings(PixelBudget(), text_layer=True))
        rows = [(number, pack_words(opened.draw(number))) for number in range(1, min(opened.page_count, MAX_PAGES) + 1)]
    except DocumentError:
        return []
    return [unpack_words(number, row) for number, row in rows if row]


def judge_value(
    found: Evidence,
    record: Any,
    text: str,
    words: list[PageWords],
    counts: Counter[tuple[str, str]],
    chance: random.Random,
    is_receipt: bool,
    name: str,
    is_altered: bool,
) -> None:
    """Count whether a value was found, and whether altered copies of it are."""
    kind, value = classify_value(found.value, is_receipt)
    is_printed = is_printed_plainly(kind, value, text)
    counts[kind, "values"] += 1
    counts[kind, "printed"] += is_printed
    is_found = found.match in WITNESSED
    counts[kind, "found"] += is_found
    counts[kind, "printed and found"] += is_found and is_printed
    counts[kind, "found, not printed"] += is_found and not is_printed
    counts[kind, "several places"] += is_found and found.places > 1
    if (is_printed or is_receipt) and not is_found and name:
        print(f"not found: {name} {found.path} {found.value!r} {found.match}")
    for altered in alter_value(kind, value, found.value, chance, is_receipt) if is_altered else ():
        changed = match_values({}, replace_value(record, found.path, altered), words)
        other = next(one for one in changed if one.path == found.path)
        counts[kind, "altered"] += 1
        if other.match in WITNESSED:
            same = found.box is not None and other.page == found.page and other.box is not None and overlap_boxes(found.box, other.box)
            counts[kind, "altered, same place" if same and is_found else "altered, elsewhere"] += 1
            if name and (same or kind != "date"):
                print(f"altered and witnessed, same place {same}: {name} {found.path} {found.value!r} -> {altered!r} as {other.words!r}")


def classify_value(text: str, day_first: bool) -> tuple[str, Any]:
    """Return a value's kind and the value: a date, an amount, or a text."""
    slashed = r"(?P<d>\d{1,2})[/-](?P<m>\d{1,2})[/-]" if day_first else r"(?P<m>\d{1,2})/(?P<d>\d{1,2})/"
    for pattern in (r"(?P<y>\d{4})-(?P<m>\d\d)-(?P<d>\d\d)", slashed + r"(?P<y>\d{2}|\d{4})"):
        if part := re.fullmatch(pattern, text):
            year = int(part["y"])
            return "date", date(year + 2000 * (year < 100), int(part["m"]), int(part["d"]))
    if (part := re.fullmatch(r"\$?(\d[\d,]*(?:\.\d+)?)", text)) and ("." in text or "$" in text):
        return "amount", float(part[1].replace(",", ""))
    return "text", text


def is_printed_plainly(kind: str, value: Any, text: str) -> bool:
    """Say whether a value is printed, by plain searches."""
    if kind == "text":
        letters = r"[\W_]*".join(squeeze(value))
        return bool(letters and re.search(rf"(?<![^\W_]){letters}(?![^\W_])", text.lower()))
    if kind == "amount":
        return any(re.search(rf"(?<![\d.,]){re.escape(form)}(?![\d]|[.,]\d)", text) for form in list_amounts(value))
    forms = {value.strftime(form).lower() for form in DAY_FORMS}
    forms |= {form.replace(month, other) for form in forms for month, others in FOREIGN_MONTHS.items() for other in others}
    return any(re.search(rf"(?<![\d]){re.escape(form)}(?!\d)", text.lower().replace("\n", " ")) for form in forms)


def list_amounts(value: float) -> Iterator[str]:
    """Yield how an amount may be printed."""
    for digits in {f"{value:.2f}", f"{value:g}"} | ({f"{value:.0f}"} if value == int(value) else set()):
        whole, _, fraction = digits.partition(".")
        for mark, point in ((",", "."), (".", ","), (" ", ","), ("'", "."), ("", "."), ("", ",")):
            grouped = f"{int(whole):,}".replace(",", mark)
            yield f"{grouped}{point}{fraction}" if fraction else grouped


def squeeze(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def alter_value(kind: str, value: Any, written: str, chance: random.Random, day_first: bool) -> Iterator[str]:
    """Yield altered copies of a value, in the form in which it was written."""
    if kind == "date":
        for other in (value + timedelta(1), value - timedelta(1), value.replace(day=value.day % 28 + 1 if value.day != 28 else 8)):
            parts = (other.day, other.month) if day_first else (other.month, other.day)
            form = re.sub(r"\d+", "{:02}" if day_first else "{}", written)
            yield other.isoformat() if re.match(r"\d{4}-", written) else form.format(*parts, int(re.split("[/-]", written)[2]))
        return
    places = [at for at, letter in enumerate(written) if (letter.isdigit() if kind == "amount" else letter.isalnum())]
    for _ in range(3 if len(places) > 1 else 0):
        at = chance.choice(places)
        letters = "0123456789" if written[at].isdigit() else "abcdefghijklmnopqrstuvwxyz"
        yield written[:at] + chance.choice([other for other in letters if other != written[at].lower()]) + written[at + 1 :]


def replace_value(record: Any, path: str, value: str) -> Any:
    """Return a record with another value at a path such as `$.lines[0].amount`."""
    changed = here = copy.deepcopy(record)
    *steps, last = [int(step[1:-1]) if step[0] == "[" else step.lstrip(".") for step in re.findall(r"\[\d+\]|\.[^.\[]+", path)]
    for step in steps:
        here = here[step]
    here[last] = value
    return changed


def overlap_boxes(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])


def print_table(counts: Counter[tuple[str, str]]) -> None:
    """Print the shares by kind of value."""
    names = ("kind", "values", "found", "printed", "of these found", "found, not printed plainly", "several places", "altered")
    names += ("same place", "elsewhere")
    print(f"| {' | '.join(names)} |\n| --- |{' ---: |' * (len(names) - 1)}")
    for kind in ("text", "amount", "date"):
        found, altered = max(1, counts[kind, "found"]), max(1, counts[kind, "altered"])
        cells = [counts[kind, "values"], f"{counts[kind, 'found'] / max(1, counts[kind, 'values']):.1%}", counts[kind, "printed"]]
        cells += [f"{counts[kind, 'printed and found'] / max(1, counts[kind, 'printed']):.1%}", counts[kind, "found, not printed"]]
        cells += [f"{counts[kind, 'several places'] / found:.0%}", counts[kind, "altered"]]
        cells += [f"{counts[kind, name] / altered:.1%}" for name in ("altered, same place", "altered, elsewhere")]
        print("|", " | ".join(map(str, [kind, *cells])), "|")


if __name__ == "__main__":
    main()

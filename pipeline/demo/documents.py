"""A seed -> a synthetic invoice or receipt: what is printed where, and the truth a perfect reader would return.

Slips 57 mm square: at the jobs' 200 dpi a page is 448×448 px (16 rows of 16 visual tokens) and its print 14 to 17 px
high, which is what the small demonstration model was given to learn. Knows nothing of the model; `drawing.py` turns a
`Sheet` into a PDF page or a scan.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from decimal import Decimal
from functools import cache
from typing import Any, Literal

import pymupdf

DPI = 200
WIDTH_PX, HEIGHT_PX = 448, 448
HELD_OUT = 10**9
"""Training draws seeds below this one; samples and evaluation begin here."""
Form = Literal["invoice", "receipt"]
FAMILIES = (("helv", "hebo"), ("tiro", "tibo"), ("cour", "cobo"), ("helv", "heit"), ("tiro", "tiit"))

SURNAMES = (
    "Adler Baker Brandt Carver Dalton Ebner Fischer Garnier Hansen Ibsen Jansen Keller Larsen Marten Novak Olsen Petit Quirke Rossi "
    "Santos Turner Ulrich Varga Weber Young Zeller Moreau Lindqvist Kowalski Duarte"
).split()
TRADES = (
    "Tools Foods Print Motors Garden Supply Media Textil Optik Bau Logistics Energy Paper Systems Trading Bikes Books Dental Fabrics Glass"
).split()
ENDINGS = ("GmbH", "Ltd", "Inc", "AG", "SARL", "BV", "SpA", "LLC", "Oy", "AB", "& Co", "& Sons", "KG", "plc")
SHOPS = "Cafe Bakery Market Bistro Kiosk Deli Pharmacy Grill Corner Store Books Flowers Express Bazaar Grocery Garage".split()
ARTICLES = (
    "Bolt Cable Chair Desk Lamp Paper Toner Filter Pump Valve Brush Paint Glue Panel Screw Motor Belt Sensor Switch Timber Tile Carpet "
    "Folder Binder Label Printer Monitor Keyboard Bracket Hinge Gasket Bearing Fan Hose Clamp Drill Saw Blade Battery Charger"
).split()
QUALITIES = "Steel Copper Large Small Heavy Black White Red Blue Green Flat Round Soft Hard Basic Premium Spare Mobile Twin Solid".split()
SERVICES = ("Consulting", "Delivery", "Assembly", "Training", "Support", "Cleaning", "Translation", "Repair", "Hosting", "Design work")
GROCERIES = (
    "Coffee Tea Milk Bread Butter Cheese Apples Bananas Soup Salad Pizza Pasta Rice Juice Water Cola Beer Wine Cake Muffin Bagel Yogurt "
    "Eggs Honey Salt Sugar Soap Candle Napkins Batteries Sandwich Espresso Latte Omelette Burger Fries Tomato Onion Garlic Olives"
).split()
SYLLABLES = (
    "ba be bo da de do fa fe ga go ha ka ke ki ko la le li lo lu ma me mi mo na ne ni no nu pa pe po ra re ri ro "
    "sa se so ta te ti to va ve vi"
).split()
CODES = ("EUR", "USD", "GBP", "CHF", "CAD", "SEK", "PLN", "AUD")
SIGNS = {"EUR": "\u20ac", "USD": "$", "GBP": "\u00a3"}
MONTHS = "January February March April May June July August September October November December".split()
ALNUM = "ABCDEFGHJKLMNPRSTUVWXYZ0123456789"


@dataclass(frozen=True)
class Run:
    """A piece of text in one font. Units: pixels at 200 dpi; `y_px` is the baseline."""

    text: str
    x_px: float
    y_px: float
    font: str
    size_px: float
    shows: str = ""
    """The path of the value that it shows, such as `$.total`."""


@dataclass(frozen=True)
class Rule:
    """A thin straight line. Units: pixels at 200 dpi."""

    x0_px: float
    y0_px: float
    x1_px: float
    y1_px: float


@dataclass
class Sheet:
    """One page: its texts and lines."""

    runs: list[Run] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """A document and its truth, whose keys are in the order of `schemas/{form}.json`."""

    form: Form
    sheets: tuple[Sheet, ...]
    truth: dict[str, Any]


@cache
def advances(font: str) -> tuple[float, ...]:
    """Return each Latin-1 character's advance width in ems (and the Euro's, at its WinAnsi place 128)."""
    metrics = pymupdf.Font(font)
    return tuple(metrics.glyph_advance(0x20AC if code == 128 else code) for code in range(256))


def char_widths(text: str, font: str, size_px: float) -> list[float]:
    """Return the advance of each character in pixels."""
    widths = advances(font)
    return [widths[128 if c == "\u20ac" else ord(c)] * size_px for c in text]


class Pen:
    """Writes rows of text on sheets, top to bottom; starts a new sheet when one is full."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.plain, self.bold = rng.choice(FAMILIES)
        self.size_px = rng.uniform(13.5, 15.0) if self.plain == "cour" else rng.uniform(14.0, 17.0)
        self.pitch_px = rng.uniform(26.5, 28.5)
        self.left_px = rng.uniform(12, 30)
        self.right_px = WIDTH_PX - rng.uniform(12, 30)
        self.first_px = rng.uniform(22, 32)
        self.sheets = [Sheet()]
        self.y_px = self.first_px

    def width(self, text: str, bold: bool = False, scale: float = 1.0) -> float:
        return sum(char_widths(text, self.bold if bold else self.plain, self.size_px * scale))

    def write(self, text: str, x_px: float, align: str = "left", bold: bool = False, scale: float = 1.0, shows: str = "") -> None:
        """Place a text on the current row; `x_px` is its left end, middle or right end."""
        width_px = self.width(text, bold, scale)
        start_px = x_px - {"left": 0.0, "middle": width_px / 2, "right": width_px}[align]
        font = self.bold if bold else self.plain
        self.sheets[-1].runs.append(Run(text, start_px, self.y_px, font, self.size_px * scale, shows))

    def rule(self) -> None:
        """Draw a line under the current row."""
        y_px = self.y_px + self.size_px * 0.4
        self.sheets[-1].rules.append(Rule(self.left_px, y_px, self.right_px, y_px))

    def next_row(self, rows: float = 1.0) -> None:
        self.y_px += rows * self.pitch_px

    def room(self) -> int:
        """Return how many rows still fit."""
        return int((HEIGHT_PX - 12 - self.y_px) / self.pitch_px) + 1

    def turn_page(self) -> None:
        self.sheets.append(Sheet())
        self.y_px = self.first_px


def sample(seed: int, form: Form, pages: int = 1) -> Sample:
    """Return the document of this seed; the same seed always gives the same document."""
    rng = random.Random(f"{form}/{pages}/{seed}")
    return invoice(rng, pages) if form == "invoice" else receipt(rng)


def invoice(rng: random.Random, pages: int = 1) -> Sample:
    """Draw an invoice with three to five facts about itself, its line items and its totals."""
    pen, money, day = Pen(rng), Money(rng), Day(rng)
    issued = date(2015, 1, 1) + timedelta(days=rng.randrange(365 * 12))
    due = issued + timedelta(days=rng.choice((7, 10, 14, 21, 30, 45, 60)))
    truth: dict[str, Any] = {
        "seller_name": company(rng),
        "seller_tax_id": maybe(rng, 0.5, tax_id),
        "buyer_name": maybe(rng, 0.85, lambda r: company(r) if r.random() < 0.6 else person(r)),
        "invoice_number": maybe(rng, 0.95, number),
        "invoice_date": issued.isoformat(),
        "due_date": maybe(rng, 0.65, lambda _: due.isoformat()),
        "purchase_order": maybe(rng, 0.4, order_number),
        "currency": money.code,
        "line_items": [],
    }
    printed = {"invoice_date": day.text(issued), "due_date": day.text(due)}
    heading(pen, truth)
    facts(pen, truth, printed)
    count = rng.randint(1, min(5, pen.room() - 4)) if pages == 1 else rng.randint(5, 9)
    truth["line_items"] = [invoice_item(rng) for _ in range(count)]
    table(pen, money, truth["line_items"], pages)
    subtotal = sum((item["amount"] for item in truth["line_items"]), Decimal(0))
    taxed = rng.random() < 0.85
    rate = rng.choice((5, 7, 8, 10, 19, 20, 21, 25))
    tax = (subtotal * rate / 100).quantize(Decimal("0.01")) if taxed else None
    truth |= {"subtotal": subtotal if taxed else None, "tax_amount": tax, "total": subtotal + (tax or 0)}
    totals(pen, money, truth, rate)
    return Sample("invoice", tuple(pen.sheets), truth)


def heading(pen: Pen, truth: dict[str, Any]) -> None:
    """Write who sells, and the word that names the document."""
    rng, word = pen.rng, pen.rng.choice(("INVOICE", "Invoice", "Tax Invoice", "Rechnung", "FACTURE"))
    scale = rng.uniform(1.0, 1.2)
    if rng.random() < 0.25:
        pen.write(word, (pen.left_px + pen.right_px) / 2, "middle", bold=True, scale=scale)
        pen.next_row(1.1)
        word = ""
    pen.write(truth["seller_name"], pen.left_px, bold=rng.random() < 0.6, scale=scale, shows="$.seller_name")
    if word and pen.width(truth["seller_name"], True, scale) + pen.width(word, True) < pen.right_px - pen.left_px - 20:
        pen.write(word, pen.right_px, "right", bold=True)
    pen.next_row(1.1)
    if truth["seller_tax_id"]:
        label = rng.choice(("VAT ID", "VAT", "Tax ID", "USt-ID", "VAT no.")) + rng.choice((" ", ": "))
        pen.write(label + truth["seller_tax_id"], pen.left_px, shows="$.seller_tax_id")
        pen.next_row()


LABELS = {
    "invoice_number": ("Invoice No", "Invoice No.", "Invoice number", "Invoice #", "Rechnung Nr.", "No."),
    "invoice_date": ("Date", "Invoice date", "Issued", "Datum"),
    "due_date": ("Due date", "Due", "Payable by", "Pay until"),
    "purchase_order": ("PO", "PO number", "Your order", "Order no."),
    "buyer_name": ("Bill to", "Customer", "Sold to", "Client", "To"),
}


def facts(pen: Pen, truth: dict[str, Any], printed: dict[str, str]) -> None:
    """Write the labelled facts in one of three layouts, the buyer among them."""
    rng = pen.rng
    names = [n for n in ("invoice_number", "invoice_date", "due_date", "purchase_order") if truth[n]]
    if rng.random() < 0.3:
        rng.shuffle(names)
    if truth["buyer_name"]:
        names.insert(rng.choice((0, len(names))), "buyer_name")
    layout, colon = rng.choice(("inline", "columns", "right")), rng.choice(("", ":"))
    labels = {n: rng.choice(LABELS[n]) + colon for n in names}
    column_px = pen.left_px + max(pen.width(label) for label in labels.values()) + rng.uniform(12, 40)
    for name in names:
        label, value = labels[name], printed.get(name) or truth[name]
        if layout == "inline" or name == "buyer_name":
            pen.write(f"{label} {value}", pen.left_px, shows=f"$.{name}")
        elif layout == "columns":
            pen.write(label, pen.left_px)
            pen.write(value, column_px, shows=f"$.{name}")
        else:
            pen.write(label, pen.left_px)
            pen.write(value, pen.right_px, "right", shows=f"$.{name}")
        pen.next_row()


def invoice_item(rng: random.Random) -> dict[str, Any]:
    """Draw one position: what, how many, at which price."""
    quantity = rng.choice((1, 1, 2, 3, 4, 5, 6, 8, 10, 12, rng.randint(1, 60)))
    price = cents(rng, 100, 40_000 if quantity > 5 else 90_000)
    return {"description": article(rng), "quantity": quantity, "unit_price": price, "amount": price * quantity}


def table(pen: Pen, money: Money, items: list[dict[str, Any]], pages: int) -> None:
    """Write the positions under a header, on as many sheets as were asked for."""
    rng = pen.rng
    quantity_px = pen.left_px + (pen.right_px - pen.left_px) * rng.uniform(0.45, 0.48)
    price_px = pen.left_px + (pen.right_px - pen.left_px) * 0.72
    titles = rng.choice((("Description", "Qty", "Price", "Amount"), ("Item", "Qty", "Unit", "Total"), ("Article", "Pcs", "Each", "Sum")))
    break_at = len(items) - rng.randint(1, 3) if pages > 1 else -1

    def row(cells: tuple[str, ...], shows: tuple[str, ...], bold: bool = False) -> None:
        pen.write(cells[0], pen.left_px, bold=bold, shows=shows[0])
        for text, x_px, path in zip(cells[1:], (quantity_px, price_px, pen.right_px), shows[1:], strict=True):
            pen.write(text, x_px, "right", bold, shows=path)

    row(titles, ("",) * 4, bold=rng.random() < 0.5)
    if rng.random() < 0.6:
        pen.rule()
    pen.next_row()
    for index, item in enumerate(items):
        if pages > 1 and (index == break_at or pen.room() <= 1) and len(pen.sheets) < pages:
            pen.turn_page()
        cells = (item["description"], str(item["quantity"]), money.number(item["unit_price"]), money.number(item["amount"]))
        row(cells, tuple(f"$.line_items[{index}].{key}" for key in item))
        pen.next_row()


def totals(pen: Pen, money: Money, truth: dict[str, Any], rate: int) -> None:
    """Write the sums, the currency beside some of them."""
    rng = pen.rng
    x_px = pen.left_px + (pen.right_px - pen.left_px) * rng.choice((0.0, 0.3, 0.4))
    if truth["subtotal"] is not None:
        pen.write(rng.choice(("Subtotal", "Net", "Net total")), x_px)
        pen.write(money.number(truth["subtotal"]), pen.right_px, "right", shows="$.subtotal")
        pen.next_row()
        pen.write(f"{rng.choice(('VAT', 'Tax', 'MwSt'))} {rate}%", x_px)
        pen.write(money.number(truth["tax_amount"]), pen.right_px, "right", shows="$.tax_amount")
        pen.next_row()
    bold = rng.random() < 0.6
    pen.write(rng.choice(("Total", "TOTAL", "Amount due", "To pay")), x_px, bold=bold)
    pen.write(money.amount(truth["total"]), pen.right_px, "right", bold=bold, shows="$.total")
    pen.next_row()


def receipt(rng: random.Random) -> Sample:
    """Draw a till receipt: shop, number, date, articles, sum, how it was paid."""
    pen, money, day = Pen(rng), Money(rng), Day(rng)
    bought = date(2015, 1, 1) + timedelta(days=rng.randrange(365 * 12))
    items = [receipt_item(rng) for _ in range(rng.randint(1, 6))]
    subtotal = sum((item["amount"] for item in items), Decimal(0))
    rate = rng.choice((5, 7, 10, 19, 20))
    tax = (subtotal * rate / (100 + rate)).quantize(Decimal("0.01")) if rng.random() < 0.6 else None
    truth: dict[str, Any] = {
        "merchant_name": shop(rng),
        "receipt_number": maybe(rng, 0.75, lambda r: str(r.randrange(10 ** r.randint(3, 6))).zfill(r.randint(3, 6))),
        "date": bought.isoformat(),
        "currency": money.code,
        "line_items": items,
        "tax_amount": tax,
        "total": subtotal,
        "payment_method": maybe(rng, 0.85, lambda r: r.choice(("cash", "card", "voucher"))),
    }
    middle_px = (pen.left_px + pen.right_px) / 2
    align, x_px = rng.choice((("middle", middle_px), ("left", pen.left_px)))
    pen.write(truth["merchant_name"], x_px, align, bold=rng.random() < 0.6, scale=rng.uniform(1.0, 1.2), shows="$.merchant_name")
    pen.next_row(1.1)
    stamps = receipt_stamps(rng, truth, day.text(bought))
    for stamp, shows in stamps:
        pen.write(stamp, x_px, align, shows=shows)
        pen.next_row()
    if rng.random() < 0.5:
        pen.rule()
    receipt_table(pen, money, truth, rate)
    return Sample("receipt", (pen.sheets[0],), truth)


def receipt_stamps(rng: random.Random, truth: dict[str, Any], printed: str) -> list[tuple[str, str]]:
    """Return the lines between the shop's name and the articles, in random order, each with what it shows."""
    clock = f" {rng.randint(7, 22):02}:{rng.randrange(60):02}" if rng.random() < 0.5 else ""
    stamps = [(f"{rng.choice(('Date ', 'Date: ', ''))}{printed}{clock}", "$.date")]
    if truth["receipt_number"]:
        label = rng.choice(("Receipt", "Receipt no.", "Bon", "Ticket #", "Bill"))
        stamps.append((f"{label} {truth['receipt_number']}", "$.receipt_number"))
    if rng.random() < 0.3:
        stamps.append((f"{rng.randint(1, 250)} {rng.choice(SURNAMES)} {rng.choice(('Street', 'Road', 'Lane', 'Avenue'))}", ""))
    rng.shuffle(stamps)
    return stamps


def receipt_item(rng: random.Random) -> dict[str, Any]:
    quantity = rng.choice((1, 1, 1, 1, 2, 2, 3, 4))
    return {"description": grocery(rng), "quantity": quantity, "amount": cents(rng, 50, 4_000) * quantity}


def receipt_table(pen: Pen, money: Money, truth: dict[str, Any], rate: int) -> None:
    """Write the articles and what stands under them."""
    rng, style = pen.rng, pen.rng.choice(("2 x Tea", "2x Tea", "2 Tea", "Tea x2"))
    for index, item in enumerate(truth["line_items"]):
        name, count = item["description"], item["quantity"]
        spelled = {"2 x Tea": f"{count} x {name}", "2x Tea": f"{count}x {name}", "2 Tea": f"{count} {name}", "Tea x2": f"{name} x{count}"}
        pen.write(spelled[style] if count > 1 or style == "2 Tea" else name, pen.left_px, shows=f"$.line_items[{index}]")
        pen.write(money.number(item["amount"]), pen.right_px, "right", shows=f"$.line_items[{index}].amount")
        pen.next_row()
    bold = rng.random() < 0.6
    pen.write(rng.choice(("Total", "TOTAL", "Sum", "To pay")), pen.left_px, bold=bold)
    pen.write(money.amount(truth["total"]), pen.right_px, "right", bold=bold, shows="$.total")
    pen.next_row()
    if truth["tax_amount"] is not None:
        pen.write(f"{rng.choice(('incl. VAT', 'incl. tax', 'VAT'))} {rate}%", pen.left_px)
        pen.write(money.number(truth["tax_amount"]), pen.right_px, "right", shows="$.tax_amount")
        pen.next_row()
    if method := truth["payment_method"]:
        words = {"cash": ("CASH", "Cash", "Paid cash"), "card": ("CARD", "VISA", "Card payment"), "voucher": ("VOUCHER", "Gift voucher")}
        pen.write(rng.choice(words[method]), pen.left_px, shows="$.payment_method")
        pen.next_row()
    if rng.random() < 0.5:
        pen.write(rng.choice(("Thank you!", "Have a nice day", "Please come again")), (pen.left_px + pen.right_px) / 2, "middle")


class Money:
    """One document's currency and how it writes numbers."""

    def __init__(self, rng: random.Random) -> None:
        self.code = rng.choices(CODES, (30, 20, 15, 10, 7, 6, 6, 6))[0]
        self.comma = self.code in ("EUR", "PLN", "SEK") and rng.random() < 0.6
        self.thousands = rng.choice((".", "", " ") if self.comma else (",", "", "'" if self.code == "CHF" else ","))
        signs = [lambda n: f"{n} {self.code}", lambda n: f"{self.code} {n}"]
        if sign := SIGNS.get(self.code):
            signs += [lambda n: f"{sign}{n}", lambda n: f"{n} {sign}"]
        self.style: Callable[[str], str] = rng.choice(signs)

    def number(self, value: Decimal) -> str:
        whole, fraction = f"{value:,.2f}".split(".")
        return whole.replace(",", self.thousands) + ("," if self.comma else ".") + fraction

    def amount(self, value: Decimal) -> str:
        return self.style(self.number(value))


class Day:
    """One document's way of writing dates; numbers parted by slashes or dots are day, month, year."""

    def __init__(self, rng: random.Random) -> None:
        self.style = rng.choice(("iso", "dot", "slash", "short", "long", "us"))

    def text(self, day: date) -> str:
        month = MONTHS[day.month - 1]
        return {
            "iso": day.isoformat(),
            "dot": f"{day:%d.%m.%Y}",
            "slash": f"{day:%d/%m/%Y}",
            "short": f"{day.day} {month[:3]} {day.year}",
            "long": f"{day.day} {month} {day.year}",
            "us": f"{month[:3]} {day.day}, {day.year}",
        }[self.style]


def maybe(rng: random.Random, chance: float, draw: Callable[[random.Random], Any]) -> Any:
    """Return a drawn value, or None: real documents lack fields."""
    return draw(rng) if rng.random() < chance else None


def cents(rng: random.Random, low: int, high: int) -> Decimal:
    """Return a price of `low` to `high` cents, small ones oftener, round ones sometimes."""
    value = int(low * (high / low) ** rng.random())
    return Decimal(value - value % 100 if value > 100 and rng.random() < 0.15 else value) / 100


def invented(rng: random.Random) -> str:
    """Return a name no list holds, so that the model must read letters rather than recall words."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


def company(rng: random.Random) -> str:
    first = invented(rng) if rng.random() < 0.5 else rng.choice(SURNAMES)
    return " ".join(p for p in (first, rng.choice(TRADES) if rng.random() < 0.6 else "", rng.choice(ENDINGS)) if p)


def person(rng: random.Random) -> str:
    first = (
        invented(rng)
        if rng.random() < 0.5
        else rng.choice("Anna Ben Clara David Eva Frank Greta Hugo Ida Jonas Karin Leo Mia Nils".split())
    )
    return f"{first} {rng.choice(SURNAMES)}"


def shop(rng: random.Random) -> str:
    first = invented(rng) if rng.random() < 0.5 else rng.choice(SURNAMES)
    return f"{first} {rng.choice(SHOPS)}"


def article(rng: random.Random) -> str:
    """Return a short description; some carry a type number."""
    if rng.random() < 0.15:
        return rng.choice(SERVICES)
    words = [rng.choice(QUALITIES)] if rng.random() < 0.4 else []
    words.append(invented(rng) if rng.random() < 0.2 else rng.choice(ARTICLES))
    if len(words) == 1 and rng.random() < 0.4:
        words.append(rng.choice(ALNUM[:23]) + str(rng.randint(1, 99)))
    return " ".join(words)


def grocery(rng: random.Random) -> str:
    first = invented(rng) if rng.random() < 0.15 else rng.choice(GROCERIES)
    return first if rng.random() < 0.6 else f"{rng.choice(QUALITIES)} {first}"


def number(rng: random.Random) -> str:
    year = rng.randint(2015, 2026)
    return rng.choice(
        (
            f"INV-{year}-{rng.randrange(10000):04}",
            f"RE-{rng.randrange(100000):05}",
            f"{year}/{rng.randrange(1000):03}",
            f"{rng.choice(ALNUM[:23])}{rng.randrange(10**6):06}",
            f"{rng.randrange(10**5, 10**7)}",
            f"{''.join(rng.choice(ALNUM) for _ in range(4))}-{rng.randrange(1000):03}",
        )
    )


def order_number(rng: random.Random) -> str:
    return rng.choice((f"PO-{rng.randrange(10**5):05}", f"45{rng.randrange(10**6):06}", f"B{rng.randrange(10**4):04}"))


def tax_id(rng: random.Random) -> str:
    digits = "".join(rng.choice("0123456789") for _ in range(11))
    return rng.choice(
        (f"DE{digits[:9]}", f"FR{digits}", f"ATU{digits[:8]}", f"GB{digits[:9]}", f"{digits[:2]}-{digits[2:9]}", f"IT{digits}")
    )


def sample_word(rng: random.Random) -> str:
    """Return a word as documents have them: a label, a name, a code, a number or a date."""
    money = Money(rng)
    draw = rng.choice((company, person, article, grocery, number, order_number, tax_id, lambda r: money.amount(cents(r, 1, 10**6)), label))
    return rng.choice(draw(rng).split())


def label(rng: random.Random) -> str:
    day = date(2000, 1, 1) + timedelta(days=rng.randrange(10**4))
    return rng.choice((*rng.choice(list(LABELS.values())), Day(rng).text(day), "Subtotal Total Amount Qty Price Description VAT Tax"))


def leaves(value: Any, path: str = "$") -> Iterator[tuple[str, Any]]:
    """Yield every leaf value of a record with its path; an empty array is one leaf."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    else:
        yield path, None if value == [] else value


def answer(value: Any) -> str:
    """Return a record as the model should write it: compact JSON, sums of money with two decimals."""
    return "".join(text for text, _ in pieces(value))


def pieces(value: Any, path: str = "$") -> Iterator[tuple[str, str]]:
    """Yield a record's JSON in pieces: each value with its path, and what stands between values with none."""
    if isinstance(value, dict):
        for at, (key, inner) in enumerate(value.items()):
            yield ("," if at else "{") + json.dumps(key) + ":", ""
            yield from pieces(inner, f"{path}.{key}")
        yield "}", ""
    elif isinstance(value, list):
        yield "[", ""
        for at, inner in enumerate(value):
            if at:
                yield ",", ""
            yield from pieces(inner, f"{path}[{at}]")
        yield "]", ""
    else:
        yield f"{value:.2f}" if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False), path

"""Vocabulary of the synthetic documents: draws names, articles, codes, prices and dates from a random generator.

Half of the names are made of random syllables, so that the model must read letters and cannot recall words.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

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
LABELS = {
    "invoice_number": ("Invoice No", "Invoice No.", "Invoice number", "Invoice #", "Rechnung Nr.", "No."),
    "invoice_date": ("Date", "Invoice date", "Issued", "Datum"),
    "due_date": ("Due date", "Due", "Payable by", "Pay until"),
    "purchase_order": ("PO", "PO number", "Your order", "Order no."),
    "buyer_name": ("Bill to", "Customer", "Sold to", "Client", "To"),
}


class Money:
    """A document's currency and number format."""

    def __init__(self, rng: random.Random) -> None:
        self.code = rng.choices(CODES, (30, 20, 15, 10, 7, 6, 6, 6))[0]
        self.comma = self.code in ("EUR", "PLN", "SEK") and rng.random() < 0.6
        self.thousands = rng.choice((".", "", " ") if self.comma else (",", "", "'" if self.code == "CHF" else ","))
        signs = [lambda n: f"{n} {self.code}", lambda n: f"{self.code} {n}"]
        if sign := SIGNS.get(self.code):
            signs += [lambda n: f"{sign}{n}", lambda n: f"{n} {sign}"]
        self.style: Callable[[str], str] = rng.choice(signs)

    def format_number(self, value: Decimal) -> str:
        whole, fraction = f"{value:,.2f}".split(".")
        return whole.replace(",", self.thousands) + ("," if self.comma else ".") + fraction

    def format_amount(self, value: Decimal) -> str:
        return self.style(self.format_number(value))


class Day:
    """A document's date format; numbers separated by slashes or dots are day, month, year."""

    def __init__(self, rng: random.Random) -> None:
        self.style = rng.choice(("iso", "dot", "slash", "short", "long", "us"))

    def format_day(self, day: date) -> str:
        month = MONTHS[day.month - 1]
        return {
            "iso": day.isoformat(),
            "dot": f"{day:%d.%m.%Y}",
            "slash": f"{day:%d/%m/%Y}",
            "short": f"{day.day} {month[:3]} {day.year}",
            "long": f"{day.day} {month} {day.year}",
            "us": f"{month[:3]} {day.day}, {day.year}",
        }[self.style]


def draw_maybe(rng: random.Random, chance: float, draw: Callable[[random.Random], Any]) -> Any:
    """Return a drawn value with this probability, else None: real documents lack fields."""
    return draw(rng) if rng.random() < chance else None


def draw_cents(rng: random.Random, low: int, high: int) -> Decimal:
    """Return a price of `low` to `high` cents; small ones are more frequent, some are round."""
    value = int(low * (high / low) ** rng.random())
    return Decimal(value - value % 100 if value > 100 and rng.random() < 0.15 else value) / 100


def draw_invented_name(rng: random.Random) -> str:
    """Return a capitalized name of two or three random syllables."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


def draw_company(rng: random.Random) -> str:
    first = draw_invented_name(rng) if rng.random() < 0.5 else rng.choice(SURNAMES)
    return " ".join(p for p in (first, rng.choice(TRADES) if rng.random() < 0.6 else "", rng.choice(ENDINGS)) if p)


def draw_person(rng: random.Random) -> str:
    first = (
        draw_invented_name(rng)
        if rng.random() < 0.5
        else rng.choice("Anna Ben Clara David Eva Frank Greta Hugo Ida Jonas Karin Leo Mia Nils".split())
    )
    return f"{first} {rng.choice(SURNAMES)}"


def draw_shop(rng: random.Random) -> str:
    first = draw_invented_name(rng) if rng.random() < 0.5 else rng.choice(SURNAMES)
    return f"{first} {rng.choice(SHOPS)}"


def draw_article(rng: random.Random) -> str:
    """Return a short description; some carry a type number."""
    if rng.random() < 0.15:
        return rng.choice(SERVICES)
    words = [rng.choice(QUALITIES)] if rng.random() < 0.4 else []
    words.append(draw_invented_name(rng) if rng.random() < 0.2 else rng.choice(ARTICLES))
    if len(words) == 1 and rng.random() < 0.4:
        words.append(rng.choice(ALNUM[:23]) + str(rng.randint(1, 99)))
    return " ".join(words)


def draw_grocery(rng: random.Random) -> str:
    first = draw_invented_name(rng) if rng.random() < 0.15 else rng.choice(GROCERIES)
    return first if rng.random() < 0.6 else f"{rng.choice(QUALITIES)} {first}"


def draw_number(rng: random.Random) -> str:
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


def draw_order_number(rng: random.Random) -> str:
    return rng.choice((f"PO-{rng.randrange(10**5):05}", f"45{rng.randrange(10**6):06}", f"B{rng.randrange(10**4):04}"))


def draw_tax_id(rng: random.Random) -> str:
    digits = "".join(rng.choice("0123456789") for _ in range(11))
    return rng.choice(
        (f"DE{digits[:9]}", f"FR{digits}", f"ATU{digits[:8]}", f"GB{digits[:9]}", f"{digits[:2]}-{digits[2:9]}", f"IT{digits}")
    )


def draw_word(rng: random.Random) -> str:
    """Return a random word of the kinds in documents: a label, a name, a code, a number or a date."""
    money = Money(rng)
    draw = rng.choice(
        (
            draw_company,
            draw_person,
            draw_article,
            draw_grocery,
            draw_number,
            draw_order_number,
            draw_tax_id,
            lambda r: money.format_amount(draw_cents(r, 1, 10**6)),
            draw_label,
        )
    )
    return rng.choice(draw(rng).split())


def draw_label(rng: random.Random) -> str:
    day = date(2000, 1, 1) + timedelta(days=rng.randrange(10**4))
    return rng.choice((*rng.choice(list(LABELS.values())), Day(rng).format_day(day), "Subtotal Total Amount Qty Price Description VAT Tax"))

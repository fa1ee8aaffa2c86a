"""Synthetic documents: draws an invoice or receipt from a seed, as sheets of placed text and as the record they show (the truth).

`words.py` draws names, numbers and dates, `sheets.py` places text in rows, and `drawing.py` makes a PDF page or a scan of a `Sheet`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from typing import Any, Literal

from pipeline.demo.sheets import Pen, Sheet
from pipeline.demo.words import (
    LABELS,
    SURNAMES,
    Day,
    Money,
    draw_article,
    draw_cents,
    draw_company,
    draw_grocery,
    draw_maybe,
    draw_number,
    draw_order_number,
    draw_person,
    draw_shop,
    draw_tax_id,
)

HELD_OUT = 10**9
"""Training draws seeds below this one; those of samples and evaluation start here."""
Form = Literal["invoice", "receipt"]


@dataclass(frozen=True)
class Sample:
    """A document and its truth, with the keys in the order of `schemas/{form}.json`."""

    form: Form
    sheets: tuple[Sheet, ...]
    truth: dict[str, Any]


def draw_sample(seed: int, form: Form, pages: int = 1) -> Sample:
    """Return the document of this seed; the same seed always gives the same document."""
    rng = random.Random(f"{form}/{pages}/{seed}")
    return draw_invoice(rng, pages) if form == "invoice" else draw_receipt(rng)


def draw_invoice(rng: random.Random, pages: int = 1) -> Sample:
    """Draw an invoice with its header fields, line items and totals."""
    pen, money, day = Pen(rng), Money(rng), Day(rng)
    issued = date(2015, 1, 1) + timedelta(days=rng.randrange(365 * 12))
    due = issued + timedelta(days=rng.choice((7, 10, 14, 21, 30, 45, 60)))
    truth: dict[str, Any] = {
        "seller_name": draw_company(rng),
        "seller_tax_id": draw_maybe(rng, 0.5, draw_tax_id),
        "buyer_name": draw_maybe(rng, 0.85, lambda r: draw_company(r) if r.random() < 0.6 else draw_person(r)),
        "invoice_number": draw_maybe(rng, 0.95, draw_number),
        "invoice_date": issued.isoformat(),
        "due_date": draw_maybe(rng, 0.65, lambda _: due.isoformat()),
        "purchase_order": draw_maybe(rng, 0.4, draw_order_number),
        "currency": money.code,
        "line_items": [],
    }
    printed = {"invoice_date": day.format_day(issued), "due_date": day.format_day(due)}
    write_heading(pen, truth)
    write_facts(pen, truth, printed)
    count = rng.randint(1, min(5, pen.count_free_rows() - 4)) if pages == 1 else rng.randint(5, 9)
    truth["line_items"] = [draw_invoice_item(rng) for _ in range(count)]
    write_table(pen, money, truth["line_items"], pages)
    subtotal = sum((item["amount"] for item in truth["line_items"]), Decimal(0))
    taxed = rng.random() < 0.85
    rate = rng.choice((5, 7, 8, 10, 19, 20, 21, 25))
    tax = (subtotal * rate / 100).quantize(Decimal("0.01")) if taxed else None
    truth |= {"subtotal": subtotal if taxed else None, "tax_amount": tax, "total": subtotal + (tax or 0)}
    write_totals(pen, money, truth, rate)
    return Sample("invoice", tuple(pen.sheets), truth)


def write_heading(pen: Pen, truth: dict[str, Any]) -> None:
    """Write the seller and the document's title."""
    rng, word = pen.rng, pen.rng.choice(("INVOICE", "Invoice", "Tax Invoice", "Rechnung", "FACTURE"))
    scale = rng.uniform(1.0, 1.2)
    if rng.random() < 0.25:
        pen.write(word, (pen.left_px + pen.right_px) / 2, "middle", bold=True, scale=scale)
        pen.next_row(1.1)
        word = ""
    pen.write(truth["seller_name"], pen.left_px, bold=rng.random() < 0.6, scale=scale, shows="$.seller_name")
    if word and pen.measure_text(truth["seller_name"], True, scale) + pen.measure_text(word, True) < pen.right_px - pen.left_px - 20:
        pen.write(word, pen.right_px, "right", bold=True)
    pen.next_row(1.1)
    if truth["seller_tax_id"]:
        label = rng.choice(("VAT ID", "VAT", "Tax ID", "USt-ID", "VAT no.")) + rng.choice((" ", ": "))
        pen.write(label + truth["seller_tax_id"], pen.left_px, shows="$.seller_tax_id")
        pen.next_row()


def write_facts(pen: Pen, truth: dict[str, Any], printed: dict[str, str]) -> None:
    """Write the labelled fields, the buyer included, in one of three layouts."""
    rng = pen.rng
    names = [n for n in ("invoice_number", "invoice_date", "due_date", "purchase_order") if truth[n]]
    if rng.random() < 0.3:
        rng.shuffle(names)
    if truth["buyer_name"]:
        names.insert(rng.choice((0, len(names))), "buyer_name")
    layout, colon = rng.choice(("inline", "columns", "right")), rng.choice(("", ":"))
    labels = {n: rng.choice(LABELS[n]) + colon for n in names}
    column_px = pen.left_px + max(pen.measure_text(label) for label in labels.values()) + rng.uniform(12, 40)
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


def draw_invoice_item(rng: random.Random) -> dict[str, Any]:
    """Draw one line item: description, quantity, unit price and amount."""
    quantity = rng.choice((1, 1, 2, 3, 4, 5, 6, 8, 10, 12, rng.randint(1, 60)))
    price = draw_cents(rng, 100, 40_000 if quantity > 5 else 90_000)
    return {"description": draw_article(rng), "quantity": quantity, "unit_price": price, "amount": price * quantity}


def write_table(pen: Pen, money: Money, items: list[dict[str, Any]], pages: int) -> None:
    """Write the line items under a header, on `pages` sheets."""
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
        pen.draw_rule()
    pen.next_row()
    for index, item in enumerate(items):
        if pages > 1 and (index == break_at or pen.count_free_rows() <= 1) and len(pen.sheets) < pages:
            pen.start_page()
        cells = (item["description"], str(item["quantity"]), money.format_number(item["unit_price"]), money.format_number(item["amount"]))
        row(cells, tuple(f"$.line_items[{index}].{key}" for key in item))
        pen.next_row()


def write_totals(pen: Pen, money: Money, truth: dict[str, Any], rate: int) -> None:
    """Write subtotal, tax and total, the total with its currency."""
    rng = pen.rng
    x_px = pen.left_px + (pen.right_px - pen.left_px) * rng.choice((0.0, 0.3, 0.4))
    if truth["subtotal"] is not None:
        pen.write(rng.choice(("Subtotal", "Net", "Net total")), x_px)
        pen.write(money.format_number(truth["subtotal"]), pen.right_px, "right", shows="$.subtotal")
        pen.next_row()
        pen.write(f"{rng.choice(('VAT', 'Tax', 'MwSt'))} {rate}%", x_px)
        pen.write(money.format_number(truth["tax_amount"]), pen.right_px, "right", shows="$.tax_amount")
        pen.next_row()
    bold = rng.random() < 0.6
    pen.write(rng.choice(("Total", "TOTAL", "Amount due", "To pay")), x_px, bold=bold)
    pen.write(money.format_amount(truth["total"]), pen.right_px, "right", bold=bold, shows="$.total")
    pen.next_row()


def draw_receipt(rng: random.Random) -> Sample:
    """Draw a receipt: shop, number, date, articles, total and payment method."""
    pen, money, day = Pen(rng), Money(rng), Day(rng)
    bought = date(2015, 1, 1) + timedelta(days=rng.randrange(365 * 12))
    items = [draw_receipt_item(rng) for _ in range(rng.randint(1, 6))]
    subtotal = sum((item["amount"] for item in items), Decimal(0))
    rate = rng.choice((5, 7, 10, 19, 20))
    tax = (subtotal * rate / (100 + rate)).quantize(Decimal("0.01")) if rng.random() < 0.6 else None
    truth: dict[str, Any] = {
        "merchant_name": draw_shop(rng),
        "receipt_number": draw_maybe(rng, 0.75, lambda r: str(r.randrange(10 ** r.randint(3, 6))).zfill(r.randint(3, 6))),
        "date": bought.isoformat(),
        "currency": money.code,
        "line_items": items,
        "tax_amount": tax,
        "total": subtotal,
        "payment_method": draw_maybe(rng, 0.85, lambda r: r.choice(("cash", "card", "voucher"))),
    }
    middle_px = (pen.left_px + pen.right_px) / 2
    align, x_px = rng.choice((("middle", middle_px), ("left", pen.left_px)))
    pen.write(truth["merchant_name"], x_px, align, bold=rng.random() < 0.6, scale=rng.uniform(1.0, 1.2), shows="$.merchant_name")
    pen.next_row(1.1)
    stamps = draw_receipt_stamps(rng, truth, day.format_day(bought))
    for stamp, shows in stamps:
        pen.write(stamp, x_px, align, shows=shows)
        pen.next_row()
    if rng.random() < 0.5:
        pen.draw_rule()
    write_receipt_table(pen, money, truth, rate)
    return Sample("receipt", (pen.sheets[0],), truth)


def draw_receipt_stamps(rng: random.Random, truth: dict[str, Any], printed: str) -> list[tuple[str, str]]:
    """Return the lines between the shop's name and the articles in random order, each with the path of the value it shows."""
    clock = f" {rng.randint(7, 22):02}:{rng.randrange(60):02}" if rng.random() < 0.5 else ""
    stamps = [(f"{rng.choice(('Date ', 'Date: ', ''))}{printed}{clock}", "$.date")]
    if truth["receipt_number"]:
        label = rng.choice(("Receipt", "Receipt no.", "Bon", "Ticket #", "Bill"))
        stamps.append((f"{label} {truth['receipt_number']}", "$.receipt_number"))
    if rng.random() < 0.3:
        stamps.append((f"{rng.randint(1, 250)} {rng.choice(SURNAMES)} {rng.choice(('Street', 'Road', 'Lane', 'Avenue'))}", ""))
    rng.shuffle(stamps)
    return stamps


def draw_receipt_item(rng: random.Random) -> dict[str, Any]:
    quantity = rng.choice((1, 1, 1, 1, 2, 2, 3, 4))
    return {"description": draw_grocery(rng), "quantity": quantity, "amount": draw_cents(rng, 50, 4_000) * quantity}


def write_receipt_table(pen: Pen, money: Money, truth: dict[str, Any], rate: int) -> None:
    """Write the articles, the total, the tax, the payment method and a greeting."""
    rng, style = pen.rng, pen.rng.choice(("2 x Tea", "2x Tea", "2 Tea", "Tea x2"))
    for index, item in enumerate(truth["line_items"]):
        name, count = item["description"], item["quantity"]
        spelled = {"2 x Tea": f"{count} x {name}", "2x Tea": f"{count}x {name}", "2 Tea": f"{count} {name}", "Tea x2": f"{name} x{count}"}
        pen.write(spelled[style] if count > 1 or style == "2 Tea" else name, pen.left_px, shows=f"$.line_items[{index}]")
        pen.write(money.format_number(item["amount"]), pen.right_px, "right", shows=f"$.line_items[{index}].amount")
        pen.next_row()
    bold = rng.random() < 0.6
    pen.write(rng.choice(("Total", "TOTAL", "Sum", "To pay")), pen.left_px, bold=bold)
    pen.write(money.format_amount(truth["total"]), pen.right_px, "right", bold=bold, shows="$.total")
    pen.next_row()
    if truth["tax_amount"] is not None:
        pen.write(f"{rng.choice(('incl. VAT', 'incl. tax', 'VAT'))} {rate}%", pen.left_px)
        pen.write(money.format_number(truth["tax_amount"]), pen.right_px, "right", shows="$.tax_amount")
        pen.next_row()
    if method := truth["payment_method"]:
        words = {"cash": ("CASH", "Cash", "Paid cash"), "card": ("CARD", "VISA", "Card payment"), "voucher": ("VOUCHER", "Gift voucher")}
        pen.write(rng.choice(words[method]), pen.left_px, shows="$.payment_method")
        pen.next_row()
    if rng.random() < 0.5:
        pen.write(rng.choice(("Thank you!", "Have a nice day", "Please come again")), (pen.left_px + pen.right_px) / 2, "middle")

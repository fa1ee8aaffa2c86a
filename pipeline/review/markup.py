"""HTML from values: texts come in and are escaped, finished markup goes out. What a document holds can so never become markup."""

from __future__ import annotations

import html
from collections.abc import Iterable

MAX_TEXT = 300
"""Letters of a text from a document or a server that are shown."""


class Markup(str):
    """Finished HTML: the only text that is not escaped."""

    __slots__ = ()


def make_markup(found: object) -> Markup:
    """Return a value as HTML; the parts of a list, one after the other."""
    if isinstance(found, Markup):
        return found
    if isinstance(found, list):
        return Markup("".join(make_markup(part) for part in found))
    return Markup(html.escape(show_controls(str(found))))


def make_element(name: str, *content: object, **attributes: object) -> Markup:
    """Return an element; attributes that are None are left out, `class_` is `class`, `data_tone` is `data-tone`."""
    given = {key.removesuffix("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    written = "".join(f' {key}="{make_markup(value)}"' for key, value in given.items())
    return Markup(f"<{name}{written}>{make_markup([*content])}</{name}>")


def make_list(items: Iterable[object], class_: str | None = None) -> Markup:
    return make_element("ul", *(make_element("li", item) for item in items), class_=class_)


def show_controls(text: str) -> str:
    """Return text without characters that control a screen or reverse the direction of letters; half of a surrogate pair becomes ?."""
    text = text.encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def cut_text(text: str) -> str:
    """Return the beginning of a long text."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"

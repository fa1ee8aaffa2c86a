"""Functions of rules beside those of CEL: sums within a tolerance, known currencies, check digits.

Each returns null for null, so that a rule whose result depends on a missing value is `unknown`. None of them raises an exception for a
value of the wrong kind but TypeError, which CEL reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

ROUNDING = 1e-9
"""Share of the larger number by which sums of doubles may be off: 0.1 + 0.2 is not 0.3."""
CURRENCIES = frozenset(
    "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE CHF CHW CLF CLP "
    "CNY COP COU CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR ILS INR "
    "IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK "
    "MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS "
    "SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD USN UYI UYU UYW UZS VED VES VND VUV WST XAF XCD XCG XDR "
    "XOF XPF XSU XUA YER ZAR ZMW ZWG".split()
)
"""Codes of ISO 4217 for money; not those of metals and of no currency."""


def sum_numbers(numbers: Sequence[float | None]) -> float | None:
    """Return the sum of numbers, null if one of them is null, 0 of none."""
    return None if any(number is None for number in numbers) else float(sum(number for number in numbers if number is not None))


def is_near(one: float | None, other: float | None, tolerance: float) -> bool | None:
    """Say whether two numbers are at most so far apart."""
    if one is None or other is None:
        return None
    return abs(one - other) <= tolerance + ROUNDING * max(abs(one), abs(other))


def get_absolute(number: float | None) -> float | None:
    return None if number is None else abs(number)


def is_currency(code: str | None) -> bool | None:
    """Say whether a text is a code of ISO 4217."""
    return None if code is None else code in CURRENCIES


def is_iban(text: str | None) -> bool | None:
    """Say whether an IBAN's length and check digits are right. (ISO 13616)"""
    from stdnum import iban

    return None if text is None else bool(iban.is_valid(text))


def is_vat_number(text: str | None) -> bool | None:
    """Say whether a VAT number of the EU, with its country, has the form and check digits of that country; asks no register."""
    from stdnum.eu import vat

    return None if text is None else bool(vat.is_valid(text))


def is_luhn(text: str | None) -> bool | None:
    """Say whether the last digit of a number, such as a payment card's, is its check digit. (ISO/IEC 7812)"""
    from stdnum import luhn

    return None if text is None else bool(luhn.is_valid(text.replace(" ", "").replace("-", "")))


def is_isbn(text: str | None) -> bool | None:
    """Say whether an ISBN of 10 or 13 digits has the right check digit. (ISO 2108)"""
    from stdnum import isbn

    return None if text is None else bool(isbn.is_valid(text))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sum": sum_numbers,
    "near": is_near,
    "abs": get_absolute,
    "currency": is_currency,
    "iban": is_iban,
    "vat_eu": is_vat_number,
    "luhn": is_luhn,
    "isbn": is_isbn,
}
"""The functions by their names in expressions."""

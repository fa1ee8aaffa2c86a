"""Pydantic models as a user would write them, named by jobs of tests: `tests.support.models:Invoice`."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field


class Currency(Enum):
    EUR = "EUR"
    USD = "USD"


class Address(BaseModel):
    street: str
    city: str | None = None


class Party(BaseModel):
    name: str
    tax_id: str | None = None
    address: Address | None = None


class Line(BaseModel):
    text: str
    quantity: int = 1
    amount: Decimal


class Invoice(BaseModel):
    """An invoice."""

    number: str
    issued: date
    due: date | None = None
    currency: Currency | None = None
    seller: Party
    lines: list[Line]
    total: Annotated[Decimal, Field(decimal_places=2, max_digits=12)]
    paid: Decimal | None = None


class Visit(BaseModel):
    patient: int
    start: datetime
    length: timedelta
    opens: time
    kind: Literal["first", "control"]
    outcome: Literal["done"] = "done"
    score: float
    room: int | str
    ids: set[int]
    box: tuple[int, int, int, int]
    notes: dict[str, str]
    id: UUID


class Node(BaseModel):
    label: str
    children: list[Node] = []


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    weight: float


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    others: list[Cat | Dog] = []


class Limits(BaseModel):
    share: Annotated[float, Field(ge=0, le=1)]
    count: Annotated[int, Field(gt=0, lt=10)]
    code: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    name: Annotated[str, Field(min_length=1, max_length=5)]
    tags: Annotated[list[str], Field(min_length=1, max_length=3)]
    price: Annotated[Decimal, Field(ge=0, decimal_places=3)]
    net: Annotated[Decimal, Field(gt=0)]
    file: bytes
    anything: Any = None


NOT_A_MODEL = {"type": "object"}
MODELS = [Invoice, Visit, Node, Closed, Open, Owner, Limits, Party, Line, Cat, Dog, Address]

"""Pydantic models as schemas: the name of a model, `mypackage.models:Invoice`, comes in and its checked JSON Schema goes out.

    class Invoice(BaseModel):
        number: str
        total: Annotated[Decimal, Field(decimal_places=2)]        ->  {"properties": {"number": {"type": "string"}, "total":
                                                                      {"type": "number", "multipleOf": 0.01}}, …}

The schema is pydantic's own (`model_json_schema`) but for decimals with a number of places and `NaiveDatetime`, of which pydantic's says
nothing.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from pipeline.errors import JobError
from pipeline.schema import LOCAL_DATE_TIME, Schema, check_schema, parse_json

MODEL_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


class DecimalJsonSchema(GenerateJsonSchema):
    """Pydantic's generator, which writes a `Decimal` with a number of places as a number with a step, and a `NaiveDatetime` as local."""

    def decimal_schema(self, schema: Any) -> dict[str, Any]:
        places = schema.get("decimal_places")
        if places is None:
            return super().decimal_schema(schema)
        return {"type": "number", "multipleOf": 10.0**-places, **{BOUNDS[key]: float(schema[key]) for key in BOUNDS if key in schema}}

    def datetime_schema(self, schema: Any) -> dict[str, Any]:
        found = super().datetime_schema(schema)
        return found | {"format": LOCAL_DATE_TIME} if schema.get("tz_constraint") == "naive" else found


def is_model_name(name: str) -> bool:
    """Say whether a schema's name means a class in a module and not a file."""
    return bool(MODEL_NAME.fullmatch(name))


def load_model_schema(name: str, folder: Path) -> Schema:
    """Return the schema of the model that `module:Class` names; modules are also searched in `folder`.

    Raises JobError when the module does not import, when it has no such model, and for a schema that cannot be used.
    """
    module_name, _, path = name.partition(":")
    found: Any = import_from_folder(module_name, folder, name)
    for step in path.split("."):
        if not hasattr(found, step):
            raise JobError(f"schema {name}: {module_name} has no {path}")
        found = getattr(found, step)
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise JobError(f"schema {name}: it is of type {type(found).__name__}; allowed are subclasses of pydantic.BaseModel")
    try:
        return check_schema(parse_json(json.dumps(found.model_json_schema(schema_generator=DecimalJsonSchema))))
    except Exception as error:  # any: pydantic has several classes for what it cannot express, `check_schema` raises ValueError
        raise JobError(f"schema {name}: {' '.join(str(error).split())}") from None


def import_from_folder(module: str, folder: Path, name: str) -> Any:
    """Return a module, found on the search path or in a folder. Raises JobError with what its import raises."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    except Exception as error:  # any: the module is the user's own program
        raise JobError(f"schema {name}: {module} does not import: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
    finally:
        sys.path.remove(str(folder))

"""Records to JSON and back, checked, and the JSON Schemas that describe them.

Reading goes through pydantic with the record's own type hints: unknown fields, missing fields and
values of the wrong type are refused, and nothing but plain data can come out.
"""

import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

from suanli.base.errors import ArtefactError

Record = TypeVar("Record")


def to_json(value: Any) -> Any:
    """Turn a record into what `json.dumps` takes. NaN and infinities become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{type(value).__name__} has no place in a record")


def dumps(value: Any) -> str:
    """A record as indented JSON text with a final newline."""
    return json.dumps(to_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@cache
def _adapter(record_type: Any) -> Any:
    from pydantic import TypeAdapter

    _forbid_unknown_fields(record_type)
    return TypeAdapter(record_type)


@cache
def _forbid_unknown_fields(record_type: Any) -> None:
    # pydantic takes a dataclass's settings from this attribute, nested ones from their own
    if isinstance(record_type, type) and dataclasses.is_dataclass(record_type):
        setattr(record_type, "__pydantic_config__", {"extra": "forbid"})  # noqa: B010
        for hint in get_type_hints(record_type).values():
            _forbid_unknown_fields(hint)
    for part in get_args(record_type):
        _forbid_unknown_fields(part)


def from_json(record_type: type[Record], data: Any) -> Record:
    """Build a record from parsed JSON.

    Raises:
        ArtefactError: The data is not such a record; the message names the first wrong field.
    """
    from pydantic import ValidationError

    try:
        record: Record = _adapter(cast(Any, record_type)).validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top"
        raise ArtefactError(f"not a {record_type.__name__}: {first['msg']} at {where}") from None
    except RecursionError:
        raise ArtefactError(f"not a {record_type.__name__}: nested too deep") from None
    return record


def loads(record_type: type[Record], text: str) -> Record:
    """Build a record from JSON text.

    Raises:
        ArtefactError: The text is not JSON, or not such a record.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"not JSON: {error}") from None
    return from_json(record_type, data)


def read(record_type: type[Record], path: Path) -> Record:
    """Build a record from a JSON file.

    Raises:
        ArtefactError: The file is absent, unreadable or not such a record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"cannot read {path.name}: {error}") from None
    try:
        return loads(record_type, text)
    except ArtefactError as error:
        raise ArtefactError(f"{path.name}: {error}") from None


def schema(record_type: type) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a record."""
    generated: dict[str, Any] = _adapter(record_type).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **generated}

"""The JSON Schemas in the package are those of the records."""

import pytest

from suanli.base import schema


@pytest.mark.parametrize("verb", sorted(schema.RECORDS))
def test_file_is_current(verb: str) -> None:
    kept = (schema.FOLDER / f"{verb}.json").read_text(encoding="utf-8")
    assert kept == schema.text(verb), "run `make schemas`"


@pytest.mark.parametrize("verb", sorted(schema.RECORDS))
def test_schema_is_valid(verb: str) -> None:
    import json

    import jsonschema

    jsonschema.Draft202012Validator.check_schema(json.loads(schema.text(verb)))

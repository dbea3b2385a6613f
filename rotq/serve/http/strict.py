"""What all bodies of requests have in common: types are strict, and what is not known is refused.

"1" is no number. A field that is not listed may be null, which says nothing; clients send the
newest fields of OpenAI like that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

_EMPTY: dict[str, Any] = {
    "anyOf": [
        {"type": "null"},
        {"type": "string", "maxLength": 0},
        {"type": "array", "maxItems": 0},
        {"type": "object", "additionalProperties": {"type": "null"}},
    ]
}
"""Values that say nothing, as a schema; ``says_nothing`` of ``Tolerant`` in other words."""


NULL_EXTRAS: dict[str, Any] = {"additionalProperties": {"type": "null"}}
"""Of a ``Strict`` object, in its schema: what it does not know may be there and say nothing."""


class Strict(BaseModel):
    """Converts nothing, and refuses fields that it does not list, unless they are null."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra=NULL_EXTRAS,
    )

    @classmethod
    def says_nothing(cls, value: Any) -> bool:
        """Whether a field that is not listed may have this value."""
        return value is None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = cls.model_fields
        return {
            name: value
            for name, value in given.items()
            if name in known or not cls.says_nothing(value)
        }


EMPTY_EXTRAS: dict[str, Any] = {"additionalProperties": _EMPTY}
"""Of a ``Tolerant`` object, in its schema."""


class Tolerant(Strict):
    """Takes back what others hand out: any field may also be there and empty."""

    model_config = ConfigDict(json_schema_extra=EMPTY_EXTRAS)

    @classmethod
    def says_nothing(cls, value: Any) -> bool:
        if isinstance(value, dict):
            return all(inner is None for inner in value.values())
        return value is None or value in ("", [])


@dataclass(frozen=True, eq=False)
class Only:
    """The one value that a field may have, as its validator and in its schema."""

    value: Any

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        if self.value is None:
            return {"type": "null"}
        return {**handler(schema), "const": self.value}

    def _check(self, given: Any) -> Any:
        if given != self.value:
            wanted = json.dumps(self.value)
            raise PydanticCustomError(
                "only",
                "not supported by this server but for {wanted}, which changes nothing",
                {"wanted": wanted},
            )
        return given


def _whole(given: Any) -> Any:
    """JSON has one kind of number: 16.0 is an integer."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


def _all_whole(given: Any) -> Any:
    if isinstance(given, list) and any(isinstance(item, float) for item in given):
        return [_whole(item) for item in given]
    return given


Integer = BeforeValidator(_whole)
"""On an int, behind its bounds."""
Integers = BeforeValidator(_all_whole)
"""On a list of many, where a validator of each would take long."""

Zero = Annotated[float, Only(0)]
One = Annotated[float, Only(1)]
Off = Annotated[bool, Only(False)]
On = Annotated[bool, Only(True)]
Nothing = Annotated[str, Only("")]
EmptyList = Annotated[list[Any], Only([])]
Null = Annotated[Any, Only(None)]
EmptyObject = Annotated[dict[str, Any], Only({})]

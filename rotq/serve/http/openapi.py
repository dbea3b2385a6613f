"""What the server says of itself in OpenAPI: bounds that come from the model, beside the fields.

A request that is right by this schema is one that the server answers, as long as the prompt fits
the model's context, which a schema cannot say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi


def describe_model(app: FastAPI, *, name: str, vocabulary: int, takes_nothing: bool) -> None:
    """Let ``/openapi.json`` say what of the requests depends on the model.

    Args:
        name: The model's, as clients call it.
        vocabulary: Token ids are below it.
        takes_nothing: Whether a prompt without any text has a token all the same.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for request in ("CompletionRequest", "ChatRequest"):
                made["components"]["schemas"][request]["properties"]["model"]["const"] = name
            prompt = made["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
            for part in _parts(prompt):
                _bound(part, vocabulary)
                if part.get("type") == "string" and not takes_nothing:
                    part["minLength"] = 1
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _bound(part: dict[str, Any], below: int) -> None:
    """An integer's upper bound becomes the model's."""
    if part.get("type") == "integer":
        part["exclusiveMaximum"] = below


def _parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and all inside it that values may be of."""
    yield schema
    for inner in schema.get("anyOf", ()):
        yield from _parts(inner)
    if isinstance(schema.get("items"), dict):
        yield from _parts(schema["items"])

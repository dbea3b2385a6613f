"""Requests made up from the server's own OpenAPI, right and wrong ones, over HTTP."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tiny_served import Running, byte_tokenizer, running_server, served_model

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
FUZZ = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Short texts, so that what happens to be a right request is soon answered."""
    with running_server(served_model(length=80), byte_tokenizer(), max_queue=200) as running:
        yield running
        assert running.errors == []
        assert httpx.get(running.url + "/health").status_code == 200


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """One for all: making a client takes longer than a request."""
    with httpx.Client(timeout=20) as client:
        yield client


def operations(server: Running) -> list[Any]:
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


def test_its_own_openapi(server: Running) -> None:
    statuses: dict[str, set[int]] = {}
    for operation in operations(server):
        modes = [schemathesis.GenerationMode.POSITIVE]
        if operation.method == "post":
            # nothing can be wrong about a request that has no content
            modes.append(schemathesis.GenerationMode.NEGATIVE)
        seen = statuses.setdefault(operation.path, set())
        for mode in modes:
            _run(operation.as_strategy(generation_mode=mode), server, seen)
    assert len(statuses) == 8
    assert statuses["/v1/completions"] >= {200, 400}
    assert statuses["/v1/chat/completions"] >= {200, 400}


def test_its_openapi_says_what_depends_on_the_model(server: Running) -> None:
    schemas = httpx.get(server.url + "/openapi.json").json()["components"]["schemas"]
    for request in ("CompletionRequest", "ChatRequest"):
        assert schemas[request]["properties"]["model"]["const"] == "tiny"
    text, tokens, texts, lists = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    assert tokens["items"]["exclusiveMaximum"] == lists["items"]["items"]["exclusiveMaximum"] == 258
    # byte_tokenizer begins a text with nothing
    assert text["minLength"] == texts["items"]["minLength"] == 1


def _run(strategy: Any, server: Running, seen: set[int]) -> None:
    @FUZZ
    @given(case=strategy)
    def once(case: Any) -> None:
        _shorten(case.body)
        response = case.call(base_url=server.url, timeout=20)
        seen.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    once()


def _shorten(body: Any) -> None:
    """What OpenAPI cannot say: how many tokens the context has room for."""
    if not isinstance(body, dict):
        return
    for name in ("max_tokens", "max_completion_tokens"):
        if type(body.get(name)) is int and body[name] > 8:
            body[name] = 8


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(alphabet=st.characters(codec=None), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = [
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stop",
    "stream",
    "logprobs",
    "echo",
    "seed",
    "top_k",
    "user",
    "logit_bias",
]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=4), st.binary(max_size=20))
def test_any_json_and_any_bytes(
    server: Running, http: httpx.Client, fields: dict[str, Any], noise: bytes
) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 2, **fields}).encode()
    for content in (body, noise, body[: len(body) // 2] + noise):
        response = http.post(
            server.url + "/v1/completions",
            content=content,
            headers={"content-type": "application/json"},
        )
        assert response.status_code in (200, 400)
        assert response.status_code == 200 or response.json()["error"]["message"]
        assert "Traceback" not in response.text

"""Values that change nothing are taken, from whichever server's clients; others are refused."""

from typing import Any

import jsonschema_rs
import pytest
from asking import chat, http, post, refused
from tiny_served import Running

from rotq.serve.http.schemas import ChatRequest, CompletionRequest

NEUTRAL = {
    "repetition_penalty": [1, 1.0],
    "repeat_penalty": [1.0],
    "presence_penalty": [0, 0.0],
    "frequency_penalty": [0.0],
    "length_penalty": [1.0],
    "repeat_last_n": [64, -1, 0],
    "dry_multiplier": [0.0],
    "dry_sequence_breakers": [["\n", ":"]],
    "min_p": [0, 0.0],
    "top_k": [-1, 0],
    "typical_p": [1.0],
    "tfs_z": [1],
    "xtc_probability": [0.0],
    "top_n_sigma": [-1.0, 0],
    "mirostat": [0],
    "dynatemp_range": [0.0],
    "guidance_scale": [1],
    "logit_bias": [{}, {"5": 0}],
    "bad_words": [[]],
    "use_beam_search": [False],
    "do_sample": [True],
    "num_beams": [1],
    "min_tokens": [0],
    "stop_token_ids": [[]],
    "include_stop_str_in_output": [False],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True, False],
    "return_token_ids": [False],
    "return_tokens_as_token_ids": [False],
    "include_reasoning": [True],
    "grammar": [""],
    "guided_regex": [""],
    "json_schema": [None],
    "response_format": [{"type": "text"}, None],
    "priority": [0],
    "cache_prompt": [True],
    "id_slot": [-1],
    "n_probs": [0],
    "store": [False],
    "service_tier": ["auto", "default"],
    "metadata": [{}, {"purpose": "test"}],
    "safety_identifier": ["somebody"],
    "stream_options": [None, {}, {"include_usage": False, "include_obfuscation": False}],
    "something_of_next_year": [None],
}
OTHERS = {
    "repetition_penalty": 1.1,
    "repeat_penalty": 1.2,
    "presence_penalty": 0.5,
    "dry_multiplier": 0.8,
    "min_p": 0.05,
    "top_k": -2,
    "typical_p": 0.9,
    "xtc_probability": 0.1,
    "top_n_sigma": 1.0,
    "mirostat": 2,
    "logit_bias": {"5": 1},
    "bad_words": ["no"],
    "use_beam_search": True,
    "do_sample": False,
    "min_tokens": 5,
    "stop_token_ids": [3],
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "return_token_ids": True,
    "grammar": "root ::= x",
    "json_schema": {},
    "structured_outputs": {},
    "response_format": {"type": "json_object"},
    "n_probs": 5,
    "store": True,
    "service_tier": "flex",
    "stream_options": {"include_obfuscation": True},
    "something_of_next_year": 0,
}
CHAT = {
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "modalities": [["text"]],
    "logprobs": [False],
    "top_logprobs": [0],
    "add_generation_prompt": [True],
    "continue_final_message": [False],
    "add_special_tokens": [False],
    "chat_template_kwargs": [{}],
    "documents": [[]],
    "web_search_options": [None],
}
CHAT_OTHERS = {
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "modalities": ["audio"],
    "top_logprobs": 2,
    "add_generation_prompt": False,
    "add_special_tokens": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "web_search_options": {},
}
COMPLETION = {"suffix": [""], "best_of": [1], "add_special_tokens": [True], "add_bos_token": [True]}
COMPLETION_OTHERS = {"suffix": "end", "best_of": 2, "add_special_tokens": False}

USER = [{"role": "user", "content": "hi"}]


def pairs(*tables: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for table in tables for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), pairs(NEUTRAL, COMPLETION), ids=str)
def test_completions_take_what_changes_nothing(server: Running, name: str, value: Any) -> None:
    asked = {"prompt": "x", "max_tokens": 2, "temperature": 0}
    plain = post(server, asked).json()["choices"]
    assert post(server, {**asked, name: value}).json().get("choices") == plain


@pytest.mark.parametrize(("name", "value"), [*OTHERS.items(), *COMPLETION_OTHERS.items()], ids=str)
def test_completions_refuse_what_would(server: Running, name: str, value: Any) -> None:
    refused(post(server, {"prompt": "x", "max_tokens": 2, name: value}), 400, name)


@pytest.mark.parametrize(("name", "value"), pairs(NEUTRAL, CHAT), ids=str)
def test_chats_take_what_changes_nothing(server: Running, name: str, value: Any) -> None:
    response = chat(server, messages=USER, max_tokens=2, **{name: value})
    assert response.is_success, response.text


@pytest.mark.parametrize(("name", "value"), [*OTHERS.items(), *CHAT_OTHERS.items()], ids=str)
def test_chats_refuse_what_would(server: Running, name: str, value: Any) -> None:
    refused(chat(server, messages=USER, max_tokens=2, **{name: value}), 400, name)


def test_an_integer_may_have_a_point(server: Running) -> None:
    """JSON has one kind of number, and languages that have one too write it so."""
    body = {"prompt": [5.0, 6], "max_tokens": 2.0, "seed": 1.0, "n": 1.0, "top_k": 3.0}
    found = post(server, body).json()
    assert found["usage"]["completion_tokens"] <= 2
    whole = {"prompt": [5, 6], "max_tokens": 2, "seed": 1, "n": 1, "top_k": 3}
    assert post(server, whole).json()["choices"] == found["choices"]
    for wrong in ({"max_tokens": 1.5}, {"prompt": [5, 6.5]}, {"n": True}, {"prompt": [True]}):
        refused(post(server, {"prompt": "x", **wrong}), 400)


def test_as_many_made_as_told(server: Running) -> None:
    body = {"prompt": "x", "max_tokens": 1, "best_of": 3}
    assert len(post(server, {**body, "n": 3}).json()["choices"]) == 3
    refused(post(server, {**body, "n": 2}), 400, "best_of")


def test_all_at_once(server: Running) -> None:
    """Some clients send everything that they know."""
    known = {name: values[-1] for name, values in {**NEUTRAL, **COMPLETION}.items()}
    assert post(server, {"prompt": "x", "max_tokens": 2, **known}).is_success


def test_the_schema_bounds_a_seed_by_what_is_taken(server: Running) -> None:
    """It writes bounds as floats; the very numbers have to be right requests."""
    schemas = http().get(server.url + "/openapi.json").json()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        bounds = schemas[name]["properties"]["seed"]["anyOf"][0]
        assert {"minimum", "maximum"} <= bounds.keys()
        for written in (bounds["minimum"], bounds["maximum"]):
            # as a reader of decimal numbers has it
            mantissa, exponent = repr(written).split("e+")
            digits = mantissa.replace(".", "")
            seed = int(digits) * 10 ** (int(exponent) - len(mantissa.split(".")[1]))
            body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "seed": seed}
            assert post(server, body).is_success


def test_schemas_say_what_is_taken() -> None:
    for request in (ChatRequest, CompletionRequest):
        schema = request.model_json_schema()
        assert schema["additionalProperties"] == {"type": "null"}
        assert schema["properties"]["min_p"]["anyOf"][0]["const"] == 0
        told = schema["properties"]["json_schema"]["type"]
        assert told == "null"


@pytest.mark.parametrize("role", ["user", "system", "developer", "assistant"])
def test_the_schema_says_who_must_have_said_something(role: str) -> None:
    schema = ChatRequest.model_json_schema()
    for keyword in ("properties", "required", "additionalProperties"):
        schema.pop(keyword)  # of the whole request
    is_valid = jsonschema_rs.validator_for({**schema, "$ref": "#/$defs/Message"}).is_valid
    for content in ("x", "", [{"type": "text", "text": "x"}]):
        assert is_valid({"role": role, "content": content})
    for silent in ({"role": role}, {"role": role, "content": None}, {"role": role, "content": []}):
        assert is_valid(silent) == (role == "assistant")


ANSWERS: list[dict[str, Any]] = [
    {"refusal": None},
    {"refusal": "", "annotations": []},
    # as openai's client dumps a message, and litellm's and vLLM's
    {
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "parsed": None,
    },
    {"tool_calls": [], "function_call": None, "provider_specific_fields": {"refusal": None}},
    {"reasoning": None, "reasoning_content": None, "tool_calls": [], "name": None},
]


@pytest.mark.parametrize("extras", ANSWERS, ids=str)
def test_answers_are_taken_back(server: Running, extras: dict[str, Any]) -> None:
    first = chat(server, messages=USER, max_tokens=3).json()["choices"][0]["message"]
    messages = [*USER, {**first, **extras}, {"role": "user", "content": "more", "name": None}]
    second = chat(server, messages=messages, max_tokens=3, temperature=0)
    assert second.is_success, second.text
    plain = [*USER, {"role": "assistant", "content": first["content"]}, messages[-1]]
    assert (
        second.json()["choices"]
        == chat(server, messages=plain, max_tokens=3, temperature=0).json()["choices"]
    )


@pytest.mark.parametrize(
    "extras",
    [
        {"refusal": "I will not"},
        {"tool_calls": [{"id": "1", "type": "function"}]},
        {"function_call": {"name": "f", "arguments": "{}"}},
        {"audio": {"id": "a"}},
    ],
    ids=str,
)
def test_what_an_answer_would_say_is_refused(server: Running, extras: dict[str, Any]) -> None:
    messages = [*USER, {"role": "assistant", "content": "a", **extras}, *USER]
    refused(chat(server, messages=messages), 400, f"messages.1.{next(iter(extras))}")


@pytest.mark.parametrize("content", [None, []])
def test_only_an_assistant_may_have_said_nothing(server: Running, content: Any) -> None:
    answer = {"role": "assistant", "content": content}
    assert chat(server, messages=[*USER, answer, *USER], max_tokens=1).is_success
    assert chat(server, messages=[*USER, {"role": "assistant"}, *USER], max_tokens=1).is_success
    for role in ("user", "system"):
        said = [{"role": role, "content": content}, *USER]
        refused(chat(server, messages=said), 400, "messages.0.content", role)
    refused(chat(server, messages=[{"role": "user"}]), 400, "messages.0.content")
    assert chat(server, messages=[{"role": "user", "content": ""}], max_tokens=1).is_success


def test_parts_may_have_empty_fields(server: Running) -> None:
    part = {"type": "text", "text": "hi", "annotations": [], "cache_control": None}
    assert chat(server, messages=[{"role": "user", "content": [part]}], max_tokens=1).is_success
    wrong = [{"role": "user", "content": [part, {**part, "more": 1}]}]
    refused(chat(server, messages=wrong), 400, "messages.0.content.1.more is not supported")

"""Records of JSON: on lines, in a list, alone; and what is wrong with them."""

import json

import pytest

from rotq.calibration.records import json_texts, looks_like_json_lines
from rotq.errors import RotqError

RECORDS = [{"text": "one", "id": 1}, {"text": "two\u2028lines\r\n"}, {"text": ""}]
TEXTS = ["one", "two\u2028lines\r\n", ""]


@pytest.mark.parametrize("ascii", [True, False])
def test_lines_lists_and_single_records(ascii: bool) -> None:
    def dump(value: object, **options: object) -> str:
        return json.dumps(value, ensure_ascii=ascii, **options)

    assert json_texts("f", "\n".join(map(dump, RECORDS))) == TEXTS
    assert json_texts("f", "\n \n".join(map(dump, RECORDS)) + "\n\n") == TEXTS
    assert json_texts("f", dump(RECORDS)) == TEXTS
    assert json_texts("f", dump(RECORDS, indent=2)) == TEXTS
    assert json_texts("f", dump(RECORDS[0], indent=2)) == ["one"]
    assert json_texts("f", "") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('\n{"text": "a"}\n{"text": "b', "text f, line 3: not JSON: Unterminated string"),
        ('[{"text": "a"},\n {"text": 5}]', 'text f, record 2: no string field "text"'),
        ('{"text": "a"}\n{"text": null}', 'text f, line 2: no string field "text"'),
        ('{"data": [{"text": "a"}]}', 'text f, line 1: no string field "text"'),
        ('["a"]', 'text f, record 1: no string field "text"'),
        ('{"text": "a"}\n' + "[" * 100_000, "text f, line 2: not JSON: maximum recursion depth"),
        ('{"text": "a"}\n{"n": ' + "1" * 5000 + "}", "text f, line 2: not JSON: Exceeds the limit"),
    ],
)
def test_wrong_records_are_named_with_their_place(content: str, message: str) -> None:
    with pytest.raises(RotqError, match=message):
        json_texts("f", content)


@pytest.mark.parametrize(
    ("content", "place", "half"),
    [
        (r'{"text": "a \ud83d b"}', "line 1", "d83d"),
        ('\n\n{"text": "' + r"\ude00" + '"}', "line 3", "de00"),
        ('{"text": "a"}\n{"text": "' + r"\ude00\ud83d" + '"}', "line 2", "de00"),
        (r'[{"text": "a"}, {"text": "\ud83dx"}]', "record 2", "d83d"),
    ],
)
def test_half_a_character_is_refused(content: str, place: str, half: str) -> None:
    with pytest.raises(RotqError, match=rf"text f, {place}: half a character, \\u{half}"):
        json_texts("f", content)


def test_both_halves_are_a_character() -> None:
    assert json_texts("f", r'{"text": "\ud83d\ude00"}') == ["😀"]


def test_what_looks_like_json_lines() -> None:
    assert looks_like_json_lines('\n {"text": "a"}\nmore')
    for other in ("", "text", '{"body": "a"}', '{"text": 5}', "{not json}", "{" * 100_000):
        assert not looks_like_json_lines(other)


CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def test_messages_are_kept_as_a_chat_and_text_comes_first() -> None:
    lines = [{"messages": CHAT}, {"text": "a", "messages": CHAT}]
    assert json_texts("f", json.dumps(lines)) == [tuple(CHAT), "a"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", 'line 1: "messages" is no list of messages'),
        ([], 'line 1: "messages" is no list of messages'),
        (["hi"], 'line 1, message 1: no string field "role"'),
        ([*CHAT, {"content": "x"}], 'line 1, message 3: no string field "role"'),
        ([{"role": "user", "content": "\ud83d"}], "line 1, message 1: half a character"),
    ],
)
def test_messages_that_are_none(messages: object, message: str) -> None:
    with pytest.raises(RotqError, match=message):
        json_texts("f", json.dumps({"messages": messages}))

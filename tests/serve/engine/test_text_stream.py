"""Text as it comes: characters and stop strings that straddle tokens."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotq.serve.engine.generation import joined
from rotq.serve.engine.sampling import Picked
from rotq.serve.engine.text_stream import Piece, TextStream, finished


def from_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def pushed(text: str, *stops: str) -> tuple[list[str], TextStream, Piece]:
    """The pieces of a text whose tokens are its bytes, up to where it stopped."""
    stream = TextStream(from_bytes, stops)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(Picked(token=byte)))
        if stream.stopped:
            break
    else:
        pieces.append(stream.finish())
    return [piece.text for piece in pieces], stream, joined(pieces)


def test_a_character_comes_whole() -> None:
    assert pushed("a\u00e9b")[0] == ["a", "", "\u00e9", "b", ""]
    assert pushed("\U0001f600")[0] == ["", "", "", "\U0001f600", ""]


def test_bytes_that_are_no_character_are_let_go() -> None:
    stream = TextStream(from_bytes)
    texts = [stream.push(Picked(token=0x80)).text for _ in range(8)]
    assert "".join(texts) != ""
    stream = TextStream(from_bytes)
    assert stream.push(Picked(token=0xC3)).text == ""
    assert stream.finish().text == "\ufffd"


def test_a_stop_string_that_straddles_tokens() -> None:
    texts, stream, _ = pushed("one STOP two", "STOP")
    assert "".join(texts) == "one "
    assert stream.stopped
    assert texts[-4:] == ["", "", "", ""]


def test_what_only_looks_like_a_stop_string_is_held_back_and_then_sent() -> None:
    texts, stream, _ = pushed("STOStart", "STOP")
    assert texts[:4] == ["", "", "", "STO"]
    assert "".join(texts) == "STOStart"
    assert not stream.stopped


def test_the_end_sends_what_was_held_back() -> None:
    assert pushed("one STO", "STOP")[0][-1] == "STO"


def test_the_first_of_several_stops_ends_the_text() -> None:
    assert "".join(pushed("abcd", "cd", "bcd")[0]) == "a"
    assert "".join(pushed("aXbY", "Y", "X")[0]) == "a"


def test_a_stop_inside_one_token() -> None:
    words = ["hello ", "wor|ld", "more"]
    stream = TextStream(lambda ids: "".join(words[i] for i in ids), ["|"])
    assert stream.push(Picked(token=0)).text == "hello "
    piece = stream.push(Picked(token=1))
    assert (piece.text, stream.stopped) == ("wor", True)
    assert [item.token for item in piece.picked] == [1]


def test_tokens_come_with_their_text_and_not_beyond_a_stop() -> None:
    _, _, whole = pushed("ab\u00e9STOP", "STOP")
    assert bytes(item.token for item in whole.picked).decode() == "ab\u00e9"
    assert whole.offsets == (0, 1, 2, 2)


def test_the_context_decides_how_the_first_token_reads() -> None:
    def words(ids: Sequence[int]) -> str:
        return " ".join("abc"[i] for i in ids)

    assert TextStream(words, context=[0]).push(Picked(token=1)).text == " b"
    assert TextStream(words).push(Picked(token=1)).text == "b"


PEPPER = "a\U0001f336b".encode()


@pytest.mark.parametrize("owed", [False, True])
@pytest.mark.parametrize("end", [2, 3, 4])
def test_a_character_that_the_context_began_is_completed(end: int, owed: bool) -> None:
    stream = TextStream(from_bytes, context=PEPPER[:end], owed=owed)
    pieces = [stream.push(Picked(token=byte)) for byte in PEPPER[end:]]
    assert joined([*pieces, stream.finish()]).text == "\U0001f336b"
    assert [offset for piece in pieces for offset in piece.offsets] == [*[0] * (5 - end), 1]


def test_a_character_that_nobody_completes_is_the_contexts() -> None:
    """It has been shown with the context, unless the context's text is left out of it."""
    for context in (PEPPER[:3], "a\ufffd".encode()):
        for owed, wanted in ((False, "xy"), (True, "\ufffdxy")):
            stream = TextStream(from_bytes, context=context, owed=owed)
            texts = [stream.push(Picked(token=byte)).text for byte in b"xy"]
            assert "".join(texts) + stream.finish().text == wanted
    assert TextStream(from_bytes, context=PEPPER[:3]).finish().text == ""
    assert TextStream(from_bytes, context=PEPPER[:3], owed=True).finish().text == "\ufffd"


def test_a_stop_string_ends_in_the_character_that_the_context_began() -> None:
    stream = TextStream(from_bytes, ["\U0001f336"], context=PEPPER[:3])
    texts = [stream.push(Picked(token=byte)).text for byte in PEPPER[3:5]]
    assert (texts, stream.stopped) == (["", ""], True)


@pytest.mark.parametrize(
    ("text", "end"), [(b"", 0), (b"ab", 2), (b"a\xf0\x9f", 1), (b"\xf0\x9f\x8c", 0)]
)
def test_finished(text: bytes, end: int) -> None:
    assert finished(from_bytes, text) == end
    # bytes that are no character at all
    assert finished(from_bytes, text + b"\x80" * 9) == len(text) + 9


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="ab\u00e9\U0001f600", max_size=20),
    st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=3), max_size=3),
)
def test_any_text_is_what_it_is_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    texts, stream, whole = pushed(text, *stops)
    ends = [text.find(stop) for stop in stops if stop in text]
    # the stop that is complete first ends the text; of those that are complete together, the first
    complete = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    if complete is None:
        assert "".join(texts) == text
        assert bytes(item.token for item in whole.picked) == text.encode()
    else:
        start = min(
            at
            for stop, at in zip([s for s in stops if s in text], ends, strict=True)
            if at + len(stop) <= complete
        )
        assert "".join(texts) == text[:start]
    assert stream.stopped == (complete is not None)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_long_texts_do_not_get_slower(size: int) -> None:
    """The decoder is only asked about the last few tokens."""
    asked: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        asked.append(len(ids))
        return "x" * size * len(ids)

    stream = TextStream(decode)
    for _ in range(200):
        stream.push(Picked(token=0))
    assert max(asked) <= 2

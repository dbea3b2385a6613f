"""What encodes: texts with offsets, and conversations as their template wants them."""

from typing import Any

import pytest
from odd_tokenizers import templated_tokenizer
from tiny_served import TEMPLATE, byte_tokenizer

from rotq.serve.http.encoding import Encoder, Refused, answer

PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %}"
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
STRINGS = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
REFUSES_STRINGS = (
    "{% for m in messages %}{% if m.content is string %}{{ raise_exception('parts, please') }}"
    "{% endif %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
)
MIXED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' %}{% for p in m.content %}"
    "{{ p.text }}{% endfor %}{% else %}{{ '' + m.content }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
)


def conversed(template: str, *messages: tuple[str, list[str]], longest: int = 10**6) -> str:
    """What a conversation reads like, as the model gets it."""
    tokenizer = templated_tokenizer(template)
    given = [{"role": role, "texts": texts} for role, texts in messages]
    found = Encoder(tokenizer).converse(given, longest=longest)
    return str(tokenizer.decode(found["ids"]))


TALK = (("system", ["Be short."]), ("user", ["a ", "b"]), ("assistant", ["c"]), ("user", ["d"]))


@pytest.mark.parametrize(
    "template", [PARTS, EITHER, STRINGS, REFUSES_STRINGS, MIXED], ids=lambda text: text[-40:]
)
def test_no_word_is_lost(template: str) -> None:
    """Whether users send a string or parts: what a template wants, it gets."""
    assert conversed(template, *TALK) == "<system>Be short.<user>a b<assistant>c<user>d"


def test_a_template_of_one_part() -> None:
    assert conversed(FIRST_PART, ("user", ["hi"])) == "<user>hi"


def test_an_answer_without_text() -> None:
    for template in (PARTS, STRINGS):
        assert conversed(template, ("user", ["a"]), ("assistant", []), ("user", ["b"])) == (
            "<user>a<assistant><user>b"
        )


def test_a_role_that_is_refused_is_refused_in_the_templates_words() -> None:
    with pytest.raises(Refused, match="refuses these messages: no system"):
        conversed(NO_SYSTEM, *TALK)
    assert conversed(NO_SYSTEM, *TALK[1:]) == "<user>a b<assistant>c<user>d"


def test_each_role_is_tried_once() -> None:
    encoder = Encoder(templated_tokenizer(PARTS))
    rendered: list[Any] = []
    template = encoder._template
    render = template.render
    template.render = lambda messages: rendered.append(messages) or render(messages)  # type: ignore
    message = [{"role": "user", "texts": ["hi"]}]
    encoder.converse(message, longest=100)
    tried = len(rendered)
    assert tried == 3
    encoder.converse(message, longest=100)
    assert len(rendered) == tried + 1


def test_what_a_template_makes_too_long_is_only_measured() -> None:
    encoder = Encoder(templated_tokenizer("{{ messages[0].content * 1000 }}"))
    found = encoder.converse([{"role": "user", "texts": ["hi"]}], longest=500)
    assert found == {"characters": 2000}


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{% for x in 5 %}{% endfor %}", "{{ f() }}"],
)
def test_any_error_of_a_template_is_its_own(template: str) -> None:
    job = {
        "call": "converse",
        "given": {"messages": [{"role": "user", "texts": ["a"]}], "longest": 9},
    }
    found = answer(Encoder(templated_tokenizer(template)), job)
    assert found["refused"].startswith("the model's chat template refuses these messages: ")


def test_truncation_and_padding_of_the_file_are_lifted() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    found = Encoder(tokenizer).encode("hello", special=True, offsets=True)
    assert found["offsets"] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert len(found["ids"]) == 5


def test_the_plain_template_still_gets_strings() -> None:
    assert conversed(TEMPLATE, ("user", ["a", "b"])) == "<user>ab\n<assistant>"

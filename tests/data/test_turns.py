"""What chat templates write around turns, as tokens."""

from __future__ import annotations

import pytest

from deadhead.data.turns import turns_of
from tests.small_runs import framed_tokenizer

_LOOP = "{% for m in messages %}%s{% endfor %}"
_CHATML = "{{ '<cls>' + m.role + '\n' + m.content + '<end>\n' }}"


def _with(template: str | None, frame: str = "none") -> tuple[str, ...] | None:
    tokenizer = framed_tokenizer(frame)
    tokenizer.chat_template = template
    found = turns_of(tokenizer)
    return None if found is None else tuple(tokenizer.decode(list(part)) for part in found)


@pytest.mark.parametrize("frame", ["none", "bos"])
def test_the_templates_text_between_turns(frame: str) -> None:
    # What the tokenizer puts before each text is not said twice.
    begins = "<bos>" if frame == "bos" else ""
    found = _with(begins + "<cls>system\nBe kind.<end>\n" + _LOOP.replace("%s", _CHATML), frame)
    assert found == (
        "<cls>system\nBe kind.<end>\n<cls>user\n",
        "<end>\n<cls>assistant\n",
        "<end>\n<cls>user\n",
    )


def test_turns_that_end_without_a_token_are_left_to_the_model() -> None:
    plain = "{% if m.role == 'user' %}[Q] {{ m.content }} [A]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    assert _with(_LOOP.replace("%s", plain)) == ("[Q] ", "", "<end>[Q] ")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "nothing of what was said",
        _LOOP.replace("%s", "{{ m.content[:3] }}"),
    ],
)
def test_without_a_template_that_writes_what_was_said(template: str | None) -> None:
    assert _with(template) is None


def test_a_template_of_single_questions() -> None:
    single = "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}Q: {{ messages[0].content }}<end>"
    assert _with(single) == ("Q: ", "", "")

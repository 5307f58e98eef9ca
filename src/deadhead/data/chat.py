"""Conversations as text, by a chat template, and the positions of the answers in the text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from deadhead.data.tools import tools_of, with_mappings
from deadhead.errors import InputError, first_line

Spans = tuple[tuple[int, int], ...]
_ANSWERS = "assistant"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Written(NamedTuple):
    """A conversation as text, and the character ranges of its answers, if they were asked for."""

    text: str
    answers: Spans | None


class _Talk(NamedTuple):
    """Data of a conversation besides its messages."""

    label: str
    tools: list[Any] | None


class Chat:
    """Writes conversations by a chat template.

    If the template also writes what a tokenizer puts before every text, such as BOS, it is left out, because every row
    begins with it anyway.

    Args:
        template: the chat template, in Jinja.
        special: the special tokens, by their names in templates, such as `eos_token`.
        begin: what the tokenizer puts before a text.
        answers: whether to return the ranges of the answers.
        tool_template: the template of conversations with tools, if it is another one.
    """

    def __init__(
        self,
        template: str,
        special: Mapping[str, Any],
        *,
        begin: str = "",
        answers: bool = False,
        tool_template: str | None = None,
    ) -> None:
        self.answers = answers
        self._template = template
        self._tool_template = tool_template or template
        self._special = dict(special)
        self._begin = begin

    def write(self, messages: Sequence[Any], label: str, tools: Any = None) -> Written:
        """Return a conversation as text.

        Args:
            messages: mappings with a role, a content, and tool calls, if any, whose arguments may be JSON text.
            label: name of the conversation in errors.
            tools: a list of descriptions of the tools that may be called, or such a list as JSON text.

        Raises:
            InputError: `messages` is not a list of messages, the template does not accept it or does not allow answers
                to be told apart, or the tools are not a list.
        """
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InputError(
                    f"Messages with a role and a content were expected in {label}, but got {str(message)[:60]!r}."
                )
        # Where messages have other fields than their neighbours, data sets say that these are null.
        plain = [{name: value for name, value in message.items() if value is not None} for message in messages]
        talk = _Talk(label, tools_of(tools, label))
        # Templates write arguments as JSON themselves, as transformers asks them to; those that do not, join texts.
        mapped = [with_mappings(message) for message in plain]
        try:
            return self._written(mapped, talk)
        except InputError:
            if mapped == plain:
                raise
        return self._written(plain, talk)

    def ask(self, prompt: str) -> str:
        """Return a conversation of one prompt as text, up to the beginning of its answer.

        Raises:
            InputError: the template does not accept the prompt.
        """
        text = self._render([{"role": "user", "content": prompt}], _Talk("a prompt", None), add_generation_prompt=True)
        return text.removeprefix(self._begin)

    def _written(self, messages: list[dict[str, Any]], talk: _Talk) -> Written:
        text = self._render(messages, talk)
        answers = self._answers(messages, text, talk) if self.answers else None
        if self._begin and text.startswith(self._begin):
            size = len(self._begin)
            text = text[size:]
            answers = answers and tuple((max(0, start - size), stop - size) for start, stop in answers)
        return Written(text, answers)

    def _answers(self, messages: list[dict[str, Any]], text: str, talk: _Talk) -> Spans:
        if _GENERATION.search(self._template_for(talk)) and (marked := self._marked(messages, talk)):
            return marked
        found: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] == _ANSWERS:
                before = self._render(messages[:index], talk, add_generation_prompt=True) if index else ""
                after = self._render(messages[: index + 1], talk)
                if not (text.startswith(before) and text.startswith(after) and len(before) <= len(after)):
                    raise InputError(
                        f"The chat template writes the beginning of {talk.label} otherwise than within the whole, so "
                        "its answers cannot be told apart; mark them in the template with {% generation %}, or leave "
                        "answers_only out."
                    )
                found.append((len(before), len(after)))
        return tuple(found)

    def _marked(self, messages: list[dict[str, Any]], talk: _Talk) -> Spans:
        """Return the ranges that the template itself marks as generated."""
        spans = self._called(messages, talk, return_assistant_tokens_mask=True)[1][0]
        return tuple((start, stop) for start, stop in spans)

    def _render(self, messages: list[dict[str, Any]], talk: _Talk, **how: bool) -> str:
        return str(self._called(messages, talk, **how)[0][0])

    def _template_for(self, talk: _Talk) -> str:
        return self._template if talk.tools is None else self._tool_template

    def _called(self, messages: list[dict[str, Any]], talk: _Talk, **how: Any) -> Any:
        template = self._template_for(talk)
        try:
            return render_jinja_template([messages], tools=talk.tools, chat_template=template, **how, **self._special)
        except Exception as error:  # what Jinja, and whatever a template calls, may raise
            raise InputError(
                f"A conversation that the chat template takes was expected in {talk.label}, but it says: "
                f"{first_line(error)[:120]}."
            ) from error

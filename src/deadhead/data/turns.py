"""The tokens that a chat template writes around the turns of a conversation, for a model that continues them."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from deadhead.data.chat import Chat
from deadhead.data.encoders import Encoder, text_frame
from deadhead.data.tokens import chat_of
from deadhead.errors import InputError

Ids = tuple[int, ...]
# Contents that no template writes of itself, and that it cannot strip anything from.
_MARKS = ("QUESTIONxJ7", "ANSWERxJ7", "AGAINxJ7")


class Turns(NamedTuple):
    """The tokens around turns.

    Attributes:
        begin: tokens before the first question, including the template's own system prompt, but without those that the
            tokenizer puts before every text.
        answer: tokens between a question and its answer, if the first is a special token.
        again: tokens between an answer and the next question, if the first is a special token.
    """

    begin: Ids
    answer: Ids
    again: Ids


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """Return the tokens that a chat template writes around turns; None without a template for a single question."""
    chat = chat_of(tokenizer, None, answers=False)
    if chat is None:
        return None
    encoder = Encoder(tokenizer, is_chat=True)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def ids(text: str) -> Ids:
        return tuple(map(int, encoder([text])[0])) if text else ()

    def between(text: str) -> Ids:
        found = ids(text)
        # A model that ends a turn without a token of its own is left to go on as it does.
        return found if found and found[0] in special else ()

    alone = _parts(chat, 1)
    if alone is None:
        return None
    whole = _parts(chat, 3)
    begin, prefix = ids(alone[0]), text_frame(tokenizer)[0]
    if prefix and begin[: len(prefix)] == prefix:
        begin = begin[len(prefix) :]
    return Turns(begin, *((between(whole[1]), between(whole[2])) if whole else ((), ())))


def _parts(chat: Chat, count: int) -> list[str] | None:
    """Return what a template writes before, between and after a number of turns; None if it does not write them."""
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)][:count]
    try:
        rest = chat.write(messages, "a conversation").text
    except InputError:
        return None
    parts = []
    for message in messages:
        before, mark, rest = rest.partition(message["content"])
        if not mark:
            return None
        parts.append(before)
    return [*parts, rest]

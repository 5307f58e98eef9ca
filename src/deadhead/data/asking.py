"""Prompts as tokens for a model to reply to: by the tokenizer's chat template, or as the beginning of a text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from deadhead.data.encoders import Encoder, text_frame
from deadhead.data.tokens import chat_of


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the ids of each prompt, up to the beginning of its reply.

    With a chat template, a prompt is a message of the user, followed by the beginning of the answer's turn; without one
    it is plain text. Both begin as the tokenizer begins a text; if the template writes that beginning too, it is not
    repeated.

    Raises:
        InputError: the template does not accept a prompt.
    """
    chat = chat_of(tokenizer, None, answers=False)
    texts = list(prompts) if chat is None else [chat.ask(prompt) for prompt in prompts]
    begin = text_frame(tokenizer)[0]
    return [(*begin, *map(int, ids)) for ids in Encoder(tokenizer, is_chat=chat is not None)(texts)]


def reads_alike(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, texts: Sequence[str]) -> bool:
    """Return whether two tokenizers give the same tokens for some texts; what they put around a text is ignored."""
    pairs = zip(Encoder(one)(texts), Encoder(other)(texts), strict=True)
    return all(ours.tolist() == theirs.tolist() for ours, theirs in pairs)

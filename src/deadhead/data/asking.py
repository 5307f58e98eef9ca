"""Prompts as the tokens that a model replies to: by the tokenizer's chat template, or as a text begins."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from deadhead.data.encoders import Encoder, text_frame
from deadhead.data.tokens import chat_of


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the ids of each prompt, up to where its reply begins.

    With a chat template a prompt is what the user says, and the answer's turn has begun; else it is plain text. Both
    begin as the tokenizer begins a text, once where the template writes that too.

    Raises:
        InputError: the template does not take a prompt.
    """
    chat = chat_of(tokenizer, None, answers=False)
    texts = list(prompts) if chat is None else [chat.ask(prompt) for prompt in prompts]
    begin = text_frame(tokenizer)[0]
    return [(*begin, *map(int, ids)) for ids in Encoder(tokenizer, is_chat=chat is not None)(texts)]


def reads_alike(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, texts: Sequence[str]) -> bool:
    """Tell whether two tokenizers make the same tokens of some texts; what they put around a text is no matter."""
    pairs = zip(Encoder(one)(texts), Encoder(other)(texts), strict=True)
    return all(ours.tolist() == theirs.tolist() for ours, theirs in pairs)

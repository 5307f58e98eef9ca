"""What models reply to prompts, how much they repeat themselves, and how near they are to a reference model.

Every reply is greedy: each token is the most likely one, and the model's own generation settings have no effect. How
near a model is to a reference is measured on the reference's replies rather than its own, so that one early difference
counts once (`measure/likeness.py`).

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.data.asking import prompt_tokens, reads_alike
from deadhead.errors import InputError, typed, typed_but
from deadhead.layouts.refusals import require_weights
from deadhead.measure.evaluation import require_known
from deadhead.measure.generate import plain_generation
from deadhead.measure.greedy import Told, Writer, ends_of, groups_of
from deadhead.measure.likeness import Likeness, likeness
from deadhead.measure.losses import require_language_model
from deadhead.measure.positions import max_positions, require_positions
from deadhead.measure.prompts import PROMPTS
from deadhead.models.all_attention.adaptive import AdaptiveSoftmax
from deadhead.modes import evaluating

_GRAM = 4
# A prompt that leaves room for fewer tokens is left out.
_LEAST = 8
# Rows whose replies are written, or compared, side by side.
_ROWS, _COMPARED = 25, 8


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A model's reply to a prompt.

    Args:
        asked: the prompt.
        prompt: the prompt's tokens, with those that the chat template and the tokenizer add.
        tokens: the reply's tokens, with the token that ends it if the model wrote one.
        text: the reply, without special tokens.
    """

    asked: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class Replies:
    """A model's replies, and what was measured on them.

    Args:
        replies: the replies, in the order of the prompts.
        repetition: the share of repeated 4-grams (see `repetition`).
        likeness: how near the model is to the first model, on the first model's replies. None for the first model, and
            for models with other tokens.
    """

    replies: tuple[Reply, ...]
    repetition: float
    likeness: Likeness | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens of all replies."""
        return sum(len(reply.tokens) for reply in self.replies)

    @property
    def values(self) -> dict[str, float | int]:
        """The measurements as plain JSON values: `repetition`, the `count` of replies and of their `tokens`.

        If there is a likeness, its `divergence` and `agreement` are added.
        """
        found: dict[str, float | int] = {"repetition": self.repetition}
        found |= {"count": len(self.replies), "tokens": self.tokens}
        if self.likeness is not None:
            found |= {"divergence": self.likeness.divergence, "agreement": self.likeness.agreement}
        return found

    @property
    def said(self) -> str:
        """The measurements, in words."""
        near = ""
        if self.likeness is not None:
            near = (
                f"; on the reference's replies KL {self.likeness.divergence:.4f} nats a token, "
                f"{self.likeness.agreement:.1%} the same token"
            )
        count = f"{len(self.replies)} repl{'y' if len(self.replies) == 1 else 'ies'}"
        return f"repetition {self.repetition:.1%} in {count} of {self.tokens:,} tokens{near}"


@typed
def compare_replies(
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    *,
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = 200,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Replies]:
    """Let models reply to the same prompts, and compare each with the first model on the first model's replies.

    Args:
        models: models by name; the first is the reference.
        tokenizers: each model's tokenizer, by the same names.
        prompts: the prompts.
        max_new_tokens: the most tokens of a reply. If a model has too few positions for a prompt with such a reply, the
            reply is as long as it can be; prompts that leave no room for 8 tokens are left out.
        progress: called with a description of the present work, how much of it is done and how much there is.

    Returns:
        Each model's replies, by name.

    Raises:
        InputError: `write_replies` or `likeness` refuses a model.
    """
    if not models or models.keys() != tokenizers.keys():
        raise InputError("Models by name were expected, and a tokenizer for each; give both mappings the same names.")
    first, *others = models
    # The same room for all, so that no model repeats itself more because it may write more.
    known = [most for model in models.values() if (most := max_positions(model)) is not None]
    written = {
        name: write_replies(
            model,
            tokenizers[name],
            prompts,
            max_new_tokens=max_new_tokens,
            positions=min(known, default=None),
            progress=lambda done, total, name=name: progress(f"{name}: replies", done, total),  # type: ignore[misc]
        )
        for name, model in models.items()
    }
    found = {name: replies_of(replies) for name, replies in written.items()}
    for name in others:
        sizes = {models[each].config.get_text_config().vocab_size for each in (first, name)}
        if len(sizes) > 1 or not reads_alike(tokenizers[first], tokenizers[name], prompts):
            continue
        like = reply_likeness(
            models[name],
            models[first],
            written[first],
            progress=lambda done, total, name=name: progress(f"{name}: comparing", done, total),  # type: ignore[misc]
        )
        found[name] = replies_of(written[name], like)
    return found


def replies_of(replies: Sequence[Reply], like: Likeness | None = None) -> Replies:
    """Return a model's replies with their measurements, given a comparison with another model if there is one."""
    return Replies(replies=tuple(replies), repetition=repetition(replies), likeness=like)


@typed
def write_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 200,
    positions: int | None = None,
    batch_size: int = _ROWS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Reply, ...]:
    """Let a model reply to prompts, greedily, each up to a token that ends a text.

    A prompt goes through the tokenizer's chat template if it has one. Rows are padded on the left if a trial shows that
    padding does not change the model's outputs; otherwise only prompts of one length run together. Afterwards the model
    is as it was.

    Args:
        model: a language model.
        tokenizer: the model's tokenizer.
        prompts: the prompts.
        max_new_tokens: the most tokens of a reply.
        positions: the most tokens of a prompt with its reply; by default the model's positions. Replies are shorter if
            they must be, and prompts that leave no room for 8 tokens (or `max_new_tokens`) are left out.
        batch_size: the most rows side by side.
        progress: called with the tokens of a row done and to do, over all batches.

    Raises:
        InputError: no prompt leaves room for a reply, a number is below 1, or a prompt has tokens that the model does
            not have.
        UnsupportedModel: the model does not predict the next token.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, but is {value}.")
    limit = min(filter(None, (positions, max_positions(model))), default=None)
    asked = _askable(model, tokenizer, prompts, limit, max_new_tokens)
    ids = [prompt for _, prompt in asked]
    ends = ends_of(model, tokenizer)
    vocabulary = model.config.get_text_config().vocab_size
    # Any token will do: padding is masked, and removed after the end of a reply.
    pad = next((one for one in (tokenizer.pad_token_id, *ends) if one is not None and one < vocabulary), 0)
    writer = Writer(model, ends, pad)
    with torch.inference_mode(), evaluating(model), plain_generation(model):
        padded = writer.is_indifferent_to_padding(ids)
        rooms = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt)) for prompt in ids]
        groups = list(groups_of([len(prompt) for prompt in ids], rooms, max_new_tokens, batch_size, padded=padded))
        total, done = sum(rooms[group[0]] for group in groups), 0
        replies: dict[int, tuple[int, ...]] = {}
        for group in groups:
            room = rooms[group[0]]
            told = Told(lambda new, done=done: progress(done + new, total))  # type: ignore[misc]
            replies |= zip(group, writer.write([ids[index] for index in group], room, told), strict=True)
            done += room
            progress(done, total)
    return tuple(
        Reply(
            asked=text,
            prompt=prompt,
            tokens=replies[index],
            text=str(tokenizer.decode(list(replies[index]), skip_special_tokens=True)).strip(),
        )
        for index, (text, prompt) in enumerate(asked)
    )


@typed
def require_replies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check, before a long run, that a model can reply to the prompts and be compared with another model.

    Raises:
        InputError: no prompt leaves room for a reply, a prompt cannot be used, or the softmax is adaptive.
        UnsupportedModel: the model does not predict the next token.
    """
    _askable(model, tokenizer, PROMPTS, max_positions(model), _LEAST)
    if isinstance(model.get_output_embeddings(), AdaptiveSoftmax):
        raise InputError(
            "Replies are compared by whole distributions, which an adaptive softmax does not compute; leave them out."
        )


def _askable(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], limit: int | None, new: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the prompts that a model can reply to, with their tokens; prompts that cannot be used are refused."""
    require_language_model(model, "Replying")
    require_weights(model, "Replying")
    asked = _fitting(list(zip(prompts, prompt_tokens(tokenizer, prompts), strict=True)), limit, new)
    require_known(model, max(max(prompt) for _, prompt in asked), of="prompt")
    return asked


@typed_but("model", "reference")
def reply_likeness(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    replies: Sequence[Reply],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Likeness:
    """Compare what two models predict for each token of replies, after the prompt and the true reply before it.

    Only the replies' tokens count, including those that end a reply.

    Args:
        model: a language model.
        reference: the model that wrote the replies, with the same vocabulary; afterwards it is on its device again.
        replies: the replies, in tokens that both models share.
        progress: called with the number of batches done and to do.

    Raises:
        InputError: `likeness` refuses the models, or a prompt with its reply is longer than a model's positions.
    """
    rows = sorted(replies, key=lambda reply: len(reply.prompt) + len(reply.tokens))
    if rows:
        for each in (model, reference):
            require_positions(each, len(rows[-1].prompt) + len(rows[-1].tokens), of="A prompt with its reply")
    batches = [_forced(rows[start : start + _COMPARED]) for start in range(0, len(rows), _COMPARED)]
    home = reference.device
    try:
        return likeness(model, reference, batches, progress=lambda done: progress(done, len(batches)))
    finally:
        reference.to(home)  # type: ignore[arg-type]


def repetition(replies: Sequence[Reply]) -> float:
    """Return the share of all replies' 4-grams of tokens that occurred earlier in the same reply.

    It is 0 if no reply repeats itself, and near 1 if a reply only repeats one token. The 4-grams of all replies are
    counted together, so long replies weigh more; a reply of fewer than four tokens has none.
    """
    repeated, total = 0, 0
    for reply in replies:
        grams = [reply.tokens[start : start + _GRAM] for start in range(len(reply.tokens) - _GRAM + 1)]
        repeated, total = repeated + len(grams) - len(set(grams)), total + len(grams)
    return repeated / max(total, 1)


def _fitting(
    asked: list[tuple[str, tuple[int, ...]]], limit: int | None, new: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the prompts that leave room for a reply, with their tokens."""
    if not asked:
        raise InputError("A prompt to reply to was expected, but there is none.")
    least = min(_LEAST, new)
    fitting = [one for one in asked if one[1] and (limit is None or len(one[1]) + least <= limit)]
    if not fitting:
        shortest = min(len(prompt) for _, prompt in asked)
        raise InputError(
            f"Prompts with room for a reply of {least} tokens were expected, but the shortest has {shortest} tokens "
            f"and the model {limit} positions; replies need a model with more."
            if limit is not None
            else "A prompt of at least one token was expected, but all are empty."
        )
    return fitting


def _forced(rows: Sequence[Reply]) -> dict[str, Tensor]:
    """Return a batch, (B, T), of prompts with their replies, for models with segment memory and without.

    Padding comes last, where no token before it sees it.
    """
    width = max(len(row.prompt) + len(row.tokens) for row in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    scored_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        stop = len(row.prompt) + len(row.tokens)
        ids_BT[index, :stop] = torch.tensor((*row.prompt, *row.tokens))
        scored_BT[index, len(row.prompt) : stop] = True
    labels_BT = ids_BT.masked_fill(~scored_BT, -100).roll(-1, dims=1)
    labels_BT[:, -1] = -100
    is_first = torch.ones(len(rows), dtype=torch.bool)
    return {"input_ids": ids_BT, "scored": scored_BT, "labels": labels_BT, "is_first": is_first}

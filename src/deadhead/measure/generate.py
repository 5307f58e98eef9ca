"""Continuing a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from deadhead.data.encoders import text_frame
from deadhead.errors import InputError
from deadhead.measure.evaluation import require_known
from deadhead.measure.losses import require_language_model
from deadhead.measure.positions import require_positions


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Return `prompt` and its continuation. Temperature 0 takes the most likely token; higher is more varied.

    Raises:
        InputError: the prompt is empty or has tokens that the model doesn't have, a number is out of range, or the
            model has too few positions.
    """
    require_language_model(model, "Continuing a text")
    own = tokenizer(prompt, add_special_tokens=False).input_ids
    # Only what the tokenizer puts before a text: what it puts after one would end the text here.
    ids = torch.tensor([[*text_frame(tokenizer)[0], *own]], dtype=torch.int64)
    if not own:
        raise InputError("A prompt of at least one token was expected, but it is empty.")
    require_known(model, int(ids.max()), of="prompt")
    if not (temperature == 0 or 1e-3 <= temperature <= 1e3):
        raise InputError(f"The temperature must be 0 or lie between 0.001 and 1000, but it is {temperature}.")
    if max_new_tokens < 1:
        raise InputError(f"At least one new token is needed, but got {max_new_tokens}.")
    require_positions(model, ids.shape[1] + max_new_tokens, of="The prompt with the new tokens")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or 0,
            **sampling,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Make a model generate without its own settings (stop tokens, penalties, filters) while the block runs."""
    before = model.generation_config
    try:
        # Settings that a call does not give are taken from here.
        model.generation_config = GenerationConfig()
        yield
    finally:
        model.generation_config = before

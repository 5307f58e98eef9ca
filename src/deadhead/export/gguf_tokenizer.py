"""A byte-level BPE tokenizer of Hugging Face in the form that llama.cpp reads."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from deadhead.errors import InputError

# llama.cpp has the splitting of text into words compiled in, by name. What each name stands for in a tokenizer.json:
# the pattern that words match, or None where ByteLevel splits by its own.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS = {None: "gpt-2", _LLAMA_3: "llama-bpe", _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
# Bytes that no text in UTF-8 has. llama.cpp wants one merge at least, and ByteLevel writes them as this character.
_IMPOSSIBLE_MERGE = "ÿ ÿ"

TEXTS = (
    "The quick brown fox doesn't jump over 12345 lazy dogs.",
    "def prune(self, heads: list[int]) -> None:\n    return {'kept': [i for i in heads if i > 3]}\n\n\n",
    "  spaces   and\ttabs, 3.14159, naïve café — 日本語 русский עברית 🌻🌻",
    "ALL'S WELL; I'LL go.\r\nNext    line",
)
"""Texts that both tokenizers must give the same tokens."""


def read_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
    """Read a fast tokenizer of a model with V tokens, which may be more than the tokenizer has.

    Returns:
        what goes into a file, by the names of the writer's methods without "add_".

    Raises:
        InputError: it is no byte-level BPE tokenizer, it splits text in a way that llama.cpp does not have, or it has
            more tokens than the model.
    """
    kind = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise _refusal(f"{kind} has no tokenizer.json")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    decoder = backend.get("decoder") or {}
    if model["type"] != "BPE" or model.get("byte_fallback") or decoder.get("type") != "ByteLevel":
        raise _refusal(f"this one is of type {model['type']}")
    if backend.get("normalizer") not in (None, {"type": "NFC"}):
        raise _refusal("this one changes the text before it is split")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    # Without merges every byte is a token, wherever a word ends.
    split = _split_of(backend.get("pre_tokenizer")) if merges else "gpt-2"
    texts, types = zip(*_tokens(backend, vocab_size), strict=True)
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
    first: Any = tokenizer("a").input_ids[:1]
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": split,
        "token_list": list(texts),
        "token_types": list(types),
        "token_merges": merges or [_IMPOSSIBLE_MERGE],
        "add_bos_token": special["bos"] is not None and first == [special["bos"]],
        "add_eos_token": False,
        **{f"{name}_token_id": token for name, token in special.items() if token is not None},
        **({"chat_template": template} if isinstance(template, str) else {}),
    }


def _tokens(backend: dict[str, Any], vocab_size: int) -> list[tuple[str, int]]:
    """Return text and llama.cpp's type of every token that the model has, in the order of their ids."""
    tokens: dict[int, tuple[str, int]] = {token: (text, 1) for text, token in backend["model"]["vocab"].items()}
    for added in backend["added_tokens"]:
        tokens[added["id"]] = (added["content"], 3 if added["special"] else 4)
    if max(tokens) >= vocab_size:
        raise InputError(
            f"The tokenizer has token {max(tokens)}, but the model's vocabulary ends at {vocab_size - 1}; give the "
            "tokenizer the model was trained with."
        )
    return [tokens.get(token, (f"[UNUSED_{token}]", 5)) for token in range(vocab_size)]


def _refusal(reason: str) -> InputError:
    return InputError(
        f"llama.cpp is given byte-level BPE tokenizers only, and {reason}; export without a tokenizer (--no-tokenizer) "
        "and give the runtime token ids."
    )


def _split_of(pre_tokenizer: dict[str, Any] | None) -> str:
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise _refusal("this one splits text in a way that llama.cpp does not have")
    pattern: str | None = None
    if kinds == ["Split", "ByteLevel"] and not steps[-1]["use_regex"]:
        pattern = steps[0]["pattern"].get("Regex", "")
    elif kinds != ["ByteLevel"] or not steps[0]["use_regex"]:
        pattern = ""
    if pattern not in _SPLITS:
        raise _refusal("this one splits text into words by a pattern that llama.cpp does not have")
    return _SPLITS[pattern]

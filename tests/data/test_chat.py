"""Conversations go through a chat template, and answers can be told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from deadhead.data import load_text
from deadhead.data.chat import Chat
from deadhead.errors import InputError
from tests.small_runs import framed_tokenizer

datasets = pytest.importorskip("datasets")

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
WITH_BOS = "{{ bos_token }}" + PLAIN
ANSWERS = [f"Größe {index}!" for index in range(9)]
SHAPES: dict[str, Any] = {
    "messages": [
        {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": a}]}
        for i, a in enumerate(ANSWERS)
    ],
    "strings": [{"prompt": f"ask {i}", "completion": a} for i, a in enumerate(ANSWERS)],
    "lists": [
        {
            "prompt": [{"role": "user", "content": f"ask {i}"}],
            "completion": [{"role": "assistant", "content": a}],
        }
        for i, a in enumerate(ANSWERS)
    ],
}


CALLS = (
    "{% if tools %}{{ tools|tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments|tojson }}{% else %}{{ m.content }}"
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def quiet_and_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def write(folder: Path, rows: list[dict[str, Any]], template: str | None = PLAIN) -> tuple[str, Path]:
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if template is not None:
        (folder / "t.jinja").write_text(template + "\n")
    return str(folder / "chat.jsonl"), folder / "t.jinja"


@pytest.mark.parametrize("shape", SHAPES)
def test_conversations_are_written_by_the_template(shape: str, tmp_path: Path) -> None:
    source, template = write(tmp_path, SHAPES[shape])
    text, tokenizer = load_text(source, chat_template=template)
    documents = tokenizer.decode(text.splits["train"].tokens).split("[user]")[1:]
    # The end of the last message ends the document too.
    chosen = [i for i in range(9) if i not in (4, 8)]
    assert documents == [f"ask {i}<eos>[assistant]{ANSWERS[i]}<eos>" for i in chosen]
    assert [len(text.splits[name].tokens) > 0 for name in ("valid", "test")] == [True, True]
    assert text.splits["train"].tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.chat_template == PLAIN + "\n"


@pytest.mark.parametrize("template", [PLAIN, MARKED, WITH_BOS])
@pytest.mark.parametrize("kind", ["byte", "bpe", "bos", "none"])
def test_answers_are_told_apart(kind: str, template: str, tmp_path: Path) -> None:
    source, file = write(tmp_path, SHAPES["messages"], template)
    given: Any = kind if kind in ("byte", "bpe") else framed_tokenizer(kind)
    text, tokenizer = load_text(
        source, tokenizer=given, vocab_size=280 if kind == "bpe" else None, chat_template=file, answers_only=True
    )
    train = text.splits["train"]
    assert train.scored is not None and len(train.scored) == len(train.tokens)
    found = tokenizer.decode(train.tokens[np.asarray(train.scored)])
    chosen = [ANSWERS[i] for i in range(9) if i not in (4, 8)]
    assert found == "".join(f"{answer}{tokenizer.eos_token}" for answer in chosen)
    assert train.num_bytes == len(found.encode())
    assert train.num_words == 2 * len(chosen)


def test_a_tokenizers_own_template_is_taken_and_stays_its_own(tmp_path: Path) -> None:
    tokenizer = framed_tokenizer("bos")
    tokenizer.chat_template = PLAIN
    source, file = write(tmp_path, SHAPES["messages"], MARKED)
    own, same = load_text(source, tokenizer=tokenizer)
    assert same is tokenizer
    other, changed = load_text(source, tokenizer=tokenizer, chat_template=file)
    assert (tokenizer.chat_template, changed.chat_template) == (PLAIN, MARKED + "\n")
    assert own.splits["train"].tokens.tolist() == other.splits["train"].tokens.tolist()
    tokenizer.chat_template = {"default": PLAIN, "tool_use": "nothing"}
    assert load_text(source, tokenizer=tokenizer)[0].sha256 == own.sha256


def test_rows_have_one_bos_whether_the_template_writes_it_or_not(tmp_path: Path) -> None:
    source, file = write(tmp_path, SHAPES["messages"], WITH_BOS)
    framed, tokenizer = load_text(source, tokenizer=framed_tokenizer("bos"), chat_template=file)
    assert framed.splits["train"].prefix == (tokenizer.bos_token_id,)
    assert tokenizer.bos_token_id not in framed.splits["train"].tokens
    # A tokenizer that adds none leaves it to the template.
    bare, tokenizer = load_text(source, tokenizer=framed_tokenizer("none"), chat_template=file)
    assert bare.splits["train"].prefix == ()
    assert int((bare.splits["train"].tokens == tokenizer.bos_token_id).sum()) == 7


def test_fields_that_other_messages_have_are_not_there(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}]}] * 4
    source, file = write(tmp_path, rows, "{% for m in messages %}{{ 'name' in m }} {% endfor %}")
    text, tokenizer = load_text(source, chat_template=file)
    assert tokenizer.decode(text.splits["train"].tokens).startswith("False True ")


def _calling(index: int, *, texts: bool = False) -> dict[str, Any]:
    """Return a conversation that calls a tool, of which each has arguments of its own, as JSON text if asked for."""
    arguments: dict[str, Any] = {"city": "Ulm"} if index % 2 else {"a": 1}
    parameters = {"properties": {name: {"type": "any"} for name in arguments}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    call = {"function": {"name": "f", "arguments": json.dumps(arguments) if texts else arguments}}
    messages = [
        {"role": "user", "content": f"ask {index}"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "12"},
        {"role": "assistant", "content": f"it is {index}"},
    ]
    return {"messages": messages, "tools": json.dumps([tool]) if texts else [tool]}


def _called(index: int) -> tuple[str, str]:
    """Return what `CALLS` writes of such a conversation, and the answers in it."""
    row = _calling(index)
    call, answer = f"f{json.dumps(row['messages'][1]['tool_calls'][0]['function']['arguments'])}<eos>", f"it is {index}"
    said = f"[user]ask {index}<eos>[assistant]{call}[tool]12<eos>[assistant]{answer}<eos>"
    return json.dumps(row["tools"]) + said, f"{call}{answer}<eos>"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "texts", "prompts"])
def test_tools_and_their_calls_are_written_by_the_template(kind: str, tmp_path: Path) -> None:
    """What a row has not is not there, though a table has it as null; arguments come as JSON text too."""
    rows = [_calling(index, texts=kind == "texts") for index in range(9)]
    if kind == "prompts":
        split = [(row.pop("messages"), row) for row in rows]
        rows = [{"prompt": said[:-1], "completion": said[-1:], **row} for said, row in split]
    source, file = write(tmp_path, rows, CALLS)
    if kind == "parquet":
        source = str(tmp_path / "chat.parquet")
        datasets.Dataset.from_list(rows).to_parquet(source)
    text, tokenizer = load_text(source, chat_template=file, answers_only=True)
    train = text.splits["train"]
    said, answers = ("".join(parts) for parts in zip(_called(0), _called(1), strict=True))
    assert tokenizer.decode(train.tokens).startswith(said)
    assert tokenizer.decode(train.tokens[np.asarray(train.scored)]).startswith(answers)


def test_a_null_argument_stays_and_a_row_may_have_no_tools(tmp_path: Path) -> None:
    rows = [_calling(index) for index in range(4)]
    rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["a"] = None
    rows[0]["tools"] = None
    source, file = write(tmp_path, rows, CALLS)
    text, tokenizer = load_text(source, chat_template=file)
    assert tokenizer.decode(text.splits["train"].tokens).startswith('[user]ask 0<eos>[assistant]f{"a": null}<eos>')


def test_a_template_that_joins_arguments_to_text_gets_them_as_they_came() -> None:
    chat = Chat("{{ 'call ' + messages[0].tool_calls[0].function.arguments }}", {})
    message = _calling(1, texts=True)["messages"][1]
    assert chat.write([message], "it").text == 'call {"city": "Ulm"}'


def test_the_template_for_tools_is_taken_where_there_are_some(tmp_path: Path) -> None:
    tokenizer = framed_tokenizer("none")
    tokenizer.chat_template = {"default": PLAIN, "tool_use": "{{ tools[0].function.name }} it was"}
    text, _ = load_text(write(tmp_path, [_calling(0)] * 4, None)[0], tokenizer=tokenizer)
    assert tokenizer.decode(text.splits["train"].tokens).startswith("f it was")


@pytest.mark.parametrize(
    ("rows", "template", "how", "message"),
    [
        (SHAPES["messages"], None, {}, r"holds conversations \(messages\), but the tokenizer has no chat template"),
        (SHAPES["strings"], None, {}, r"holds conversations \(prompt, completion\), but .*--chat-template FILE"),
        ([{"messages": [{"from": "a", "value": "b"}]}], PLAIN, {}, "with a role and a content were expected in row 0"),
        (
            [{"messages": 5}, {"messages": [{"role": "user", "content": "a"}]}],
            PLAIN,
            {},
            "column messages of .* values of several types",
        ),
        (
            [{"messages": "hi"}, {"messages": [{"role": "user"}]}],
            PLAIN,
            {},
            "column messages of .* values of several types",
        ),
        (SHAPES["messages"], "{{ raise_exception('no roles here') }}", {}, "but it says: no roles here"),
        (SHAPES["messages"], "{% for %}", {}, "but it says: "),
        (SHAPES["messages"], "{{ messages|length }}{{ messages }}", {"answers_only": True}, "cannot be told apart"),
        (
            [{"messages": [{"role": "user", "content": "a"}], "tools": "[{"}],
            PLAIN,
            {},
            r"A list of tools was expected in row 0 .*, but got '\[\{'",
        ),
        ([{"text": "a"}], PLAIN, {}, "chat_template is for conversations"),
        ([{"text": "a"}], None, {"answers_only": True}, "answers_only is for conversations"),
        (SHAPES["messages"], PLAIN, {"text_column": "texts"}, "of messages named texts was expected"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(
    rows: list[dict[str, Any]], template: str | None, how: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source, file = write(tmp_path, rows, template)
    with pytest.raises(InputError, match=message) as caught:
        load_text(source, chat_template=None if template is None else file, **how)
    assert len(str(caught.value)) <= 300 + len(str(tmp_path))


def test_another_column_may_hold_the_messages(tmp_path: Path) -> None:
    rows = [{"id": "x", "text": "not this", "talk": row["messages"]} for row in SHAPES["messages"]]
    source, file = write(tmp_path, rows)
    text, tokenizer = load_text(source, chat_template=file, text_column="talk")
    assert tokenizer.decode(text.splits["train"].tokens).startswith("[user]ask 0<eos>")


def test_data_sets_have_conversations_too(tmp_path: Path) -> None:
    _, file = write(tmp_path, SHAPES["messages"])
    datasets.Dataset.from_list(SHAPES["messages"]).save_to_disk(str(tmp_path / "set"))
    text, tokenizer = load_text(f"hf:{tmp_path / 'set'}", chat_template=file, answers_only=True)
    assert text.sha256 == load_text(str(tmp_path / "chat.jsonl"), chat_template=file, answers_only=True)[0].sha256
    train = text.splits["train"]
    assert train.scored is not None
    assert tokenizer.decode(train.tokens[train.scored]).startswith("Größe 0!<eos>")


def test_what_begins_a_text_is_left_out_of_spans() -> None:
    chat = Chat("<s>{{ messages[0].content }}", {}, begin="<s>", answers=True)
    assert chat.write([{"role": "assistant", "content": "abc"}], "it") == ("abc", ((0, 3),))


def test_a_slow_tokenizer_cannot_tell_answers_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deadhead.data.encoders._backend", lambda tokenizer: None)
    source, file = write(tmp_path, SHAPES["messages"])
    tokenizer: PreTrainedTokenizerFast = framed_tokenizer("none")
    with pytest.raises(InputError, match="needs a fast tokenizer"):
        load_text(source, tokenizer=tokenizer, chat_template=file, answers_only=True)

"""EleutherAI's lm-eval loads a cut checkpoint by its `hf` model and scores a task of local files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deadhead
from deadhead import HeadPlan
from deadhead.data import load_text
from tests.small_runs import FRAMES, framed_tokenizer, prose, save_small_llama, write_prose

pytestmark = pytest.mark.slow

pytest.importorskip("lm_eval")

_QUESTIONS = [
    {"question": "the cat", "choices": [" sleeps", " dog", " near"], "answer": 0},
    {"question": "a small bird", "choices": [" sees", " over", " and then"], "answer": 2},
    {"question": "the old", "choices": [" red dog", " cat"], "answer": 1},
]
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
# Where deadhead is not to be had, the checkpoint's own code is trusted and run.
_WITHOUT = "import sys; sys.modules['deadhead'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
_WITH = "import deadhead; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


def _checkpoint(folder: Path) -> tuple[Any, Any]:
    """Save a cut Llama with a byte tokenizer, its first layer empty."""
    model, tokenizer = save_small_llama(folder / "dense", write_prose(folder))
    plan = HeadPlan(kept={0: (), 1: (1,), 2: (0, 1)}, total={0: 2, 1: 2, 2: 2}, unit="kv_group")
    deadhead.cut(model, plan)
    deadhead.save(model, folder / "small", tokenizer=tokenizer)
    return model, tokenizer


def _log_likelihood(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    """Return log p(choice | question), written down without lm-eval."""
    start, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, question + choice))
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    return sum(float(log_p[index - 1, ids[index]]) for index in range(len(start), len(ids)))


@pytest.mark.parametrize("how", ["with deadhead", "without deadhead"])
def test_scores_are_the_models_own(how: str, tmp_path: Path) -> None:
    model, tokenizer = _checkpoint(tmp_path)
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(line) for line in _QUESTIONS) + "\n")
    (tmp_path / "tasks").mkdir()
    task = _TASK.format(name="birds", data=tmp_path / "questions.jsonl")
    (tmp_path / "tasks" / "birds.yaml").write_text(task)
    trusted = "" if how == "with deadhead" else ",trust_remote_code=True"
    command = [sys.executable, "-c", _WITH if how == "with deadhead" else _WITHOUT]
    command += ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'small'},dtype=float32{trusted}"]
    command += ["--tasks", "birds", "--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--batch_size", "2"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    (samples,) = (tmp_path / "out").rglob("samples_birds*.jsonl")
    lines = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    assert len(lines) == len(_QUESTIONS)
    best: list[bool] = []
    for line, question in zip(lines, _QUESTIONS, strict=True):
        found = [float(answer[0][0]) for answer in line["resps"]]
        expected = [_log_likelihood(model, tokenizer, question["question"], text) for text in question["choices"]]
        assert found == pytest.approx(expected, rel=1e-4)
        best.append(expected.index(max(expected)) == question["answer"])
    (results,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["birds"]["acc,none"] == pytest.approx(sum(best) / len(best))


_PERPLEXITY = {
    "task": "prose",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
}


@pytest.mark.parametrize("frame", FRAMES)
def test_perplexity_is_that_of_its_perplexity_task(frame: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins every text with BOS, or with the end of a text, but then has a tokenizer add no BOS of its own."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = prose(100).strip()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text(prose(400, seed=1))
    (tmp_path / "text" / "test.txt").write_text(text)
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": text}))
    tokenizer = framed_tokenizer(frame)
    model, _ = save_small_llama(tmp_path / "dense", tmp_path, tokenizer)
    stream = load_text(str(tmp_path / "text"), tokenizer=tokenizer)[0].splits["test"]
    prefix = stream.prefix or (tokenizer.eos_token_id,)
    found = deadhead.evaluate(model, replace(stream, prefix=prefix))
    assert found.prefix == prefix
    assert (found.tokens, found.rows) == (len(text.encode()), 1)
    as_ours: Any = {"tokenizer": tokenizer, "add_bos_token": False, "prefix_token_id": prefix[0]}
    lm = HFLM(pretrained=model, **as_ours, device="cpu", batch_size=1)
    task = {**_PERPLEXITY, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}}}
    results = simple_evaluate(lm, tasks=[task], bootstrap_iters=0)["results"]["prose"]
    assert found.bits_per_byte == pytest.approx(results["bits_per_byte,none"], rel=1e-4)
    assert found.word_perplexity == pytest.approx(results["word_perplexity,none"], rel=1e-3)
    assert found.perplexity == pytest.approx(results["byte_perplexity,none"], rel=1e-4)

"""Every Auto class that takes a dense model's configuration takes that of the cut one, and gives its class of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

import deadhead
from deadhead.layouts import find_layout
from deadhead.models.pruned.modeling_pruned import stock_class
from tests.layouts.test_classes import made

# For each type a class that has all its weights, or most.
KINDS = {
    "bert": "BertForPreTraining",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "distilbert": "DistilBertForMaskedLM",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    # Language models by themselves can be had of these.
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
}
_SCRIPT = """
import json, sys
sys.modules["deadhead"] = None  # importing it raises ImportError
import transformers
transformers.logging.set_verbosity_error()
found = {}
for path, autos in json.loads(sys.argv[1]).items():
    for auto in autos:
        model = getattr(transformers, auto).from_pretrained(path, trust_remote_code=True, local_files_only=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        found[f"{path} {auto}"] = type(model).__name__
print(json.dumps(found))
"""


def auto_classes(config: Any) -> Iterator[tuple[str, type]]:
    """Yield the Auto classes that take a configuration, by name, with the class that each has for it."""
    for name, auto in vars(modeling_auto).items():
        table = getattr(auto, "_model_mapping", None)
        # A decision head's files are not there, without which it refuses dense models too.
        is_head = name.startswith("AutoModel") and name != "AutoModelForDecision"
        if is_head and table is not None and type(config) in table:
            yield name, table[type(config)]


def cut_unevenly(name: str, folder: Path) -> Any:
    """Save a model of a class, cut so that its layers differ, and return its dense configuration."""
    model = made(name)
    plan = deadhead.attach(model).plan()
    deadhead.detach(model)
    config, first = model.config, next(iter(plan.kept))
    kept = {**plan.kept, first: plan.kept[first][1:]}
    deadhead.save(deadhead.cut(model, deadhead.HeadPlan(kept=kept, total=plan.total, unit=plan.unit)), folder)
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_auto_classes_take_the_cut_model(kind: str, tmp_path: Path) -> None:
    config = cut_unevenly(KINDS[kind], tmp_path)
    assert config.model_type == kind
    expected = dict(auto_classes(config))
    assert "AutoModel" in expected and len(expected) >= 3
    found = {name: type(getattr(transformers, name).from_pretrained(tmp_path)) for name in expected}
    assert {name: stock_class(cut) for name, cut in found.items()} == expected
    assert all(cut.__name__.startswith("Deadhead") for cut in found.values())


@pytest.mark.slow
def test_auto_classes_take_it_where_deadhead_is_not(tmp_path: Path) -> None:
    asked, expected = {}, {}
    for kind, name in KINDS.items():
        found = dict(auto_classes(cut_unevenly(name, tmp_path / kind)))
        asked[str(tmp_path / kind)] = [*found]
        expected |= {f"{tmp_path / kind} {auto}": f"Deadhead{stock.__name__}" for auto, stock in found.items()}
    environment = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-c", _SCRIPT, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


# How the card says that a model of a class is loaded: the first Auto class that has it for its type.
NAMED = {
    "BertModel": "AutoModel",
    "BertForPreTraining": "AutoModelForPreTraining",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "BertLMHeadModel": "AutoModelForCausalLM",
    "BertForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
    "BertForTokenClassification": "AutoModelForTokenClassification",
    "BertForQuestionAnswering": "AutoModelForQuestionAnswering",
    "BertForMultipleChoice": "AutoModelForMultipleChoice",
    "GPT2Model": "AutoModel",
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "GPT2ForSequenceClassification": "AutoModelForSequenceClassification",
    "GPT2ForTokenClassification": "AutoModelForTokenClassification",
    "GPT2ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "LlamaForTokenClassification": "AutoModelForTokenClassification",
    "Qwen2ForSequenceClassification": "AutoModelForSequenceClassification",
    "DistilBertForMultipleChoice": "AutoModelForMultipleChoice",
    "LlavaModel": "AutoModel",
    "LlavaForConditionalGeneration": "AutoModelForImageTextToText",
    "Qwen2VLForConditionalGeneration": "AutoModelForImageTextToText",
}


@pytest.mark.parametrize("name", NAMED)
def test_the_card_names_the_auto_class_that_gives_the_model_back(name: str, tmp_path: Path) -> None:
    cut_unevenly(name, tmp_path)
    auto = NAMED[name]
    card = (tmp_path / "README.md").read_text()
    assert f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("PATH", trust_remote_code=True)' in card
    model = getattr(transformers, auto).from_pretrained(tmp_path)
    assert type(model).__name__ == f"Deadhead{name}" and type(deadhead.load(tmp_path)) is type(model)


def test_the_text_model_of_a_larger_one_is_cut_as_that_is(tmp_path: Path) -> None:
    for name, counts in {"ours": (2, 1), "stock": (1, 1)}.items():
        model = made(KINDS["qwen3_5"])
        plan = deadhead.attach(model).plan()
        deadhead.detach(model)
        kept = {layer: heads[:count] for (layer, heads), count in zip(plan.kept.items(), counts, strict=True)}
        plan = deadhead.HeadPlan(kept=kept, total=plan.total, unit=plan.unit)
        deadhead.save(deadhead.cut(model, plan), tmp_path / name)
        text: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        stock = transformers.Qwen3_5ForCausalLM
        assert stock_class(type(text)) is stock and (type(text) is stock) == (name == "stock")
        ids = torch.arange(3, 15)[None]
        assert torch.equal(text(input_ids=ids).logits, model(input_ids=ids).logits)
        assert find_layout(text).recorded_plan(text) == plan
        deadhead.save(text, tmp_path / f"{name} text")
        again = deadhead.load(tmp_path / f"{name} text")
        assert type(again) is type(text) and torch.equal(again(input_ids=ids).logits, text(input_ids=ids).logits)


def test_a_class_that_no_auto_class_has_is_loaded_by_deadhead(tmp_path: Path) -> None:
    cut_unevenly("GPT2DoubleHeadsModel", tmp_path)
    assert 'import deadhead\n\nmodel = deadhead.load("PATH")\n' in (tmp_path / "README.md").read_text()
    assert type(deadhead.load(tmp_path)).__name__ == "DeadheadGPT2DoubleHeadsModel"

"""One phase on its own, `deadhead.prune` and `deadhead.finetune`: models and texts in every form, and what comes back.

What it refuses to go on with is here too; kills are in tests/cli/test_commands.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import deadhead
from benchmarks._tiny_models import VOCABULARY, tiny_model
from deadhead import InputError
from deadhead.checkpoints import checkpoint
from deadhead.cli import execute
from deadhead.data import load_text
from deadhead.disk.files import write_json
from deadhead.disk.reading import read_json
from deadhead.errors import UnsupportedModel
from deadhead.measure.last_states import few_tokens
from deadhead.training import PhaseRecipe, PruneRecipe
from deadhead.training.recipes.reading import changed
from deadhead.training.recipes.recipe import DataRecipe
from deadhead.training.runs import pruning
from deadhead.training.runs.inputs import teacher_of
from deadhead.training.runs.options import Options
from deadhead.training.runs.single import run_single
from tests.small_runs import (
    FRAMES,
    assert_same_tensors,
    framed_tokenizer,
    save_small_llama,
    save_small_model,
    stream,
    weights,
    write_prose,
)

_PHASE = PhaseRecipe(steps=2, batch_size=2)
_STEPS: dict[str, Any] = {"steps": 3, "batch_size": 2, "sequence_length": 24}


def test_pruned_and_recovered(place: Path, tmp_path: Path) -> None:
    text = str(place / "prose.txt")
    pruned = deadhead.prune(place / "llama", text, params=0.8, distill=0.5, out=tmp_path / "out", **_STEPS)
    assert pruned.measured is not None and pruned.budget is not None
    assert pruned.costs.after.parameters <= 0.8 * pruned.costs.before.parameters
    assert pruned.budget["reached"] == pruned.costs.after.parameters / pruned.costs.before.parameters
    assert pruned.measured.before.perplexity != pruned.measured.after.perplexity
    assert (pruned.gates, pruned.steps) == (None, 3)
    assert pruned.plan == deadhead.HeadPlan.from_json(tmp_path / "out" / "head_plan.json")
    assert_same_tensors(pruned.model.state_dict(), deadhead.load(tmp_path / "out").state_dict())
    # What is left was fitted to the dense model, unless that was in vain.
    assert pruned.compensation is not None
    noted = getattr(pruned.model.config, "compensation", None)
    assert (noted is not None) == pruned.compensation.kept == (pruned.compensation.after < pruned.compensation.before)
    # Its text is read by the tokenizer of the folder that it was loaded from.
    tuned = deadhead.finetune(
        pruned.model, text, tokenizer=pruned.tokenizer, teacher=place / "llama", distill=0.5, **_STEPS
    )
    assert tuned.plan == pruned.plan
    assert tuned.measured is not None
    assert tuned.measured.before.perplexity == pytest.approx(pruned.measured.after.perplexity, rel=1e-5)
    assert not list(tmp_path.glob("*.work"))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_teacher_shares_the_weights_that_stay(place: Path, frozen: bool) -> None:
    network = deadhead.load(place / "llama")
    recipe = PruneRecipe(params=0.8, distill=1.0, freeze_weights=frozen)
    for dense in (place / "llama", network):
        teacher = teacher_of(None, dense, network, recipe)
        assert teacher is not None and teacher is not network
        assert_same_tensors(teacher.state_dict(), network.state_dict())
        theirs, ours = ({p.data_ptr() for p in model.parameters()} for model in (teacher, network))
        assert theirs == ours if frozen else theirs.isdisjoint(ours)
    # Another teacher is what was asked for.
    asked = teacher_of(network, place / "llama", deadhead.load(place / "llama"), recipe)
    assert asked is network


def test_a_command_and_a_call_end_in_the_same_weights(place: Path, tmp_path: Path) -> None:
    text, common = place / "prose.txt", {"sparsity": 0.5, "steps": 3, "batch_size": 2}
    deadhead.prune(deadhead.load(place / "ours"), str(text), out=tmp_path / "call", seed=3, **common)
    words = ("prune", "--model", place / "ours", "--data", text, "--sparsity", 0.5, "--steps", 3, "--batch-size", 2)
    assert execute([str(word) for word in (*words, "--seed", 3, "--out", tmp_path / "command", "--quiet")]) == 0
    assert_same_tensors(weights(tmp_path / "call"), weights(tmp_path / "command"))


def test_tokens_and_gates_that_are_kept(place: Path) -> None:
    """Of tokens alone nothing is held out; a corpus has a validation text."""
    model: Any = tiny_model("llama")
    recipe = PruneRecipe(sparsity=0.25, steps=3, batch_size=2, sequence_length=12)
    found = deadhead.prune(model, stream(300, vocab_size=VOCABULARY), recipe=recipe, cut=False, unit="head")
    assert found.model is model and found.measured is None
    assert found.gates is not None and found.gates.plan() == found.plan
    assert (found.plan.unit, found.costs.before.parameters) == ("head", found.costs.after.parameters)
    corpus, _ = load_text(str(place / "prose.txt"))
    ranked = deadhead.prune(deadhead.load(place / "ours"), corpus, criterion="magnitude", sparsity=0.5, device="cpu")
    assert ranked.measured is not None and sum(ranked.plan.heads) == 4


def test_device_and_dtype(place: Path) -> None:
    found = deadhead.prune(
        place / "llama", str(place / "prose.txt"), criterion="random", sparsity=0.5, device="cpu", dtype="bfloat16"
    )
    assert found.model.dtype == torch.bfloat16
    assert deadhead.load(place / "llama", dtype="float16", device="cpu").dtype == torch.float16


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("llama", {}, "A text was expected for a model of type llama, but none was given"),
        ("llama", {"data": "prose", "sparsty": 0.5}, "unknown key 'sparsty'; did you mean 'sparsity'"),
        ("llama", {"data": "prose", "teachr": "llama"}, "unknown key 'teachr'; did you mean 'teacher'"),
        ("llama", {"data": "prose", "seed": -1}, "seed must be a whole number of at least 0"),
        ("llama", {"data": "prose", "evaluation_tokens": 1}, "evaluation_tokens must be a whole number of at least 2"),
        ("llama", {"data": "prose", "sparsity": 2.0}, "wrong value for 'sparsity'"),
        ("llama", {"data": "prose", "sparsity": 0.5, "device": "moon"}, r"A device was expected \(cpu.*'moon'"),
        ("llama", {"data": "prose", "sparsity": 0.5, "dtype": "int8"}, "A dtype was expected .*'int8'"),
        ("memory", {"data": "prose", "sparsity": 0.5, "dtype": "bfloat16"}, "for a model that is loaded"),
        ("memory", {"data": "prose", "sparsity": 0.5}, "A tokenizer is needed to read .*tokenizer="),
        ("memory", {"data": "prose", "sparsity": 0.5, "resume": True}, "resume needs out"),
    ],
)
def test_one_sentence(place: Path, model: str, arguments: dict[str, Any], message: str) -> None:
    given: Any = tiny_model("llama") if model == "memory" else place / model
    data = str(place / "prose.txt") if arguments.pop("data", None) else None
    with pytest.raises(InputError, match=message):
        deadhead.prune(given, data, **arguments)


@pytest.mark.parametrize("command", ["prune", "finetune"])
def test_a_stock_model_needs_data(command: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert execute([command, "--model", str(place / "llama"), "--out", str(tmp_path / "out")]) == 2
    assert "name one with data (--data)" in capfd.readouterr().err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("is_loaded", [True, False])
def test_what_reads_no_text_asks_for_none(criterion: str, is_loaded: bool, place: Path) -> None:
    given: Any = deadhead.load(place / "llama") if is_loaded else place / "llama"
    found = deadhead.prune(given, criterion=criterion, sparsity=0.5)
    assert found.measured is None and sum(found.plan.heads) * 2 == sum(found.costs.before.heads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "A text was expected for a model of type llama"),
        ({"criterion": "taylor", "sparsity": 0.5}, "A text was expected for a model of type llama"),
        ({"data": "prose", "device": "moon"}, "A device was expected"),
        ({"data": "prose", "dtype": "int8"}, "A dtype was expected"),
    ],
)
def test_what_can_be_known_is_told_before_weights_are_loaded(
    arguments: dict[str, Any], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights are loaded"))
    with pytest.raises(InputError, match=message):
        deadhead.prune(place / "llama", **arguments)


def test_a_wrapped_model_is_told_as_that() -> None:
    inner = tiny_model("llama")
    for wrapped in (torch.compile(inner, backend="eager"), torch.nn.DataParallel(inner)):
        given: Any = wrapped
        with pytest.raises(UnsupportedModel, match="which holds one; give deadhead the model inside"):
            deadhead.prune(given, criterion="magnitude", sparsity=0.5)


def test_a_speedup_is_not_measured_on_longer_texts_than_the_model_reads(place: Path, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for given in (GPT2LMHeadModel(config), tmp_path / "gpt2"):
        with pytest.raises(InputError, match="A text of the prefill would have 17 tokens, .* has 16 positions"):
            deadhead.prune(given, criterion="magnitude", speedup=1.2, budget_length=17)


def test_a_call_that_fails_leaves_no_gates() -> None:
    """Another try begins anew: the model in memory is as it was."""
    model: Any = tiny_model("llama")
    text = stream(300, vocab_size=VOCABULARY)
    settings: dict[str, Any] = {"steps": 1, "batch_size": 2, "sequence_length": 12}
    with pytest.raises(InputError, match="cannot be reached"):
        deadhead.prune(model, text, params=0.01, **settings)
    assert deadhead.gates_of(model) is None
    assert deadhead.prune(model, text, sparsity=0.5, **settings).model is model


@pytest.mark.parametrize("step", ["choose_units", "cut_heads"])
def test_a_call_that_fails_leaves_the_model_as_it_was(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that comes to its end leaves alone a configuration that other models share."""
    model: Any = tiny_model("llama").train()
    config, shared = model.config, model.config.to_dict()
    names = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    text = stream(300, vocab_size=VOCABULARY)
    settings: dict[str, Any] = {"sparsity": 0.5, "steps": 1, "batch_size": 2, "sequence_length": 12}
    original = getattr(pruning, step)

    def fail(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pruning, step, fail)
        with pytest.raises(KeyboardInterrupt):
            deadhead.prune(model, text, **settings)
    assert deadhead.gates_of(model) is None and type(model).__name__ == "LlamaForCausalLM"
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == names
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert model.config is config and config.to_dict() == shared
    deadhead.prune(model, text, **settings)
    deadhead.finetune(model, text, steps=1, batch_size=2, sequence_length=12)
    assert config.to_dict() == shared and model.config.use_cache == config.use_cache


def test_what_fails_after_the_cut_leaves_the_cut_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    monkeypatch.setattr(checkpoint, "save", lambda *args, **kwargs: (_ for _ in ()).throw(InputError("full")))
    with pytest.raises(InputError, match="full"):
        deadhead.prune(
            *(model, stream(300, vocab_size=VOCABULARY)),
            sparsity=0.5,
            steps=1,
            batch_size=2,
            sequence_length=12,
            out=tmp_path / "out",
        )
    assert deadhead.gates_of(model) is None and type(model).__name__ == "DeadheadLlamaForCausalLM"


def test_recipes_of_another_phase() -> None:
    model: Any = tiny_model("llama")
    for call, recipe in ((deadhead.prune, PhaseRecipe()), (deadhead.finetune, PruneRecipe()), (deadhead.prune, {})):
        with pytest.raises(InputError, match="recipe"):
            call(model, stream(300, vocab_size=VOCABULARY), recipe=recipe)


def test_a_budget_replaces_the_recipes() -> None:
    model: Any = tiny_model("llama")
    asked = PruneRecipe(sparsity=0.25, steps=1, batch_size=2, sequence_length=12)
    found = deadhead.prune(model, stream(300, vocab_size=VOCABULARY), recipe=asked, kv_cache=0.5)
    assert found.budget is not None and found.budget["kind"] == "kv_cache"


def test_a_file_in_the_place_of_the_work(tmp_path: Path) -> None:
    (tmp_path / "out.work").write_text("mine")
    text = write_prose(tmp_path)
    model, data = save_small_model(tmp_path / "dense", text), DataRecipe(source=str(text))
    for resume in (False, True):
        with pytest.raises(InputError, match=r"kept in the folder .*out\.work, but a file is there; move it away"):
            run_single("finetune", _PHASE, model, data, Options(out=tmp_path / "out", resume=resume))
    assert (tmp_path / "out.work").read_text() == "mine"


def test_nothing_to_resume(tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    model = save_small_model(tmp_path / "dense", text)
    with pytest.raises(InputError, match="nothing to resume"):
        data = DataRecipe(source=str(text))
        run_single("finetune", _PHASE, model, data, Options(out=tmp_path / "out", resume=True))
    assert not (tmp_path / "out").exists()


def test_other_settings_are_not_resumed(tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    model = save_small_model(tmp_path / "dense", text)
    data, out, work = DataRecipe(source=str(text)), tmp_path / "out", tmp_path / "out.work"
    result = run_single("finetune", _PHASE, model, data, Options(out=out))
    assert result.steps == 2
    assert not work.exists()
    assert deadhead.load(out).config.num_hidden_layers == deadhead.load(model).config.num_hidden_layers
    write_json(work / "settings.json", {"phase": "finetune"})
    with pytest.raises(InputError, match="other settings"):
        run_single("finetune", changed(_PHASE, steps=3), model, data, Options(out=out, resume=True))
    assert read_json(work / "settings.json", what="settings") == {"phase": "finetune"}


class _Read(list[tuple[torch.Tensor, torch.Tensor | None]]):
    """What a model is given: ids, and the labels that are learned from, where there are some.

    Tokens that it is only tried on are left out.
    """

    def __call__(self, module: Any, args: Any, given: dict[str, Any]) -> None:
        if torch.equal(given["input_ids"], few_tokens(module)):
            return
        self.append((given["input_ids"].cpu(), None if given.get("labels") is None else given["labels"].cpu()))


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("settings", [{"criterion": "taylor"}, {"criterion": "gates", "eval_every": 1, "distill": 0.5}])
def test_every_row_begins_as_the_tokenizer_begins_a_text(
    frame: str, settings: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """Those that score, train, validate and evaluate; what the tokenizer puts there is not learned."""
    tokenizer, read = framed_tokenizer(frame), _Read()
    model, _ = save_small_llama(tmp_path / "llama", place / "prose.txt", tokenizer)
    model.register_forward_pre_hook(read, with_kwargs=True)
    common = {"sparsity": 0.3, "steps": 2, "batch_size": 2, "sequence_length": 12, "evaluation_tokens": 40}
    found = deadhead.prune(
        model, str(place / "prose.txt"), tokenizer=tokenizer, cut=False, device="cpu", **common, **settings
    )
    begin = {"bos": [tokenizer.bos_token_id], "cls and sep": [tokenizer.cls_token_id], "none": []}[frame]
    assert found.measured is not None and found.measured.after.prefix == tuple(begin)
    assert len(read) >= 4 and any(labels is not None for _, labels in read)
    for ids, labels in read:
        assert ids[:, : len(begin)].tolist() == [begin] * len(ids)
        assert bool((ids[:, len(begin) :] < 256).all())
        assert labels is None or (ids.shape[1] == 12 and bool((labels == -100).sum(1).eq(len(begin)).all()))


@pytest.mark.parametrize("criterion", ["taylor", "gates"])
def test_answers_alone_are_learned_from(criterion: str, place: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets").disable_progress_bars()
    tokenizer, read = framed_tokenizer("bos"), _Read()
    template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    rows = [{"prompt": "what is it " * 2, "completion": f"ANSWER {index}"} for index in range(40)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.jinja").write_text(template)
    model, _ = save_small_llama(tmp_path / "llama", place / "prose.txt", tokenizer)
    model.register_forward_pre_hook(read, with_kwargs=True)
    data = DataRecipe(source=str(tmp_path / "chat.jsonl"), chat_template=str(tmp_path / "t.jinja"), answers_only=True)
    common = {"sparsity": 0.3, "steps": 3, "batch_size": 2, "sequence_length": 9, "criterion": criterion}
    found = deadhead.prune(model, data, tokenizer=tokenizer, device="cpu", cut=False, **common)
    learned = "".join(tokenizer.decode(labels[labels != -100]) for _, labels in read if labels is not None)
    assert learned and set(learned) <= set("ANSWER 0123456789|<end>")
    assert found.tokenizer is not None and found.tokenizer.chat_template == template
    with pytest.raises(InputError, match="answers_only is for models without segment memory"):
        deadhead.prune(place / "ours", data, sparsity=0.5, steps=2, batch_size=2)

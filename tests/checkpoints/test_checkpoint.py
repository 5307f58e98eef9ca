"""Checkpoints: what is saved is what is loaded, complete or absent, and what is wrong is said in one sentence."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerBase,
)

import deadhead
from benchmarks._tiny_models import tiny_model as model_of_type
from deadhead import HeadPlan, InputError
from deadhead.data import load_text, load_tokenizer
from deadhead.disk.checksums import CHECKSUMS_FILE
from deadhead.gates.hard_concrete import GateConfig
from deadhead.models import AllAttentionForCausalLM
from tests.random_models import assert_unchanged, snapshot, tiny_model
from tests.small_runs import assert_same_tensors, tree, weights, write_prose

_IDS = torch.arange(20).view(2, 10)
_PLAN = HeadPlan(kept={0: (1, 3), 1: ()}, total=dict.fromkeys(range(3), 4), output_scale=True)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    folder = tmp_path / "text"
    folder.mkdir()
    return load_text(str(write_prose(folder)))[1]


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=_IDS, use_cache=False).logits
    return logits


def _gated() -> AllAttentionForCausalLM:
    model = tiny_model()
    gates = deadhead.attach(model, config=GateConfig(seed=3, hard=False, output_scale=True, lr_scale=7.0))
    for index, (_, gate) in enumerate(gates):
        gate.set_log_alpha(torch.tensor([-2.0, 0.5, 1.0, index - 1.0]))
        gate.difference.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    return model


@pytest.mark.parametrize("plan", [None, _PLAN], ids=["dense", "cut"])
@pytest.mark.parametrize("overrides", [{}, {"adaptive_cutoffs": [5], "position": "rotary"}], ids=["plain", "adaptive"])
def test_saved_and_loaded_is_the_same(plan: HeadPlan | None, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**overrides)
    if plan is not None:
        deadhead.cut(model, plan)
    deadhead.save(model, tmp_path / "model", metrics={"perplexity": 5.912345})
    loaded = deadhead.load(tmp_path / "model")
    assert torch.equal(_logits(loaded), _logits(model))
    assert not loaded.training
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert (tmp_path / "model" / "head_plan.json").exists() == (plan is not None)
    if plan is not None:
        assert HeadPlan.from_json(tmp_path / "model" / "head_plan.json") == plan
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "- perplexity: 5.912" in card
    assert f"- heads a layer: {deadhead.model_cost(model).heads}" in card
    assert ("were found dead and cut off" in card) == (plan is not None)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling.AllAttentionForCausalLM"
    assert (tmp_path / "model" / "modeling.py").is_file()
    assert not {path.suffix for path in (tmp_path / "model").iterdir()} & {".bin", ".pt", ".pkl"}


def test_a_second_cut_of_a_loaded_model(tmp_path: Path) -> None:
    model = deadhead.cut(tiny_model(), _PLAN)
    deadhead.save(model, tmp_path / "one")
    loaded = deadhead.load(tmp_path / "one")
    more = HeadPlan(kept={0: (3,), 1: (), 2: (0, 1, 2)}, total=_PLAN.total, output_scale=True)
    for network in (model, loaded):
        deadhead.cut(network, more)
    deadhead.save(loaded, tmp_path / "two")
    assert torch.equal(_logits(deadhead.load(tmp_path / "two")), _logits(model))


def test_dtype(tmp_path: Path) -> None:
    deadhead.save(tiny_model(dtype=torch.bfloat16), tmp_path / "half")
    assert deadhead.load(tmp_path / "half").dtype == torch.bfloat16
    assert deadhead.load(tmp_path / "half", dtype=torch.float32).dtype == torch.float32


def test_gated_round_trip(tmp_path: Path) -> None:
    model = _gated()
    before = snapshot(model)
    deadhead.save(model, tmp_path / "gated")
    # transformers notes in the configuration which class was saved; all else is as it was.
    assert_unchanged(model, {**before, "config": model.config.to_dict()})
    loaded, gates = deadhead.load_gated(tmp_path / "gated")
    original = deadhead.gates_of(model)
    assert original is not None
    assert gates.config == original.config
    assert_same_tensors(gates.state_dict(), original.state_dict())
    assert gates.plan() == original.plan()
    assert torch.equal(_logits(loaded), _logits(model))
    deadhead.cut(loaded, gates.plan())
    torch.testing.assert_close(_logits(loaded), _logits(deadhead.cut(model, gates.plan())), rtol=1e-5, atol=1e-5)


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Capture what transformers logs, which does not propagate by itself."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def test_plain_from_pretrained_of_a_gated_folder_is_ungated_and_silent(
    tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    model = _gated()
    deadhead.save(model, tmp_path / "gated")
    heard.clear()
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "gated", output_loading_info=True)
    loaded, info = both
    assert [record.message for record in heard.records if record.levelno >= logging.WARNING] == []
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert deadhead.gates_of(loaded) is None
    gated_logits = _logits(model)
    deadhead.detach(model)
    assert torch.equal(_logits(loaded), _logits(model))
    assert not torch.allclose(gated_logits, _logits(model), atol=1e-2)


def test_tokenizer_travels(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    deadhead.save(tiny_model(vocab_size=257), tmp_path / "model", tokenizer=tokenizer)
    loaded = load_tokenizer(tmp_path / "model")
    assert loaded("the cat <eos>\n")["input_ids"] == tokenizer("the cat <eos>\n")["input_ids"]


def _base(folder: Path) -> Path:
    folder.mkdir()
    (folder / "LICENSE.md").write_text("You may.")
    (folder / "NOTICE").write_text("Made by others.")
    (folder / "notes.txt").write_text("not a licence")
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: open-ish\nlanguage: [en, fr]\npipeline_tag: x\n---\n# Theirs\n"
    )
    return folder


def test_licences_of_the_base_model_stay(tmp_path: Path) -> None:
    """Its licence files and what its card says of licence and language; a second cut hands them on; nothing else."""
    deadhead.save(tiny_model(), tmp_path / "first", base=_base(tmp_path / "base"))
    deadhead.save(tiny_model(1), tmp_path / "second", base=tmp_path / "first")
    for name in ("first", "second"):
        folder = tmp_path / name
        assert (folder / "LICENSE.md").read_text() == "You may."
        assert (folder / "NOTICE").read_text() == "Made by others."
        assert not (folder / "notes.txt").exists()
        found = metadata_load(folder / "README.md")
        kept = {key: found[key] for key in ("license", "license_name", "language")}
        assert kept == {"license": "other", "license_name": "open-ish", "language": ["en", "fr"]}
        assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-generation")
        assert "# Theirs" not in (folder / "README.md").read_text()
    # It is ours: written over without a word.
    deadhead.save(tiny_model(), tmp_path / "second")
    assert not (tmp_path / "second" / "NOTICE").exists()


def test_a_base_on_the_hub_is_named(tmp_path: Path) -> None:
    """Its card cannot be had here, without a network; that loses nothing."""
    deadhead.save(tiny_model(), tmp_path / "model", base="someone/something")
    assert metadata_load(tmp_path / "model" / "README.md")["base_model"] == "someone/something"


@pytest.mark.parametrize("card", ["no front matter", "---\n- a list\n---\n", "---\n{: broken\n---\n"])
def test_a_card_that_cannot_be_read_is_no_hindrance(card: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    (base / "README.md").write_text(card)
    deadhead.save(tiny_model(), tmp_path / "model", base=base)
    assert "license" not in metadata_load(tmp_path / "model" / "README.md")


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path: Path) -> None:
    deadhead.save(_gated(), tmp_path / "model")
    deadhead.save(tiny_model(1), tmp_path / "model")
    assert not (tmp_path / "model" / "head_gates.json").exists()
    assert torch.equal(_logits(deadhead.load(tmp_path / "model")), _logits(tiny_model(1)))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("It was")
    (tmp_path / "file").write_text("a file")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="exists and was not written by deadhead"):
        deadhead.save(tiny_model(), tmp_path / "thesis")
    with pytest.raises(InputError, match="is a file, but a folder is to be written there"):
        deadhead.save(tiny_model(), tmp_path / "file")
    with pytest.raises(InputError, match="a file of that name is in the way"):
        deadhead.save(tiny_model(), tmp_path / "file" / "model")
    assert tree(tmp_path) == before


class _Broken(PreTrainedTokenizerBase):
    """A tokenizer that fails when the weights are already written."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, folder: str, *args: Any, **kwargs: Any) -> Any:
        assert (Path(folder) / "model.safetensors").exists()
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_what_there_was(error: BaseException, tmp_path: Path) -> None:
    deadhead.save(tiny_model(), tmp_path / "model")
    before = tree(tmp_path)
    for folder in ("model", "new"):
        with pytest.raises(type(error)):
            deadhead.save(tiny_model(1), tmp_path / folder, tokenizer=_Broken(error))
        assert tree(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("A file system can be mounted by root only.")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    with pytest.raises(InputError, match=r"^No space is left on the device while writing .*model; free some") as caught:
        deadhead.save(tiny_model(vocab_size=2000), small_disk / "model")
    assert "\n" not in str(caught.value)
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_while_the_small_files_are_written(small_disk: Path) -> None:
    """The weights fit, what comes after them does not."""
    model = tiny_model(hidden_size=8, num_hidden_layers=1, num_persistent=1)
    with pytest.raises(InputError, match="No space is left"):
        deadhead.save(model, small_disk / "model")
    assert list(small_disk.iterdir()) == []


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _truncate_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def _empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _change_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _without_a_tensor(folder: Path) -> None:
    _change_weights(folder, lambda tensors: tensors.pop("model.layers.1.attention.k_proj.weight"))


def _with_another_tensor(folder: Path) -> None:
    _change_weights(folder, lambda tensors: tensors.update(stray=torch.zeros(3)))


def _with_gate_keys(folder: Path) -> None:
    gates = {"model.layers.0.attention.head_gate.log_alpha_bias": torch.zeros(4)}
    _change_weights(folder, lambda tensors: tensors.update(gates))


def _change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _other_width(folder: Path) -> None:
    _change_config(folder, hidden_size=32)


def _uneven_heads(folder: Path) -> None:
    _change_config(folder, num_attention_heads=5)


def _more_layers(folder: Path) -> None:
    _change_config(folder, num_hidden_layers=4)


def _other_type(folder: Path) -> None:
    _change_config(folder, model_type="no_such_type")


def _no_type(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_type"}))


def _text_for_a_number(folder: Path) -> None:
    _change_config(folder, hidden_size="sixteen")


def _odd_plan(folder: Path) -> None:
    _change_config(folder, head_plan={"kept": {"0": [9], "1": [], "2": []}, "total": {"0": 4, "1": 4, "2": 4}})


def _plan_that_is_text(folder: Path) -> None:
    _change_config(folder, head_plan="all")


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _garbage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{garbage")


def _binary_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\x00\xfe")


def _list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


_DAMAGES = {
    _truncate: "The weights in .* are cut short",
    _truncate_header: "The weights in .* are damaged or cut short",
    _empty_weights: "The weights in .* are damaged or cut short",
    _without_weights: "Weights were expected at .*model.safetensors, but there is no such file; fetch it",
    _without_a_tensor: "not those of its configuration: missing tensor model.layers.1.attention.k_proj.weight",
    _with_another_tensor: "not those of its configuration: unexpected tensor stray",
    _with_gate_keys: "was saved with gates on, .*; open it with deadhead.load_gated",
    _other_width: "do not fit its configuration",
    _uneven_heads: "cannot be used: .*",
    _more_layers: "not those of its configuration: missing tensor",
    _other_type: "config.json has model type 'no_such_type' and cannot be used",
    _no_type: "cannot be used",
    _text_for_a_number: "cannot be used",
    _odd_plan: "cannot be used",
    _plan_that_is_text: "cannot be used",
    _without_config: "A model configuration was expected at .*config.json, but there is no such file",
    _garbage_config: "The model configuration .* is not JSON",
    _binary_config: "The model configuration .* cannot be read",
    _list_config: "must be a JSON object",
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damage_is_said_in_one_sentence(damage: Any, tmp_path: Path) -> None:
    deadhead.save(tiny_model(), tmp_path / "model")
    damage(tmp_path / "model")
    # As in a folder that another program wrote; with the checksums every change is seen (see below).
    (tmp_path / "model" / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match=_DAMAGES[damage]) as caught:
        deadhead.load(tmp_path / "model")
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert "model" in message


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "head_gates.json", "head_gates.safetensors", "tokenizer.json"]
)
def test_one_flipped_bit_is_found_and_named(name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """In every byte of a small file and in some of a large one, even where what it says remains good JSON."""
    folder = tmp_path / "model"
    deadhead.save(_gated(), folder, tokenizer=tokenizer)
    model, _ = deadhead.load_gated(folder)
    good = (folder / name).read_bytes()
    draw = random.Random(name)
    for place in draw.sample(range(len(good)), min(len(good), 20)):
        damaged = bytearray(good)
        damaged[place] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(damaged)
        with pytest.raises(InputError, match=f"{name} is not what was saved there, by its checksum") as caught:
            deadhead.load_gated(folder)
        assert "\n" not in str(caught.value)
    (folder / name).write_bytes(good)
    assert_same_tensors(deadhead.load_gated(folder)[0].state_dict(), model.state_dict())


def test_what_people_may_edit_is_not_held_against_them(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    deadhead.save(tiny_model(), folder)
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=False).returncode == 0
    for name in ("README.md", "generation_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("\n", "\n\n", 1))
    deadhead.load(folder)
    _change_config(folder, hidden_dropout=0.25)
    with pytest.raises(
        InputError, match=r"config\.json is not what was saved .* if the change is meant, delete SHA256"
    ):
        deadhead.load(folder)
    (folder / "SHA256SUMS").unlink()
    assert deadhead.load(folder).config.hidden_dropout == 0.25


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    for name, what in {"missing": "there is none", "file": "that is a file; name the folder"}.items():
        with pytest.raises(InputError, match=f"A checkpoint folder was expected at .*, but {what}"):
            deadhead.load(tmp_path / name)
    for name in ("gpt2", "no/such-model"):
        with pytest.raises(InputError, match=f"There is no folder {name}, and the Hugging Face hub gave no model"):
            deadhead.load(name)


def test_another_architecture_loads_and_is_refused_later(tmp_path: Path) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=29, hidden_size=8, num_hidden_layers=1))
    model.save_pretrained(tmp_path / "mamba")
    loaded = deadhead.load(tmp_path / "mamba")
    for use in (deadhead.attach, deadhead.model_cost, lambda m: deadhead.save(m, tmp_path / "out")):
        with pytest.raises(deadhead.UnsupportedModel, match="cannot prune heads of models of type 'mamba'"):
            use(loaded)
    assert not (tmp_path / "out").exists()


def test_gates_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    deadhead.save(tiny_model(), tmp_path / "dense")
    with pytest.raises(InputError, match="has no gates .*; load it with deadhead.load"):
        deadhead.load_gated(tmp_path / "dense")
    with pytest.raises(InputError, match="A checkpoint folder was expected"):
        deadhead.load_gated(tmp_path / "missing")

    def damaged(name: str, content: bytes | None, message: str) -> None:
        deadhead.save(_gated(), tmp_path / "gated")
        path = tmp_path / "gated" / name
        path.unlink() if content is None else path.write_bytes(content)
        (tmp_path / "gated" / "SHA256SUMS").unlink()
        with pytest.raises(InputError, match=message) as caught:
            deadhead.load_gated(tmp_path / "gated")
        assert "\n" not in str(caught.value)

    damaged("head_gates.json", None, "A gate configuration was expected")
    damaged("head_gates.json", b"{", "is not JSON")
    damaged("head_gates.json", b'{"alpha": 1}', "gate configuration .*head_gates.json")
    damaged("head_gates.json", b'{"beta": "wide"}', "gate configuration .*head_gates.json")
    damaged("head_gates.json", b"[1]", "gate configuration .*head_gates.json")
    damaged("head_gates.json", b'{"beta": -1}', "A gate's beta must be above 0")
    damaged("head_gates.safetensors", b"\x00" * 50, "damaged or cut short")
    other = deadhead.attach(tiny_model(num_attention_heads=2)).state_dict()
    save_file(other, tmp_path / "other.safetensors")
    damaged(
        "head_gates.safetensors", (tmp_path / "other.safetensors").read_bytes(), "saved gates do not fit this model"
    )


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
@pytest.mark.parametrize(
    ("model_type", "gates"),
    [("llama", {}), ("llama", {"unit": "head", "blocks": 8}), ("gpt2", {}), ("bert", {"blocks": True})],
    ids=["llama", "llama-blocks", "gpt2", "bert"],
)
def test_what_was_saved_with_gates_on_by_other_means_opens(
    model_type: str, gates: dict[str, Any], shard: str, tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    """A Trainer's `save_model` and `save_pretrained` write gates among the weights, with all that they need."""
    model: Any = model_of_type(model_type)
    config = GateConfig(lr_scale=7.0, seed=2**40, output_scale=True)
    saved = deadhead.attach(model, config=config, **gates)
    for _, gate in saved:
        gate.set_log_alpha(torch.linspace(-1, 1, gate.num_heads))
        gate.difference.fill_(0.5)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    with pytest.raises(InputError, match="was saved with gates on, .* open it with deadhead.load_gated"):
        deadhead.load(tmp_path)
    loaded, found = deadhead.load_gated(tmp_path)
    # No table of the gates as keys that nobody expected.
    assert [record.message for record in heard.records if record.levelno >= logging.WARNING] == []
    assert deadhead.gates_of(loaded) is found
    assert (found.config, found.choices) == (config, saved.choices)
    assert found.plan() == saved.plan()
    torch.testing.assert_close(found.state_dict(), saved.state_dict())
    plain = {name: value for name, value in model.state_dict().items() if "_gate." not in name}
    assert_same_tensors({name: value for name, value in loaded.state_dict().items() if name in plain}, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_extra_state": None}, "have gates without their settings; load the model"),
        ({"_extra_state": torch.tensor([1, 2], dtype=torch.uint8)}, "have gates without their settings"),
        ({"log_alpha_bias": None}, "The saved gates do not fit this model"),
        ({"difference": torch.zeros(9)}, "The saved gates do not fit this model"),
    ],
    ids=["no settings", "no JSON", "no values", "other shape"],
)
def test_gates_among_weights_that_are_damaged(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    _gated().save_pretrained(tmp_path)
    (ending, value), *_ = change.items()
    tensors = weights(tmp_path)
    name = next(name for name in tensors if name.endswith(f"head_gate.{ending}"))
    del tensors[name]
    save_file(tensors if value is None else {**tensors, name: value}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        deadhead.load_gated(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [deadhead.load, deadhead.load_gated])
@pytest.mark.parametrize(
    ("holds", "message"),
    [
        (
            ("checkpoint-2", "checkpoint-4", "checkpoint-10", "checkpoint-x"),
            "are in .*/checkpoint-10, .*/checkpoint-4[.]$",
        ),
        (("pruned", "dense"), "its models are in .*/pruned, .*/dense[.]$"),
        (("checkpoint-4",) * 2, "its models are in .*/checkpoint-4[.]$"),
    ],
    ids=["trainer", "run", "one"],
)
def test_a_folder_of_checkpoints_names_them(load: Any, holds: tuple[str, ...], message: str, tmp_path: Path) -> None:
    for name in holds:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(InputError, match=message):
        load(tmp_path)


# PEFT asks transformers for activation checkpointing by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_alone_are_told_as_that(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(model_of_type("llama"), peft.LoraConfig(target_modules="all-linear"))
    deadhead.attach(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="holds an adapter"):
        deadhead.load(tmp_path)
    with pytest.raises(InputError, match="holds PEFT's adapters without their model"):
        deadhead.load_gated(tmp_path)


def test_another_programs_model_is_left_alone(tmp_path: Path) -> None:
    """A folder with a config.json is a model, but only one whose card names deadhead is ours to replace."""
    theirs = tmp_path / "theirs"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)).save_pretrained(theirs)
    before = tree(theirs)
    with pytest.raises(InputError, match="deadhead did not write"):
        deadhead.save(tiny_model(), theirs)
    assert tree(theirs) == before


def test_code_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    """The message says why, and nothing of the folder is run."""
    folder = tmp_path / "unknown"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of", "auto_map": auto_map}))
    with pytest.raises(InputError, match="never runs code"):
        deadhead.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "wrap", [torch.nn.DataParallel, lambda model: torch.nn.ModuleList([model])], ids=["DP", "list"]
)
def test_a_wrapped_model_is_told_as_that_when_it_is_saved(wrap: Any, tmp_path: Path) -> None:
    wrapped = wrap(tiny_model())
    wrapped.module = wrapped[0] if isinstance(wrapped, torch.nn.ModuleList) else wrapped.module
    with pytest.raises(InputError, match=f"got a {type(wrapped).__name__}, which holds one; give deadhead the model"):
        deadhead.save(wrapped, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "own"])
def test_a_checkpoint_whose_plan_names_blocks_is_loaded(kind: str, tmp_path: Path) -> None:
    """Version 2 of the plan, as earlier cuts wrote it into the configuration."""
    model: Any = tiny_model(num_persistent=12) if kind == "own" else model_of_type(kind)
    gates = deadhead.attach(model, blocks=4)
    plan = gates.choices.plan({key: range(0, count, 2) for key, count in gates.choices.counts.items()})
    deadhead.save(deadhead.cut(model, plan), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    units = config["head_plan"].pop("hidden_units")
    total = {layer: count // 4 for layer, count in units["total"].items()}
    kept = {layer: list(range(0, count, 2)) for layer, count in total.items()}
    config["head_plan"] |= {"version": 2, "blocks": {"size": 4, "total": total, "kept": kept}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / CHECKSUMS_FILE).unlink()
    loaded = deadhead.load(tmp_path)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert deadhead.model_cost(loaded).hidden_units == [len(found) for found in plan.hidden_units.kept.values()]  # type: ignore[union-attr]

"""A quantised checkpoint that cannot be read here is refused by its configuration; what can become numbers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead.checkpoints import checkpoint
from deadhead.checkpoints.quantised import require_readable
from deadhead.cli import execute
from deadhead.errors import InputError, UnsupportedModel
from deadhead.layouts.refusals import require_plain

# None of their packages is installed for the tests, and the last two are nobody's.
_UNREADABLE: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq"},
    "hqq": {"quant_method": "hqq"},
    "nonsense": {"quant_method": "nonsense"},
    "by transformers": {},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose weights are no weights, so that whatever reads them fails in another way."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    return tmp_path / "model"


def _declare(folder: Path, declared: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": declared}))


@pytest.mark.parametrize("name", _UNREADABLE)
def test_what_cannot_be_read_is_refused_by_the_configuration(name: str, folder: Path) -> None:
    _declare(folder, _UNREADABLE[name])
    message = rf"is quantised \({name}\), and heads cannot be cut out of quantised weights"
    for load in (deadhead.load, checkpoint.load_skeleton):
        with pytest.raises(UnsupportedModel, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert checkpoint.load_config(folder).model_type == "llama"


def test_of_a_name_the_configuration_is_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _declare(folder, _UNREADABLE["gptq"])
    config = AutoConfig.from_pretrained(folder)
    monkeypatch.setattr(checkpoint, "load_config", lambda path: config)
    monkeypatch.chdir(folder)
    with pytest.raises(UnsupportedModel, match=r"someone/model is quantised \(gptq\)"):
        deadhead.load("someone/model")


@pytest.mark.parametrize(
    "command", ["prune --model {} --sparsity 0.5 --criterion magnitude --out o", "bench {}", "inspect {} --json"]
)
def test_commands(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On paper a quantised model is counted like any other."""
    _declare(folder, _UNREADABLE["bitsandbytes"])
    monkeypatch.chdir(folder.parent)
    assert execute(command.format(folder).split()) == (0 if command.startswith("inspect") else 2)
    assert ("is quantised (bitsandbytes)" in capfd.readouterr().err) != command.startswith("inspect")


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_what_transformers_makes_numbers_of_is_read(method: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    _declare(tmp_path, {"quant_method": method})
    read = deadhead.load(tmp_path)
    require_plain(read, "A cut")
    require_plain(checkpoint.load_skeleton(tmp_path), "A cut", may_be_empty=True)
    assert torch.equal(read.lm_head.weight, model.lm_head.weight)


def test_what_is_not_quantised_is_left_alone() -> None:
    config = tiny_model("llama").config
    before = config.to_dict()
    require_readable(config, Path("model"))
    assert config.to_dict() == before


def test_what_quantisers_write_of_emptied_projections_is_ignored(tmp_path: Path) -> None:
    """They give an empty matrix codes and scales too, as compressed-tensors does; a bias is none of them."""
    model = tiny_model("llama")
    total = dict.fromkeys(range(3), 4)
    deadhead.cut(model, deadhead.HeadPlan(kept={1: []}, total=total, unit="kv_group"))
    deadhead.save(model, tmp_path / "model")
    (tmp_path / "model" / "SHA256SUMS").unlink()
    file = tmp_path / "model" / "model.safetensors"
    written = load_file(file)
    path = "model.layers.1.self_attn.o_proj"
    written |= {
        f"{path}.weight": torch.empty(64, 0, dtype=torch.int8),
        f"{path}.weight_scale": torch.ones(64, 1),
    }
    save_file(written, file, {"format": "pt"})
    read = deadhead.load(tmp_path / "model")
    ids = torch.arange(9)[None]
    assert torch.equal(read(ids).logits, model.eval()(ids).logits)
    save_file(written | {f"{path}.bias": torch.ones(64)}, file, {"format": "pt"})
    with pytest.raises(InputError, match=rf"unexpected tensor {path}\.bias"):
        deadhead.load(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "group_size"), [("W8A8", None), ("W4A16", 16)])
def test_llm_compressor_quantises_cut_models(scheme: str, group_size: int | None, tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    from benchmarks.quantised import quantised

    model = tiny_model("llama")
    plan = deadhead.HeadPlan(kept={0: [1, 2], 1: []}, total=dict.fromkeys(range(3), 4), unit="kv_group")
    deadhead.cut(model, plan)
    deadhead.save(model, tmp_path / "cut")
    quantised(tmp_path / "cut", tmp_path / "small", scheme, group_size)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    ids = torch.arange(9)[None]
    want, got = model.eval()(ids).logits, loaded(ids).logits
    assert 0 < (want - got).abs().max() < 0.5 * want.abs().max()
    assert type(loaded) is type(model)
    assert loaded.generate(ids, max_new_tokens=3).shape[1] <= 12
    again = deadhead.load(tmp_path / "small")(ids).logits
    assert (want - again).abs().max() < 0.5 * want.abs().max()

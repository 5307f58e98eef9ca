"""vLLM runs a cut model's checkpoint as it lies there, at its true size, and gives the tokens that PyTorch gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import deadhead
from deadhead.checkpoints import checkpoint
from deadhead.data import load_text
from deadhead.errors import InputError, UnsupportedModel
from deadhead.export import vllm
from deadhead.export.agreement import Reference, compare_likeliest, make_reference
from tests.export.http import ask, free_port
from tests.export.small import cut_model, dense_model, emptied
from tests.random_models import tiny_model
from tests.small_runs import write_prose
from tests.vllm_python import VLLM_PYTHON, needs_vllm

# Types that vLLM runs by transformers' code, with fields that the smallest models need.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {},
    "opt": {},
    "gpt_neox": {},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Reference, dict[str, Any]]]:
    """Let one process read all models, as importing vLLM takes long."""
    folder = tmp_path_factory.mktemp("served")
    references, jobs = {}, []
    for kind, fields in KINDS.items():
        model = emptied(kind, **fields)
        checkpoint.save(model, folder / kind)
        references[kind] = make_reference(model)
        jobs.append(vllm.likeliest_job(folder / kind, references[kind], "float32"))
    found, _ = vllm.run(VLLM_PYTHON, jobs)
    return {kind: (references[kind], each) for kind, each in zip(references, found, strict=True)}


@pytest.mark.slow
@needs_vllm
class TestServed:
    @pytest.mark.parametrize("kind", KINDS)
    def test_layers_of_all_sizes_and_none(
        self, kind: str, answers: dict[str, tuple[Reference, dict[str, Any]]]
    ) -> None:
        reference, answer = answers[kind]
        tokens, positions = vllm.likeliest_of(answer)
        found = compare_likeliest(reference, tokens, positions, runtime="vLLM", tolerance=1e-4)
        assert found.tokens_equal == found.tokens == 16

    def test_batches_chunks_and_shared_beginnings(self, tmp_path: Path) -> None:
        """Texts of different lengths, read in pieces, two of them with the same first part, and twice."""
        model = emptied("llama")
        checkpoint.save(model, tmp_path / "model")
        draw = torch.Generator().manual_seed(3)
        first, *others = (torch.randint(258, (count,), generator=draw).tolist() for count in (40, 7, 63))
        prompts = [first, first[:32] + others[0], *others]
        engine = {
            "dtype": "float32",
            "max_model_len": 128,
            "enable_prefix_caching": True,
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 16,
            "max_num_seqs": 4,
            "enforce_eager": True,
        }
        job = {"path": str(tmp_path / "model"), "prompts": prompts, "max_tokens": 12, "likeliest": 0, "repeats": 1}
        (found,), _ = vllm.run(VLLM_PYTHON, [{**job, "engine": engine}])
        for prompt, text in zip(prompts, found["texts"], strict=True):
            ids = torch.tensor([prompt])
            settings: Any = {"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
            expected = model.generate(ids, max_new_tokens=12, **settings)
            assert text["tokens"] == expected[0, len(prompt) :].tolist()

    def test_its_server_answers_a_chat(self, tmp_path: Path) -> None:
        _, tokenizer = load_text(str(write_prose(tmp_path)), tokenizer="bpe", vocab_size=300)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        model = emptied("llama", vocab_size=len(tokenizer), eos_token_id=None)
        checkpoint.save(model, tmp_path / "model", tokenizer=tokenizer)
        prompt = tokenizer("the old cat ", return_tensors="pt").input_ids
        continued = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
        port = free_port()
        settings = {"--dtype": "float32", "--port": str(port), "--max-model-len": "64", "--served-model-name": "small"}
        # What `vllm serve` starts; that command asks for a package of the name vllm, and the one for CPUs has another.
        command = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "model")]
        command += ["--trust-remote-code", "--enforce-eager", *(part for pair in settings.items() for part in pair)]
        server = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        )
        chat = {"model": "small", "messages": [{"role": "user", "content": "the old cat"}], "temperature": 0}
        try:
            answer = ask(port, "/v1/chat/completions", {**chat, "max_tokens": 6, "return_token_ids": True}, tries=600)
        finally:
            server.terminate()
            server.wait(timeout=60)
        assert answer["choices"][0]["token_ids"] == continued.tolist()

    def test_export_says_how_near_it_comes(self, tmp_path: Path) -> None:
        model = emptied("llama")
        result = deadhead.export_model(model, tmp_path / "out", to="vllm", python=VLLM_PYTHON)
        assert result.kind == "float32" and result.agreements[0].tokens_equal == 16
        assert result.agreements[0].runtime.startswith("vLLM 0.")
        reloaded = deadhead.load(tmp_path / "out")
        assert deadhead.model_cost(reloaded).heads == deadhead.model_cost(model).heads

    def test_what_vllm_says_of_a_model_that_it_does_not_run(self, tmp_path: Path) -> None:
        model = cut_model("llama", hidden_size=64, head_dim=8)
        with pytest.raises(deadhead.errors.ExportError, match="vLLM could not run the model: .*head_dim=8"):
            deadhead.export_model(model, tmp_path / "out", to="vllm", python=VLLM_PYTHON)
        assert not (tmp_path / "out").exists()


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (
                lambda: cut_model("gpt2"),
                "GPT2LMHeadModel cannot be .*in a form that vLLM does not give",
            ),
            (tiny_model, "cannot be served by vLLM: its attention is of its own kind"),
            (
                lambda: T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1)),
                "T5ForConditionalGeneration cannot be served by vLLM: .*an encoder and a decoder",
            ),
        ],
    )
    def test_models_that_it_cannot_run(self, make: Any, reason: str, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModel, match=reason):
            deadhead.export_model(make().eval(), tmp_path / "out", to="vllm")
        assert not (tmp_path / "out").exists()

    def test_a_python_that_is_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = dense_model("llama")
        with pytest.raises(InputError, match="Python of an environment with vLLM .*none is no program"):
            deadhead.export_model(model, tmp_path / "out", to="vllm", python=tmp_path / "none")
        with pytest.raises(InputError, match="Another Python can be set for vllm only, not for padded"):
            deadhead.export_model(model, tmp_path / "out", to="padded", python=tmp_path / "none")
        monkeypatch.setenv(vllm.PYTHON, str(tmp_path / "named"))
        with pytest.raises(InputError, match="named is no program"):
            deadhead.export_model(model, tmp_path / "out", to="vllm")

    def test_a_python_without_vllm(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="with vLLM was expected, but .* has no vLLM"):
            deadhead.export_model(dense_model("llama"), tmp_path / "out", to="vllm", python=Path(sys.executable))
        script = tmp_path / "script"
        script.write_text("#!/nowhere/at/all\n")
        script.chmod(0o755)
        with pytest.raises(InputError, match="is no program that runs here"):
            deadhead.export_model(dense_model("llama"), tmp_path / "out", to="vllm", python=script)

    def test_without_vllm_it_says_that_nothing_was_tried(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(vllm.PYTHON, raising=False)
        monkeypatch.setattr(vllm, "is_installed", lambda *_: False)
        result = deadhead.export_model(cut_model("llama"), tmp_path / "out", to="vllm")
        assert result.agreements == () and "vLLM is not installed here" in str(result.unchecked)
        assert (tmp_path / "out" / "modeling_pruned.py").exists()


def test_a_failure_is_told_by_its_last_error() -> None:
    stderr = "Traceback\nRuntimeError: no such width. \nRuntimeError: Engine failed. See root cause above.\n  done"
    done: Any = subprocess.CompletedProcess([], 1, "", stderr)
    assert vllm._reason(done) == "RuntimeError: no such width"
    assert vllm._reason(subprocess.CompletedProcess([], -11, "", "")) == "its process ended by signal 11"

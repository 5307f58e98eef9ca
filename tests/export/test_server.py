"""A cut model behind llama.cpp's server says what it says in PyTorch."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import deadhead
from deadhead.data import load_text
from tests.export.http import ask, free_port
from tests.export.small import cut_by
from tests.small_runs import write_prose

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llama_cpp") is None or find_spec("uvicorn") is None,
        reason="llama-cpp-python[server] is not installed",
    ),
]


def test_the_server_continues_as_pytorch_does(tmp_path: Path) -> None:
    """Over HTTP, with the file's own tokenizer; layers without heads, and of different sizes."""
    _, tokenizer = load_text(str(write_prose(tmp_path)), tokenizer="bpe", vocab_size=300)
    model = cut_by("llama", [0, 3, 1, 2], vocab_size=len(tokenizer), eos_token_id=None)
    # It writes words only: alone, most of the 256 bytes are no text.
    words = [token for token in range(len(tokenizer)) if str(tokenizer.decode([token])).isprintable()]
    others = [token for token in range(len(tokenizer)) if token not in words or "\ufffd" in tokenizer.decode([token])]
    model.get_output_embeddings().weight.data[others] = 0
    path = tmp_path / "model.gguf"
    deadhead.export_model(model, path, to="gguf", kind="f32", tokenizer=tokenizer)
    prompt = tokenizer("the old cat", return_tensors="pt").input_ids
    continued = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(path), "--port", str(port), "--n_ctx", "128"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = ask(
            port, "/v1/completions", {"prompt": "the old cat", "max_tokens": 6, "temperature": 0, "repeat_penalty": 1.0}
        )
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert found["choices"][0]["text"] == tokenizer.decode(continued[0, prompt.shape[1] :])

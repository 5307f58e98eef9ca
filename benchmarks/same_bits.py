"""Does a change leave all numbers the same? Compares seeded runs of two revisions bit for bit.

    python benchmarks/same_bits.py REVISION        # against the files of this checkout as they are now

The same commands train, prune, cut and fine-tune small models of four architectures, by gates and by criteria, once
with the code of each revision. Weights, gates, plans and every logged number must be the same. Both revisions must know
the options used below, and both run with the same libraries, in one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

RECIPE = """
name = "run"
control = true
evaluation_tokens = 2000
[model]
layers = 2
width = 32
heads = 4
persistent = 16
segment_length = 32
memory_length = 32
hidden_dropout = 0.1
[data]
source = "text"
[train]
steps = 6
batch_size = 4
log_every = 1
[prune]
steps = 12
batch_size = 4
l0 = 0.5
l0_warmup_steps = 4
log_every = 1
distill = 0.5
[finetune]
steps = 4
batch_size = 4
schedule = "cosine"
log_every = 1
"""

MODELS = """
import torch, transformers
from tokenizers import Tokenizer, models, pre_tokenizers, decoders
from transformers import PreTrainedTokenizerFast
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({**{c: i for i, c in enumerate(alphabet)}, "<s>": 256}, []))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>", bos_token="<s>")
sizes = dict(vocab_size=257, bos_token_id=256, eos_token_id=256)
llama = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=8,
                                 num_key_value_heads=4, **sizes)
gpt2 = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **sizes)
for name, config in (("llama", llama), ("gpt2", gpt2)):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(name)
    tokenizer.save_pretrained(name)
"""

PHASE = "--data text --steps 8 --batch-size 2 --sequence-length 64"
COMMANDS = (
    "run recipe.toml --out run",
    "train --data text --architecture transformer_xl --layers 2 --width 32 --heads 4 --segment-length 32 "
    "--memory-length 32 --steps 6 --batch-size 4 --out xl",
    "prune --model xl --data text --steps 8 --batch-size 4 --sparsity 0.4 --criterion topk --out xl-cut",
    "finetune --model xl-cut --data text --steps 4 --batch-size 4 --teacher xl --distill 0.5 --out xl-small",
    f"prune --model llama {PHASE} --params 0.7 --out llama-params",
    f"prune --model llama {PHASE} --sparsity 0.3 --weighting output_difference --unit head --out llama-weighted",
    f"prune --model llama {PHASE} --sparsity 0.3 --freeze-weights --no-cut --out llama-probe",
    f"prune --model llama {PHASE} --flops 0.8 --criterion taylor --out llama-taylor",
    f"prune --model gpt2 {PHASE} --kv-cache 0.5 --start-from output-difference --gradient-checkpointing --out gpt2-cut",
    f"prune --model gpt2 {PHASE} --l0 0.2 --gate-lr 0 --gradient-accumulation 2 --out gpt2-l0",
)
# What a line of the log measures of the clock.
TIMED = ("runtime", "per_second", "time", "seconds")


def main() -> None:
    """Compare two revisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="the revision to compare with")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        before = Path(temporary) / "checkout"
        git("worktree", "add", "--quiet", "--detach", str(before), args.revision)
        try:
            found = [results(tree, folder / name) for name, tree in (("before", before), ("after", ROOT))]
        finally:
            git("worktree", "remove", "--force", str(before))
    old, new = found
    different = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    for name in different:
        print(f"{name}: {old.get(name, 'missing')} → {new.get(name, 'missing')}")
    print(f"{len(old)} results of {args.revision}, {len(new)} of now, {len(different)} different.")
    sys.exit(bool(different))


def git(*arguments: str) -> None:
    """Run git in this checkout."""
    subprocess.run(["git", *arguments], cwd=ROOT, check=True)


def results(tree: Path, folder: Path) -> dict[str, str]:
    """Run all commands with the code in `tree`; return their results by name: a hash, or a logged number."""
    folder.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    library = Path(json.__file__).parent
    (folder / "text").mkdir()
    for source in sorted(library.glob("*.py")):
        (folder / "text" / source.name).write_bytes(source.read_bytes())
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    subprocess.run([sys.executable, "-c", MODELS], cwd=folder, env=environment, check=True)
    for command in COMMANDS:
        arguments = [sys.executable, "-m", "deadhead", *command.split()]
        print(f"{tree.name}: deadhead {command}", flush=True)
        subprocess.run(arguments, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors" or path.name == "head_plan.json":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for index, line in enumerate(lines):
                for key, value in line.items():
                    if not any(word in key for word in TIMED):
                        found[f"{name}:{index}:{key}"] = json.dumps(value)
    return found


if __name__ == "__main__":
    main()

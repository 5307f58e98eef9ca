"""The program of a process with vLLM: reads a job from its input, and writes what vLLM answers to a file.

It imports vLLM and nothing of deadhead's, which need not be there.

    python -c "$(cat vllm_process.py)" OUT.json < JOB.json

A job has `path`, the checkpoint; `prompts`, token ids; `max_tokens`, to be generated of each; `likeliest`, of how many
tokens the log-probabilities are asked at each position, or 0; `engine`, further arguments of `vllm.LLM`; and, where
time is to be taken, `repeats`, how often all prompts are run after a first time.
"""

import json
import sys
import time

import vllm
from vllm import LLM, SamplingParams


def main() -> None:
    """Do one job."""
    job = json.load(sys.stdin)
    llm = LLM(
        job["path"],
        **{"trust_remote_code": True, "skip_tokenizer_init": True, "disable_log_stats": True, **job["engine"]},
    )
    asked = job["likeliest"] or None
    settings = SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        logprobs=asked,
        prompt_logprobs=asked,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    seconds = []
    for _ in range(1 + job.get("repeats", 0)):
        start = time.perf_counter()
        outputs = llm.generate(prompts, settings, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    texts = []
    for output in outputs:
        found = output.outputs[0]
        # Nothing comes before the first token of a prompt.
        positions = [*(output.prompt_logprobs or [])[1:], *(found.logprobs or [])]
        values = [{token: each.logprob for token, each in position.items()} for position in positions]
        texts.append({"tokens": list(found.token_ids), "log_probabilities": values})
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump({"version": vllm.__version__, "texts": texts, "seconds": seconds[1:]}, file)


if __name__ == "__main__":
    main()

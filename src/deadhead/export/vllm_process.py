"""The program of a process with vLLM: reads jobs from its input, and writes what vLLM answers to a file.

It imports vLLM and nothing of deadhead's, which need not be there.

    python -c "$(cat vllm_process.py)" OUT.json < JOBS.json

A job has `path`, the checkpoint; `prompts`, token ids; `max_tokens`, to be generated of each; `likeliest`, of how many
tokens the log-probabilities are asked at each position, or 0; `engine`, further arguments of `vllm.LLM`; and, where
time is to be taken, `repeats`, how often all prompts are run after a first time.
"""

import gc
import json
import sys
import time
from typing import Any

import vllm
from vllm import LLM, SamplingParams


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens and log-probabilities of each prompt, and the seconds of each time but the first."""
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
    return {"texts": texts, "seconds": seconds[1:]}


def main() -> None:
    """Do all jobs, one after the other."""
    answers = []
    for job in json.load(sys.stdin):
        answers.append(answer(job))
        gc.collect()
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump({"version": vllm.__version__, "answers": answers}, file)


if __name__ == "__main__":
    main()

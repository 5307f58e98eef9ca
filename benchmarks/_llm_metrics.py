"""Quality of a real language model: losses of rows of texts, and pairs of sentences of BLiMP by lm-eval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.measure.losses import SegmentLoss
from deadhead.measure.tasks import find_tasks, run_tasks

# A model is right where the good sentence has the higher log-probability.
_PAIRS = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
target_delimiter: ""
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@torch.no_grad()
def row_losses(model: PreTrainedModel, rows: Tensor) -> list[float]:
    """Return the mean loss of each of some rows, (count, length), each read alone."""
    losses = SegmentLoss(model.eval())
    return [float(losses(model, {"input_ids": row[None]}).loss) for row in rows]


def perplexity(losses: Sequence[float]) -> float:
    """Return the perplexity of rows of equal length."""
    return math.exp(mean(losses))


def difference(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return by how much losses are below others of the same rows, as mean and standard error."""
    apart = [other - own for own, other in zip(losses, others, strict=True)]
    return mean(apart), stdev(apart) / math.sqrt(len(apart))


def blimp(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, paradigms: Sequence[Path], pairs: int
) -> dict[str, float]:
    """Return by paradigm (a file of BLiMP) the share of its first `pairs` pairs that a model gets right."""
    with TemporaryDirectory() as folder:
        for path in paradigms:
            task = _PAIRS.format(name=path.stem, data=path.resolve())
            (Path(folder) / f"{path.stem}.yaml").write_text(task, encoding="utf-8")
        with find_tasks([folder]) as tasks:
            scores = run_tasks(model, tokenizer, tasks, limit=pairs, batch_size=32)
    return {score.task: score.value for score in scores if score.metric == "acc"}


def accuracy(scores: Mapping[str, float]) -> float:
    """Return the mean over paradigms."""
    return mean(scores.values())

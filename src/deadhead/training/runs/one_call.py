"""`deadhead.prune` and `deadhead.finetune`: a phase in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.training.recipes.reading import changed
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe
from deadhead.training.runs.inputs import Data
from deadhead.training.runs.single import Options, Pruned, Trained, run_single
from deadhead.training.runs.workplace import Progress


def prune(
    model: PreTrainedModel | str | Path,
    data: Data | None = None,
    *,
    recipe: PruneRecipe | None = None,
    cut: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher: PreTrainedModel | str | Path | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    report_to: Sequence[str] = (),
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    evaluation_tokens: int | None = None,
    **settings: Any,
) -> Pruned:
    """Choose the units of a model that matter least, by gates or a criterion, and cut them off.

        pruned = deadhead.prune("gpt2", "my.txt", params=0.8, steps=500)
        pruned.model, pruned.plan, pruned.costs.after.parameters, pruned.measured.after.perplexity

    It does what `deadhead prune` does. How much goes is one budget, in shares of the model as it is, or learned under
    `l0`.

    Args:
        model: in memory, and changed in place; or a checkpoint folder, or a name on the Hugging Face hub.
        data: a `TokenizedCorpus` or `TokenStream`; or a text file, a directory, "stdlib" or "hf:NAME[:CONFIG]", read
            by the model's tokenizer. None takes "stdlib" for a model of deadhead's own.
        recipe: settings that are not given by themselves; None: the defaults.
        cut: False keeps the gates on the model.
        tokenizer: the model's, if it does not lie beside it.
        teacher: the model to distil from with `distill`; None: the model itself as it is now.
        seed: of dropout, gate noise and LoRA adapters.
        out: folder of the checkpoint to write; None writes none.
        resume: go on from the last checkpoint in `OUT.work`.
        progress: told of the name of what goes on, how much is done, how much there is, and the last numbers.
        report_to: trackers that transformers knows, such as "wandb".
        device: where to run, such as "cpu"; None: the accelerator there is.
        dtype: of the weights of a model that is loaded, such as "bfloat16"; None: as they were saved.
        evaluation_tokens: tokens of the validation text to measure on; None: all.
        settings: fields of `PruneRecipe`, such as `params`, `sparsity`, `criterion`, `steps`, `batch_size`.

    Raises:
        InputError: something given cannot be used; an unknown setting is told with the nearest that there is.
        UnsupportedModel: the model has no heads that could be cut.
        DivergenceError: training diverged.
    """
    options = Options(
        tokenizer=tokenizer,
        teacher=teacher,
        seed=seed,
        out=out,
        resume=resume,
        progress=progress,
        report_to=report_to,
        device=device,
        dtype=dtype,
        evaluation_tokens=evaluation_tokens,
    )
    asked = changed(recipe or PruneRecipe(), **settings)
    return cast(Pruned, run_single("prune", asked, model, data, options, cut=cut))


def finetune(
    model: PreTrainedModel | str | Path,
    data: Data | None = None,
    *,
    recipe: PhaseRecipe | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher: PreTrainedModel | str | Path | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    report_to: Sequence[str] = (),
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    evaluation_tokens: int | None = None,
    **settings: Any,
) -> Trained:
    """Train a model, to recover what a cut cost or for any other reason.

        tuned = deadhead.finetune(pruned.model, "my.txt", steps=500, teacher="gpt2", distill=0.5)

    Args:
        model: as for `prune`, as all that is not told here.
        data: what it learns from.
        recipe: settings that are not given by themselves; None: the defaults.
        tokenizer: the model's.
        teacher: the model to distil from with `distill`, say the dense one.
        seed: of dropout and LoRA adapters.
        out: folder of the checkpoint to write.
        resume: go on from the last checkpoint.
        progress: told of what goes on.
        report_to: trackers.
        device: where to run.
        dtype: of the weights of a model that is loaded.
        evaluation_tokens: tokens to measure on.
        settings: fields of `PhaseRecipe`, such as `steps`, `learning_rate`, `lora_rank`.

    Raises:
        InputError: something given cannot be used.
        DivergenceError: training diverged.
    """
    options = Options(
        tokenizer=tokenizer,
        teacher=teacher,
        seed=seed,
        out=out,
        resume=resume,
        progress=progress,
        report_to=report_to,
        device=device,
        dtype=dtype,
        evaluation_tokens=evaluation_tokens,
    )
    return run_single("finetune", changed(recipe or PhaseRecipe(), **settings), model, data, options)

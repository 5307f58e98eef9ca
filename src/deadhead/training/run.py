"""A run: a folder in which a recipe's phases leave dense, gated and pruned models, and what was measured of them."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from deadhead import checkpoint
from deadhead.cost import model_cost
from deadhead.cutting import cut
from deadhead.data import TokenizedCorpus, special_token_ids
from deadhead.errors import InputError, own_sentence
from deadhead.evaluation import evaluate
from deadhead.files import remove_folder, remove_left_overs, require_replaceable, write_text
from deadhead.gates import HeadGates
from deadhead.generate import generate_text
from deadhead.latency import Latency
from deadhead.models import AllAttentionConfig, TransformerXLConfig
from deadhead.modes import best_device, flushing_denormals
from deadhead.plan import HeadPlan
from deadhead.timing import bench
from deadhead.training.checkpoints import newest_finished
from deadhead.training.choosing import asked_blocks
from deadhead.training.inputs import dense_folder, load_dense, prepare_text, require_same_training
from deadhead.training.phases import choose_units, train
from deadhead.training.preflight import require_fitting
from deadhead.training.processes import count, is_main, on_main
from deadhead.training.recipe import ModelRecipe, PhaseRecipe, Recipe, load_recipe, to_toml
from deadhead.training.reporting import require_trackers
from deadhead.training.rolling_back import rolled_back
from deadhead.training.summary import STAGES, read_summary, write_summary

RECIPE_FILE = "recipe.toml"
METRICS_FILE = "metrics.jsonl"

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""Told of the name of what goes on, how much is done, how much there is, and the last numbers."""


def model_config(recipe: ModelRecipe, vocab_size: int, **special_tokens: Any) -> AllAttentionConfig:
    """Return the configuration of a recipe's model, given its vocabulary.

    Raises:
        InputError: the sizes do not fit each other.
    """
    make: Any = AllAttentionConfig
    inner: dict[str, int] = {"num_persistent": recipe.persistent or 128}
    if recipe.architecture == "transformer_xl":
        make, inner = TransformerXLConfig, {"feed_forward_size": recipe.feed_forward or 4 * recipe.width}
    try:
        config: AllAttentionConfig = make(
            vocab_size=vocab_size,
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            **inner,
            memory_length=recipe.memory_length,
            segment_length=recipe.segment_length,
            position=recipe.position,
            adaptive_cutoffs=recipe.adaptive_cutoffs,
            attention_dropout=recipe.attention_dropout,
            hidden_dropout=recipe.hidden_dropout,
            embedding_dropout=recipe.embedding_dropout,
            output_dropout=recipe.output_dropout,
            **special_tokens,
        )
    except ValueError as error:
        raise InputError(f"The recipe's model does not fit together: {own_sentence(error)}") from None
    return config


def build_model(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """Return a fresh model for a tokenizer's vocabulary.

    Raises:
        InputError: the sizes do not fit each other.
    """
    config = model_config(recipe, len(tokenizer), **special_token_ids(tokenizer))
    set_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@dataclass
class Run:
    """A run's folder and recipe. `Run.start` makes or reopens one, `execute` does whatever is left of it.

    Under torchrun or `accelerate launch` every process calls both. All of them train; what writes to the folder,
    measures and times is done by the main one.

    Args:
        folder: where everything goes.
        recipe: what to do.
        progress: told of what goes on, in the main process.
        fresh: whether the folder was made just now.
        report_to: trackers that every phase reports to; see `deadhead.train`.
    """

    folder: Path
    recipe: Recipe
    progress: Progress = lambda *_: None
    fresh: bool = False
    report_to: Sequence[str] = ()

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        folder: str | Path,
        *,
        resume: bool = False,
        progress: Progress | None = None,
        report_to: Sequence[str] = (),
    ) -> Run:
        """Make a run's folder, or reopen it.

        Raises:
            InputError: the folder holds something else, holds a run and `resume` was not asked for, or holds a run of
                another recipe, or a tracker is not there.
        """
        require_trackers(report_to)
        folder = Path(folder)
        fresh = on_main(lambda: cls._open(recipe, folder, resume=resume))
        return cls(
            folder, recipe, progress if progress is not None and is_main() else lambda *_: None, fresh, report_to
        )

    @staticmethod
    def _open(recipe: Recipe, folder: Path, *, resume: bool) -> bool:
        """Make or check the folder; return whether it is new."""
        require_replaceable(folder, (RECIPE_FILE,))
        fresh = not (folder / RECIPE_FILE).exists()
        if not fresh:
            if not resume:
                raise InputError(
                    f"{folder} holds a run already; go on with --resume, or choose another place with --out."
                )
            # What others have published changes nothing in a run.
            begun, asked = (r.model_copy(update={"published": []}) for r in (load_recipe(folder / RECIPE_FILE), recipe))
            if begun != asked:
                raise InputError(
                    f"{folder} holds a run of another recipe; resume it with: "
                    f"deadhead run {folder / RECIPE_FILE} --out {folder} --resume."
                )
            remove_left_overs(folder)
            if (folder / "tokens").is_dir():
                remove_left_overs(folder / "tokens")
        else:
            if folder.is_dir():
                # Killed while the recipe was being written.
                remove_left_overs(folder, RECIPE_FILE)
            write_text(folder / RECIPE_FILE, to_toml(recipe))
        return fresh

    def execute(self) -> dict[str, Any]:
        """Run what is left of dense training, gates, cut and fine-tuning; return the summary.

        Every stage starts from what the one before left on disk, so a run that was stopped goes on to the same weights.

        Raises:
            InputError: the text or a checkpoint cannot be used. A folder of which nothing was used yet is gone again.
            DivergenceError: training diverged.
        """
        try:
            # From the beginning, so that a resumed process computes the same whichever phases it still has to train.
            with flushing_denormals():
                return self._execute()
        except BaseException:
            begun = self._done("dense") or newest_finished(self.folder / "checkpoints" / "train") is not None
            if self.fresh and not begun and is_main() and self.folder.exists():
                remove_folder(self.folder, last=RECIPE_FILE)
            raise

    def _execute(self) -> dict[str, Any]:
        recipe = self.recipe
        text, tokenizer = prepare_text(
            recipe.data,
            self.folder,
            tokenizer_of=None if recipe.dense is None or self._done("dense") else dense_folder(recipe.dense),
            progress=lambda done, total: self.progress("reading text, kB", done, total, {}),
        )
        on_main(lambda: self._note_beginning(text))
        steps = recipe.train.steps
        if not self._done("gated"):
            require_fitting(recipe, model_config(recipe.model, len(tokenizer)), text.splits["train"])
        if not self._done("dense"):
            if recipe.dense is None:
                model = build_model(recipe.model, tokenizer, seed=recipe.seed)
                self._train(model, text, "train", recipe.train, after=())
            else:
                trained = Path(recipe.dense).parent
                require_same_training(trained / RECIPE_FILE, recipe.train, text.sha256)
                model = load_dense(recipe.dense, model_config(recipe.model, len(tokenizer)))
            self._finish(model, "dense", steps, text, tokenizer)
        steps += recipe.prune.training_steps
        if not self._done("gated"):
            model = checkpoint.load(self.folder / "dense")
            gates = self._choose_heads(model, text)
            on_main(lambda: gates.plan().to_json(self.folder / checkpoint.PLAN_FILE))
            self._finish(model, "gated", steps, text, tokenizer)
        plan = HeadPlan.from_json(self.folder / checkpoint.PLAN_FILE)
        if not self._done("pruned"):
            model, gates = checkpoint.load_gated(self.folder / "gated")
            self._require_plan_of(gates, plan)
            cut(model, plan).to(best_device())  # type: ignore[arg-type]
            on_main(lambda: self._measure(model, "cut", steps, text))
            self._train(model, text, "finetune", recipe.finetune, after=(recipe.train, recipe.prune))
            self._finish(model, "pruned", steps + recipe.finetune.steps, text, tokenizer, stage="finetuned")
        if recipe.control and not self._done("control"):
            model = checkpoint.load(self.folder / "dense")
            # The same steps on the same text under the same schedules, only without gates and with every head.
            if recipe.prune.training_steps:
                self._train(model, text, "control_prune", recipe.prune, after=(recipe.train,))
            self._train(model, text, "control_finetune", recipe.finetune, after=(recipe.train, recipe.prune))
            self._finish(model, "control", steps + recipe.finetune.steps, text, tokenizer)
        on_main(lambda: self._compare(tokenizer))
        return self.summary()

    def _note_beginning(self, text: TokenizedCorpus) -> None:
        """Check that a run goes on as it began, and note how that was."""
        source, summary, processes = self.recipe.data.source, self.summary(), count()
        before = summary.get("data", {}).get("sha256", text.sha256)
        if before != text.sha256:
            raise InputError(
                f"The text {source} is not the one this run began with (its hash was {before[:12]}… and is "
                f"{text.sha256[:12]}…); begin a new run with --out, or bring the old text back."
            )
        # Runs of earlier versions had one process.
        begun = summary.get("processes", 1) if "data" in summary else processes
        if begun != processes:
            raise InputError(
                f"This run began with a number of processes of {begun}, and goes on with as many, but now it is "
                f"{processes}: each process reads rows of the text of its own."
            )
        data = {"source": source, "sha256": text.sha256, "tokens": len(text.splits["train"].tokens)}
        noted = {"data": data, "processes": processes, "versions": _versions()}
        write_summary(self.folder, {**summary, **noted})

    def _require_plan_of(self, gates: HeadGates, plan: HeadPlan) -> None:
        """Check that head_plan.json is what the gates learned: a changed digit would cut other heads."""
        if plan != gates.plan():
            raise InputError(
                f"{self.folder / checkpoint.PLAN_FILE} is not the plan of the gates in {self.folder / 'gated'}; it was "
                "changed or is damaged: restore it. A plan of your own is for deadhead cut."
            )

    def _choose_heads(self, model: PreTrainedModel, text: TokenizedCorpus) -> HeadGates:
        """Attach gates and close those of the heads that go; note what became of the budget."""
        recipe = self.recipe.prune
        gates, budget = choose_units(
            model,
            text.splits["train"],
            recipe,
            folder=self.folder,
            train_gates=lambda gates, latency: self._train(
                model, text, "prune", recipe, after=(self.recipe.train,), gates=gates, latency=latency
            ),
            seed=self.recipe.seed,
            first_segment=_segments_read((self.recipe.train,)) // recipe.batch_size,
            report=lambda done, total: self.progress("measuring latency", done, total, {}),
        )
        if budget is not None:
            on_main(lambda: self._note("budget", budget))
        return gates

    def summary(self) -> dict[str, Any]:
        """Return summary.json."""
        return read_summary(self.folder)

    def _done(self, name: str) -> bool:
        return (self.folder / name / "config.json").exists()

    def _note(self, key: str, value: Any) -> None:
        write_summary(self.folder, {**self.summary(), key: value})

    def _train(
        self,
        model: PreTrainedModel,
        text: TokenizedCorpus,
        phase: str,
        recipe: PhaseRecipe,
        *,
        after: tuple[PhaseRecipe, ...],
        gates: HeadGates | None = None,
        latency: Latency | None = None,
    ) -> None:
        folder = self.folder / "checkpoints" / phase
        # Each phase goes on in the text where those before it stopped, so that none gains from reading twice.
        train(
            model,
            text.splits["train"],
            recipe,
            folder=folder,
            phase=phase,
            seed=self.recipe.seed,
            first_segment=_segments_read(after) // recipe.batch_size,
            gates=gates,
            latency=latency,
            # The dense model, before gates and cuts, is what the pruned one is to stay near to.
            teacher=checkpoint.load(self.folder / "dense") if recipe.distill and phase != "train" else None,
            metrics=self.folder / METRICS_FILE,
            tensorboard=self.folder / "tensorboard" / phase,
            report_to=self.report_to,
            run_name=f"{self.recipe.name} {phase}",
            valid=text.splits["valid"],
            report=lambda done, total, logs: self.progress(phase, done, total, logs),
            resume=True,
        )
        if is_main() and (setback := rolled_back(folder)) is not None:
            self._note("rolled_back", {**self.summary().get("rolled_back", {}), phase: setback})

    def _finish(
        self,
        model: PreTrainedModel,
        name: str,
        steps: int,
        text: TokenizedCorpus,
        tokenizer: PreTrainedTokenizerBase,
        stage: str | None = None,
    ) -> None:
        """Measure and save a model, in the main process.

        Its folder appears last: whoever sees it finds the summary complete too.
        """

        def measure_and_save() -> None:
            measured = self._measure(model, stage or name, steps, text)
            checkpoint.save(
                model,
                self.folder / name,
                tokenizer=tokenizer,
                metrics={"validation perplexity a token": measured["perplexity"]},
            )
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

        on_main(measure_and_save)

    def _measure(self, model: PreTrainedModel, stage: str, steps: int, text: TokenizedCorpus) -> dict[str, Any]:
        result = evaluate(
            model,
            text.splits["valid"],
            limit=self.recipe.evaluation_tokens,
            progress=lambda done, total: self.progress(f"evaluating {stage}", done, total, {}),
        )
        cost = model_cost(model)
        heads, blocks = cost.heads, cost.blocks
        if stage == "gated":
            plan = HeadPlan.from_json(self.folder / checkpoint.PLAN_FILE)
            heads, blocks = plan.heads, [] if plan.blocks is None else plan.blocks.blocks
        has_blocks = asked_blocks(self.recipe.prune, model) is not False
        values = {
            "heads": heads,
            **({"blocks": blocks} if has_blocks else {}),
            "parameters": cost.parameters,
            "flops_per_token": cost.flops_per_token,
            "perplexity": result.perplexity,
            "word_perplexity": result.word_perplexity,
            "bits_per_byte": result.bits_per_byte,
            "tokens_per_second": result.tokens_per_second,
            "steps": steps,
        }
        self._note(stage, values)
        return values

    def _compare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Time the stages side by side, and let dense and pruned model continue the same text."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self.progress("timing", 0, 1, {})
        dense = checkpoint.load(self.folder / "dense")
        gated, _ = checkpoint.load_gated(self.folder / "gated")
        finetuned = checkpoint.load(self.folder / "pruned")
        models = {"dense": dense, "gated": gated, "finetuned": finetuned}
        for model in models.values():
            model.to(best_device())  # type: ignore[arg-type]
        # Several windows long, so that nearly every token sees a full one, as `flops_per_token` counts it.
        timings = bench(models, batch_size=4, length=4 * dense.config.memory_length, repeats=15)
        # Models of the same shapes take the same time.
        timed = {"cut": "finetuned", "control": "dense"}
        for stage in (*STAGES, *(["control"] if self.recipe.control else [])):
            rate = timings[timed.get(stage, stage)].tokens_per_second
            self._note(stage, {**self.summary()[stage], "tokens_per_second": round(rate, 1)})
        prompt = sample_prompt(self.recipe.data.source)
        after = {
            "dense": checkpoint.load(self.folder / "control") if self.recipe.control else dense.cpu(),
            "pruned": finetuned.cpu(),
        }
        self._note(
            "samples",
            {
                # Hardly trained models say their likelier words only.
                name: generate_text(model, tokenizer, prompt, max_new_tokens=160, temperature=0.6)
                for name, model in after.items()
            },
        )


def _segments_read(phases: tuple[PhaseRecipe, ...]) -> int:
    """Return the segments that each process reads in some phases; divided by its rows, the segments read of a row."""
    return sum(phase.training_steps * phase.gradient_accumulation * phase.batch_size for phase in phases)


def sample_prompt(source: str) -> str:
    """Return what models that learned from a text are given to continue."""
    # Ends before white space: tokenizers of byte pairs join it to what follows.
    return {"stdlib": "def read(self, size=-1):"}.get(source, "The")


def _versions() -> dict[str, str]:
    from deadhead import __version__

    return {
        "deadhead": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }

"""A run: a folder in which a recipe's phases leave dense, gated and pruned models, and what was measured of them."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deadhead.checkpoints import checkpoint
from deadhead.cutting import cut
from deadhead.data import TokenizedCorpus
from deadhead.disk.files import remove_folder, remove_left_overs, require_replaceable, write_text
from deadhead.errors import InputError
from deadhead.gates.gates import HeadGates
from deadhead.measure.cost import model_cost
from deadhead.measure.evaluation import evaluate
from deadhead.measure.generate import generate_text
from deadhead.measure.timing import bench
from deadhead.modes import best_device, flushing_denormals
from deadhead.plans.plan import HeadPlan
from deadhead.training.callbacks.reporting import require_trackers
from deadhead.training.phases.checkpoints import newest_finished
from deadhead.training.phases.choosing import asked_blocks, budget_length
from deadhead.training.processes import count, is_main, on_main
from deadhead.training.recipes.reading import load_recipe, to_toml
from deadhead.training.recipes.recipe import PhaseRecipe, Recipe
from deadhead.training.runs.inputs import (
    dense_folder,
    fingerprint,
    load_dense,
    prepare_text,
    require_same_training,
)
from deadhead.training.runs.models import build_model, model_config
from deadhead.training.runs.preflight import require_fitting
from deadhead.training.runs.summary import RECIPE_FILE, STAGES, read_summary, write_summary
from deadhead.training.runs.workplace import Place, Progress, measured_values, told


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
        report_to: trackers that every phase reports to; see `PhaseRun`.
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
        return cls(folder, recipe, told(progress), fresh, report_to)

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
            if to_toml(begun) != to_toml(asked):
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
            tokenizer_of=self._tokenizer_of(),
            progress=lambda done, total: self.progress("reading text, kB", done, total, {}),
        )
        on_main(lambda: self._note_beginning(text))
        before = () if recipe.dense_phase is None else (recipe.dense_phase,)
        if not self._done("gated"):
            require_fitting(recipe, self._config(tokenizer), text.splits["train"])
        if not self._done("dense"):
            self._make_dense(text, tokenizer)
        if not self._done("gated"):
            model = self._load_dense()
            gates = self._choose_units(model, self._place("prune", text, after=before))
            on_main(lambda: gates.plan().to_json(self.folder / checkpoint.PLAN_FILE))
            self._finish(model, "gated", text, tokenizer, after=(*before, recipe.prune))
        plan = HeadPlan.from_json(self.folder / checkpoint.PLAN_FILE)
        pruned = (*before, recipe.prune)
        if not self._done("pruned"):
            model, gates = checkpoint.load_gated(self.folder / "gated")
            self._require_plan_of(gates, plan)
            cut(model, plan).to(best_device())  # type: ignore[arg-type]
            on_main(lambda: self._measure(model, "cut", text, after=pruned))
            self._train(model, recipe.finetune, self._place("finetune", text, after=pruned))
            self._finish(model, "pruned", text, tokenizer, after=(*pruned, recipe.finetune), stage="finetuned")
        if recipe.control and not self._done("control"):
            model = self._load_dense()
            # The same steps on the same text under the same schedules, only without gates and with every head.
            if recipe.prune.training_steps:
                self._train(model, recipe.prune, self._place("control_prune", text, after=before))
            self._train(model, recipe.finetune, self._place("control_finetune", text, after=pruned))
            self._finish(model, "control", text, tokenizer, after=(*pruned, recipe.finetune))
        on_main(lambda: self._compare(tokenizer))
        return self.summary()

    def _config(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """Return the configuration of the dense model."""
        model = self.recipe.model
        return checkpoint.load_config(model.from_) if model.from_ else model_config(model, len(tokenizer))

    def _tokenizer_of(self) -> str | Path | None:
        """Return where the tokenizer of a model that exists already lies, unless the run has it too."""
        if self._done("dense"):
            return None
        return self.recipe.model.from_ if self.recipe.dense is None else dense_folder(self.recipe.dense)

    def _make_dense(self, text: TokenizedCorpus, tokenizer: PreTrainedTokenizerBase) -> None:
        """Train the dense model, or take one that was trained before."""
        recipe = self.recipe
        if recipe.dense is not None:
            require_same_training(Path(recipe.dense).parent / RECIPE_FILE, recipe.train, text.sha256)
            model = load_dense(recipe.dense, model_config(recipe.model, len(tokenizer)))
        elif recipe.model.from_ is not None:
            model = checkpoint.load(recipe.model.from_)
        else:
            model = build_model(recipe.model, tokenizer, seed=recipe.seed)
        if recipe.dense_phase is None:
            # It stays where it is; stages that begin from it check that it is still the same.
            digest = fingerprint(model)
            on_main(lambda: self._measure(model.to(best_device()), "dense", text, after=()))  # type: ignore[arg-type]
            on_main(lambda: self._note("model", {"from": str(recipe.model.from_), "sha256": digest}))
            return
        if recipe.trains_dense:
            self._train(model, recipe.train, self._place("train", text, after=()))
        self._finish(model, "dense", text, tokenizer, after=(recipe.train,))

    def _load_dense(self) -> PreTrainedModel:
        """Return the dense model.

        Raises:
            InputError: it lies outside the run, and is another by now.
        """
        if self.recipe.dense_phase is not None:
            return checkpoint.load(self.folder / "dense")
        model = checkpoint.load(str(self.recipe.model.from_))
        if fingerprint(model) != self.summary()["model"]["sha256"]:
            raise InputError(
                f"The model {self.recipe.model.from_} is not the one that this run began with: its weights are others; "
                "bring it back, or begin a new run with --out."
            )
        return model

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

    def _choose_units(self, model: PreTrainedModel, place: Place) -> HeadGates:
        """Attach gates and close those of the units that go; note what became of the budget."""
        gates, budget = place.choose_units(model, self.recipe.prune)
        self._note_setback(place)
        if budget is not None:
            on_main(lambda: self._note("budget", budget))
        return gates

    def summary(self) -> dict[str, Any]:
        """Return summary.json."""
        return read_summary(self.folder)

    def _done(self, name: str) -> bool:
        if name == "dense" and self.recipe.dense_phase is None:
            return "model" in self.summary()
        return (self.folder / name / "config.json").exists()

    def _note(self, key: str, value: Any) -> None:
        write_summary(self.folder, {**self.summary(), key: value})

    def _place(self, phase: str, text: TokenizedCorpus, *, after: tuple[PhaseRecipe, ...]) -> Place:
        """Return where a phase works that comes after others, whose text it goes on in, so that none reads it twice."""
        segments = sum(each.training_steps * each.gradient_accumulation * each.batch_size for each in after)
        recipe = {"train": self.recipe.train, "prune": self.recipe.prune, "finetune": self.recipe.finetune}
        return Place(
            phase=phase,
            folder=self.folder,
            within=phase,
            name=self.recipe.name,
            text=text.splits["train"],
            valid=text.splits["valid"],
            seed=self.recipe.seed,
            # Each process reads its rows; divided by them, what was read of a row.
            first_segment=segments // recipe[phase.removeprefix("control_")].batch_size,
            # The dense model, before gates and cuts, is what the pruned one is to stay near to.
            teacher=None if phase == "train" else self._load_dense,
            progress=self.progress,
            report_to=self.report_to,
            resume=True,
        )

    def _train(self, model: PreTrainedModel, recipe: PhaseRecipe, place: Place) -> None:
        place.train(model, recipe)
        self._note_setback(place)

    def _note_setback(self, place: Place) -> None:
        if is_main() and (setback := place.rolled_back()) is not None:
            self._note("rolled_back", {**self.summary().get("rolled_back", {}), place.phase: setback})

    def _finish(
        self,
        model: PreTrainedModel,
        name: str,
        text: TokenizedCorpus,
        tokenizer: PreTrainedTokenizerBase,
        *,
        after: tuple[PhaseRecipe, ...],
        stage: str | None = None,
    ) -> None:
        """Measure and save a model that has some phases behind it, in the main process.

        Its folder appears last: whoever sees it finds the summary complete too.
        """

        def measure_and_save() -> None:
            measured = self._measure(model, stage or name, text, after=after)
            checkpoint.save(
                model,
                self.folder / name,
                tokenizer=tokenizer,
                metrics={"validation perplexity a token": measured["perplexity"]},
                base=self.recipe.model.from_,
            )
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

        on_main(measure_and_save)

    def _measure(
        self, model: PreTrainedModel, stage: str, text: TokenizedCorpus, *, after: tuple[PhaseRecipe, ...]
    ) -> dict[str, Any]:
        """Measure a model that has some phases behind it, and note what was found."""
        result = evaluate(
            model,
            text.splits["valid"],
            limit=self.recipe.evaluation_tokens,
            progress=lambda done, total: self.progress(f"evaluating {stage}", done, total, {}),
        )
        cost = model_cost(model, unit=self.recipe.prune.unit)
        values = measured_values(cost, result, steps=sum(phase.training_steps for phase in after))
        blocks = cost.blocks
        if stage == "gated":
            plan = HeadPlan.from_json(self.folder / checkpoint.PLAN_FILE)
            values["heads"], blocks = plan.heads, [] if plan.blocks is None else plan.blocks.blocks
        if asked_blocks(self.recipe.prune, model) is not False:
            values["blocks"] = blocks
        self._note(stage, values)
        return values

    def _compare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Time the stages side by side, and let dense and pruned model continue the same text."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self.progress("timing", 0, 1, {})
        dense = self._load_dense()
        gated, _ = checkpoint.load_gated(self.folder / "gated")
        finetuned = checkpoint.load(self.folder / "pruned")
        models = {"dense": dense, "gated": gated, "finetuned": finetuned}
        for model in models.values():
            model.to(best_device())  # type: ignore[arg-type]
        # Several windows long, so that nearly every token sees a full one, as `flops_per_token` counts it.
        window = 4 * getattr(dense.config, "memory_length", 0)
        timings = bench(models, batch_size=4, length=window or budget_length(dense, self.recipe.prune), repeats=15)
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

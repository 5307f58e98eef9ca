"""A run: a folder in which a recipe's phases write dense, gated and pruned models and their measurements."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import deadhead
from deadhead.checkpoints import checkpoint
from deadhead.cutting import cut
from deadhead.data import TokenizedCorpus
from deadhead.disk.files import remove_folder, remove_left_overs, require_replaceable, write_text
from deadhead.disk.places import checked_path
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
from deadhead.training.phases.choosing import asked_blocks, budget_length, latency_in
from deadhead.training.phases.compensating import Compensating, calibration_of
from deadhead.training.phases.phase import PhaseRun, choose_units, train
from deadhead.training.phases.rolling_back import rolled_back
from deadhead.training.processes import Progress, count, counted, is_main, on_main, told
from deadhead.training.recipes.reading import load_recipe, to_toml
from deadhead.training.recipes.recipe import PhaseRecipe, Recipe
from deadhead.training.runs.inputs import (
    build_model,
    dense_folder,
    fingerprint,
    load_dense,
    load_ungated,
    model_config,
    prepare_text,
    require_fitting,
    require_same_training,
)
from deadhead.training.runs.results import measured_values
from deadhead.training.runs.summary import METRICS_FILE, RECIPE_FILE, STAGES, read_summary, write_summary

# How many of the phases, dense training, gates and fine-tuning, a phase goes on after, or a measured model has had.
_BEHIND = {"train": 0, "prune": 1, "control_prune": 1, "finetune": 2, "control_finetune": 2}
_BEHIND |= {"dense": 1, "gated": 2, "cut": 2, "finetuned": 3, "control": 3}


@dataclass
class Run:
    """A run's folder and recipe. `Run.start` creates or reopens a run, and `execute` does what is left of it.

    Under torchrun or `accelerate launch` every process calls both. All processes train; only the main one writes to the
    folder, measures and times.

    Args:
        folder: folder of all results.
        recipe: the recipe to run.
        progress: called with the progress, in the main process.
        fresh: whether the folder was just created.
        report_to: trackers that every phase reports to; see `PhaseRun`.
    """

    folder: Path
    recipe: Recipe
    progress: Progress = lambda *_: None
    fresh: bool = False
    report_to: Sequence[str] = ()
    _text: TokenizedCorpus = field(init=False, repr=False)
    _tokenizer: PreTrainedTokenizerBase = field(init=False, repr=False)

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
        """Create a run's folder, or reopen it.

        Raises:
            InputError: the folder holds something else, holds a run and `resume` is False, or holds a run of another
                recipe, or a tracker is not installed.
        """
        require_trackers(report_to)
        folder = checked_path(folder)
        fresh = on_main(lambda: cls._open(recipe, folder, resume=resume))
        return cls(folder, recipe, told(progress), fresh, report_to)

    @staticmethod
    def _open(recipe: Recipe, folder: Path, *, resume: bool) -> bool:
        """Create or check the folder; return whether it is new."""
        require_replaceable(folder, (RECIPE_FILE,))
        if not (folder / RECIPE_FILE).exists():
            if folder.is_dir():
                # Killed while the recipe was being written.
                remove_left_overs(folder, RECIPE_FILE)
            write_text(folder / RECIPE_FILE, to_toml(recipe))
            return True
        if not resume:
            raise InputError(
                f"{folder} holds a run already; continue it with resume (--resume), or choose another folder (--out)."
            )
        # What others have published changes nothing in a run.
        begun, asked = (r.model_copy(update={"published": []}) for r in (load_recipe(folder / RECIPE_FILE), recipe))
        if to_toml(begun) != to_toml(asked):
            raise InputError(
                f"{folder} holds a run of another recipe; resume it with: "
                f"deadhead run {folder / RECIPE_FILE} --out {folder} --resume."
            )
        for place in filter(Path.is_dir, (folder, folder / "tokens")):
            remove_left_overs(place)
        return False

    def execute(self) -> dict[str, Any]:
        """Run what is left of dense training, gates, cut and fine-tuning, and return the summary.

        Every stage starts from the files of the stage before it, so a resumed run reaches the same weights.

        Raises:
            InputError: the text or a checkpoint cannot be used. A new folder without results is removed again.
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
        tokenizer_of: str | Path | None = None
        if recipe.model.from_ is not None:
            # Before its tokenizer is looked for, and its text read.
            checkpoint.load_skeleton(recipe.model.from_)
        if not self._done("dense"):
            # A model that exists already has one.
            tokenizer_of = recipe.model.from_ if recipe.dense is None else dense_folder(recipe.dense)
        self._text, self._tokenizer = prepare_text(
            recipe.data, self.folder, tokenizer_of=tokenizer_of, progress=counted(self.progress, "reading text, kB")
        )
        on_main(self._note_beginning)
        if not self._done("gated"):
            require_fitting(recipe, self._config(), self._text.splits["train"])
        if not self._done("dense"):
            self._make_dense()
        if not self._done("gated"):
            model = self._load_dense()
            gates = self._choose_units(model)
            on_main(lambda: gates.plan().to_json(self.folder / checkpoint.PLAN_FILE))
            self._finish(model, "gated")
        plan = HeadPlan.from_json(self.folder / checkpoint.PLAN_FILE)
        if not self._done("pruned"):
            model, gates = checkpoint.load_gated(self.folder / "gated")
            self._require_plan_of(gates, plan)
            cut(model, plan).to(best_device())  # type: ignore[arg-type]
            on_main(lambda: self._measure(model, "cut"))
            self._compensate(model)
            self._train(model, "finetune")
            self._finish(model, "pruned", stage="finetuned")
        if recipe.control and not self._done("control"):
            model = self._load_dense()
            # The same steps on the same text under the same schedules, only without gates and with every head.
            if recipe.prune.training_steps:
                self._train(model, "control_prune")
            self._train(model, "control_finetune")
            self._finish(model, "control")
        on_main(self._compare)
        return self.summary()

    def _compensate(self, model: PreTrainedModel) -> None:
        """Fit the cut model to the dense model's outputs, if the recipe, or its default, asks for it."""
        text = self._text.splits["train"]
        if batches := calibration_of(model, text, self.recipe.prune, seed=self.recipe.seed):
            compensating = Compensating(self._load_dense(), batches, f"text {self._text.sha256[:12]}")
            found = compensating.of(model, self.progress)
            on_main(lambda: self._note("compensation", found.to_dict()))

    def _config(self) -> PreTrainedConfig:
        """Return the configuration of the dense model."""
        model = self.recipe.model
        return checkpoint.load_config(model.from_) if model.from_ else model_config(model, len(self._tokenizer))

    def _make_dense(self) -> None:
        """Train the dense model, or use one that was trained before."""
        recipe = self.recipe
        if recipe.dense is not None:
            require_same_training(Path(recipe.dense).parent / RECIPE_FILE, recipe.train, self._text.sha256)
            model = load_dense(recipe.dense, self._config())
        elif recipe.model.from_ is not None:
            model = load_ungated(recipe.model.from_)
        else:
            model = build_model(recipe.model, self._tokenizer, seed=recipe.seed)
        if recipe.dense_phase is None:
            # It stays where it is; stages that begin from it check that it is still the same.
            digest = fingerprint(model)
            on_main(lambda: self._measure(model.to(best_device()), "dense"))  # type: ignore[arg-type]
            on_main(lambda: self._note("model", {"from": str(recipe.model.from_), "sha256": digest}))
            return
        if recipe.trains_dense:
            self._train(model, "train")
        self._finish(model, "dense")

    def _load_dense(self) -> PreTrainedModel:
        """Return the dense model; check that one outside the run has not changed."""
        if self.recipe.dense_phase is not None:
            return checkpoint.load(self.folder / "dense")
        model = checkpoint.load(str(self.recipe.model.from_))
        if fingerprint(model) != self.summary()["model"]["sha256"]:
            raise InputError(
                f"The model {self.recipe.model.from_} has other weights than when this run started; restore the model, "
                "or start a new run in another folder."
            )
        return model

    def _note_beginning(self) -> None:
        """Record how a run started, and check that it is resumed in the same way."""
        text = self._text
        source, summary, processes = self.recipe.data.source, self.summary(), count()
        before = summary.get("data", {}).get("sha256", text.sha256)
        if before != text.sha256:
            raise InputError(
                f"The text {source} is not the one that this run started with (its hash was {before[:12]}… and is now "
                f"{text.sha256[:12]}…); restore the old text, or start a new run in another folder."
            )
        # Runs of earlier versions had one process.
        begun = summary.get("processes", 1) if "data" in summary else processes
        if begun != processes:
            raise InputError(
                f"This run was started with {begun} process(es), but resumed with {processes}; resume it with {begun}, "
                "because each process reads its own rows of the text."
            )
        data = {"source": source, "sha256": text.sha256, "tokens": len(text.splits["train"].tokens)}
        versions = {
            "deadhead": deadhead.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "threads": str(torch.get_num_threads()),
        }
        write_summary(self.folder, {**summary, "data": data, "processes": processes, "versions": versions})

    def _require_plan_of(self, gates: HeadGates, plan: HeadPlan) -> None:
        """Check that head_plan.json is the plan of the gates, because a changed digit would cut other heads."""
        if plan != gates.plan():
            raise InputError(
                f"{self.folder / checkpoint.PLAN_FILE} is not the plan of the gates in {self.folder / 'gated'}, "
                "because it was changed or is damaged; restore it, or apply your own plan with deadhead cut."
            )

    def _choose_units(self, model: PreTrainedModel) -> HeadGates:
        """Attach gates and close those of the units to remove; record the value that the budget reached."""
        recipe, (_, run) = self.recipe.prune, self._phase_run("prune")
        latency = on_main(lambda: latency_in(self.folder, model, recipe, self.progress))
        gates, budget = choose_units(model, self._text.splits["train"], recipe, replace(run, latency=latency))
        self._note_setback("prune")
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

    def _behind(self, name: str) -> list[PhaseRecipe]:
        """Return the phases before a phase, or those of a measured model."""
        phases = (self.recipe.dense_phase, self.recipe.prune, self.recipe.finetune)
        return [phase for phase in phases[: _BEHIND[name]] if phase is not None]

    def _phase_run(self, phase: str) -> tuple[PhaseRecipe, PhaseRun]:
        """Return a phase's recipe and arguments; its text begins after that of earlier phases, so none reads twice."""
        recipe: PhaseRecipe = getattr(self.recipe, phase.removeprefix("control_"))
        segments = sum(
            each.training_steps * each.gradient_accumulation * each.batch_size for each in self._behind(phase)
        )
        # The dense model, before gates and cuts, is what the pruned one is to stay near to.
        learns_from_dense = recipe.distill and recipe.training_steps and phase != "train"
        return recipe, PhaseRun(
            folder=self.folder / "checkpoints" / phase,
            phase=phase,
            seed=self.recipe.seed,
            # Each process reads its rows; divided by them, what was read of a row.
            first_segment=segments // recipe.batch_size,
            teacher=self._load_dense() if learns_from_dense else None,
            metrics=self.folder / METRICS_FILE,
            tensorboard=self.folder / "tensorboard" / phase,
            report_to=self.report_to,
            run_name=f"{self.recipe.name} {phase}",
            valid=self._text.splits["valid"],
            progress=self.progress,
            resume=True,
        )

    def _train(self, model: PreTrainedModel, phase: str) -> None:
        train(model, self._text.splits["train"], *self._phase_run(phase))
        self._note_setback(phase)

    def _note_setback(self, phase: str) -> None:
        if is_main() and (setback := rolled_back(self.folder / "checkpoints" / phase)) is not None:
            self._note("rolled_back", {**self.summary().get("rolled_back", {}), phase: setback})

    def _finish(self, model: PreTrainedModel, name: str, *, stage: str | None = None) -> None:
        """Measure and save a model, in the main process.

        Its folder appears last, so the summary is complete once the folder exists.
        """

        def measure_and_save() -> None:
            measured = self._measure(model, stage or name)
            checkpoint.save(
                model,
                self.folder / name,
                tokenizer=self._tokenizer,
                metrics={"validation perplexity a token": measured["perplexity"]},
                base=self.recipe.model.from_,
            )
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

        on_main(measure_and_save)

    def _measure(self, model: PreTrainedModel, stage: str) -> dict[str, Any]:
        """Measure a model, and record the results."""
        progress = counted(self.progress, f"evaluating {stage}")
        result = evaluate(model, self._text.splits["valid"], limit=self.recipe.evaluation_tokens, progress=progress)
        cost = model_cost(model, unit=self.recipe.prune.unit)
        values = measured_values(cost, result, steps=sum(phase.training_steps for phase in self._behind(stage)))
        hidden_units = cost.hidden_units
        if stage == "gated":
            plan = HeadPlan.from_json(self.folder / checkpoint.PLAN_FILE)
            values["heads"] = plan.heads
            hidden_units = [] if plan.hidden_units is None else plan.hidden_units.counts
        if asked_blocks(self.recipe.prune, model) is not False:
            values["hidden_units"] = hidden_units
        self._note(stage, values)
        return values

    def _compare(self) -> None:
        """Time the stages in turn, and let the dense and the pruned model continue the same text."""
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
        unpruned = checkpoint.load(self.folder / "control") if self.recipe.control else dense.cpu()
        after = {"dense": unpruned, "pruned": finetuned.cpu()}
        # Hardly trained models say their likelier words only.
        how: dict[str, Any] = {"max_new_tokens": 160, "temperature": 0.6}
        samples = {name: generate_text(model, self._tokenizer, prompt, **how) for name, model in after.items()}
        self._note("samples", samples)


def sample_prompt(source: str) -> str:
    """Return the beginning that models trained on a text are asked to continue."""
    # Ends before white space: tokenizers of byte pairs join it to what follows.
    return {"stdlib": "def read(self, size=-1):"}.get(source, "The")

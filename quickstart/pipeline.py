"""The quickstart from parts to report. Every step leaves its result in a folder, so that a killed run goes on."""

import json
import resource
from pathlib import Path
from typing import Any

import torch

from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..processing.processing_unimoe import UniMoeProcessor
from ..starter_corpus.corpus import corpus_root, verify
from ..trainers.caches.encoder_cache import EncoderCache
from ..trainers.curriculum import load_start_model, run_curriculum
from ..trainers.data.conversations import ConversationDataset
from ..trainers.recipe.recipe import Recipe
from ..trainers.stages.assembly import assemble
from ..trainers.stages.stage import StageReport
from .augment_videos import vary_videos
from .baselines import heldout_baselines
from .dense_twin import train_dense_twin
from .evaluate import accuracy_by_task, answer_samples, load_by_modality, spread
from .fresh_process import answer_in_fresh_process
from .parts import Part
from .prepare import assemble_start, encode_media, find_parts, prepare_dense
from .results import (
    Outcome,
    example_rows,
    print_finished,
    print_outcome,
    save_model_folder,
    stage_metrics,
    write_results,
)
from .run import Quickstart
from .stages import EXPERTS, MOMENTS, language_recipe, multimodal_recipe

INTERIM_SAMPLES_PER_TASK = 50


def run_quickstart(run: Quickstart) -> dict[str, Any]:
    """Do everything; returns the content of metrics.json."""
    with run.attempt():
        torch.manual_seed(run.seed)
        parts = find_parts(run)
        run.require_same_run(parts)
        done = run.finished_metrics()
        if done is not None and ("dense_twin" in done or not run.compare):
            print_finished(run, done)
            return done
        run.say(f"Corpus: {verify()} files checked in {corpus_root()}")
        outcome = _make_and_train(run, parts)
        print_outcome(run, outcome)
    return outcome.metrics


def _make_and_train(run: Quickstart, parts: list[Part]) -> Outcome:
    heldout = run.heldout_samples()
    model, processor = assemble_start(run, parts)
    caches = encode_media(run, model, processor, heldout)
    trained = _Training(run, processor, *caches, heldout)
    reports = []
    if run.language_model is None:
        recipe = language_recipe(run.work / "start", run.work, run.seed, run.budget, run.precision())
        reports = trained.run_stages(recipe, run.language_dataset())
    dense = prepare_dense(run, Path(reports[-1].model) if reports else run.work / "start", processor)
    layers = model.config.text_config.num_hidden_layers
    recipe = multimodal_recipe(dense, run.work, run.seed, run.budget, layers, run.precision())
    reports += trained.run_stages(recipe, ConversationDataset.from_samples(run.training_samples()))
    outcome = _finish(run, trained, load_start_model(reports[-1].model, recipe), reports, parts)
    if run.compare:
        outcome.metrics["dense_twin"] = train_dense_twin(run, reports, processor, caches, heldout)
        write_results(run, outcome)
    return outcome


class _Training:
    """The trained stages and the accuracy after each."""

    def __init__(
        self,
        run: Quickstart,
        processor: UniMoeProcessor,
        train_cache: EncoderCache,
        test_cache: EncoderCache,
        heldout: list[dict[str, Any]],
    ) -> None:
        self.run, self.processor = run, processor
        self.train_cache, self.test_cache = train_cache, test_cache
        self.heldout = heldout
        self.accuracy: dict[str, dict[str, float]] = {}

    def run_stages(self, recipe: Recipe, dataset: ConversationDataset) -> list[StageReport]:
        reports = run_curriculum(
            recipe,
            processor=self.processor,
            dataset=dataset,
            cache=self.train_cache,
            augment=vary_videos,
            on_progress=lambda _: self.run.note_time(),
            on_stage_start=self._announce,
            on_stage_end=lambda report, model, _: self._after_stage(recipe, report, model),
        )
        for report in reports:
            if report.name in MOMENTS:
                self.accuracy[MOMENTS[report.name]] = report.evaluation["accuracy"]
        return reports

    def _announce(self, name: str, table: list[Any], steps: int) -> None:
        trained = ", ".join(f"{row.trainable:,} {row.role}" for row in table if row.trainable)
        self.run.say(f"{name}: {steps} steps; trains {trained} parameters")

    def _after_stage(self, recipe: Recipe, report: StageReport, model: UniMoeForCausalLM) -> dict[str, Any] | None:
        self.run.say(
            f"{report.name}: loss {report.loss_first:.2f} -> {report.loss_last:.2f} in {report.seconds:.0f} s"
        )
        if report.name not in MOMENTS:
            return None
        if report.kind == "experts":
            folders = [Path(recipe.out) / report.name / name for name in EXPERTS]
            model = assemble(load_start_model(report.model, recipe), recipe.moe, folders, recipe.seed)
        samples = spread(self.heldout, INTERIM_SAMPLES_PER_TASK)
        accuracy = accuracy_by_task(answer_samples(model, self.processor, self.test_cache, samples))
        shown = ", ".join(f"{task} {100 * value:.0f} %" for task, value in accuracy.items())
        self.run.say(f"  held out {MOMENTS[report.name]}: {shown}")
        return {"accuracy": accuracy}


def _finish(
    run: Quickstart, trained: _Training, model: UniMoeForCausalLM, reports: list[StageReport], parts: list[Part]
) -> Outcome:
    """Evaluate the final model, save it with its numbers, and let it answer in a process without this package."""
    run.say("The final model answers all held-out questions, freely, as text")
    answers = answer_samples(model, trained.processor, trained.test_cache, trained.heldout)
    accuracy = accuracy_by_task(answers)
    baselines = heldout_baselines(run.training_samples(), trained.heldout, trained.train_cache, trained.test_cache)
    router_load = {
        "layers": sorted(model.config.text_config.sparse_layers),
        "experts": list(EXPERTS),
        "modalities": load_by_modality(model, trained.processor, trained.test_cache, trained.heldout),
    }
    earlier = run.finished_metrics()
    metrics = {
        "seconds": run.total_seconds,
        "seed": run.seed,
        "stages": [stage_metrics(report) for report in reports],
        "heldout": {task: {"accuracy": accuracy[task], **row} for task, row in baselines.items()},
        "accuracy_by_stage": trained.accuracy,
        "upcycling": json.loads((run.work / "upcycling.json").read_text(encoding="utf-8")),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    save_model_folder(run, model, trained.processor, metrics, router_load, parts)
    examples = example_rows(answers)
    said = answer_in_fresh_process(run.out / "model", examples)
    # A finished run that is only being compared has taken its time already.
    metrics["seconds"] = earlier["seconds"] if earlier else run.total_seconds
    outcome = Outcome(metrics, reports, parts, router_load, examples, said)
    write_results(run, outcome)
    return outcome

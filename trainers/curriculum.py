"""Runs a recipe: its stages in order, each in a folder of its own, from any point where it was stopped.

OUT/recipe.yaml
OUT/<stage>/settings.json    what the stage was started with, see `stage_settings`
OUT/<stage>/plan.json        steps that were decided, and the speed that was measured for it
OUT/<stage>/losses.jsonl     one line per log
OUT/<stage>/telemetry.jsonl, report.html    expert load, speed and memory; all of it drawn, when the stage is done
OUT/<stage>/bad_samples.jsonl    unreadable samples that were left out, if there were any
OUT/<stage>/checkpoints/     gone when the stage is done
OUT/<stage>/start/           "moe" on several ranks only: the assembled model that they read; gone when the stage is done
OUT/<stage>/model/           the model after the stage (not for "experts")
OUT/<stage>/<expert>/        "experts" only: the same, with expert.safetensors, connectors.safetensors
OUT/<stage>/stage.json       the report
OUT/<stage>/DONE             the stage is finished; size and SHA-256 of what it left
"""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..conversion.checkpoints.parameters import count_parameters
from ..conversion.publishing.hub import complete_bundle
from ..conversion.publishing.model_card import model_card
from ..errors import RecipeError
from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..progress_bars import transformers_bars
from .caches.encoder_cache import EncoderCache
from .caches.perceived import PerceivedCollator, keep_perception
from .data.bad_samples import TolerantCollator
from .data.batching import row_rules
from .data.collator import Augment, CachedCollator, RawCollator
from .data.conversations import ConversationDataset
from .data.data_sets import TrainingData, in_memory, open_data
from .data.sampler import ModalityBatchSampler
from .parallel.parallel_run import joined
from .parallel.ranks import first_goes_ahead, is_first, of_first, only_first, wait_for_all
from .planning.plan import require_cache_where_needed, require_data, require_model_folder
from .recipe.recipe import Recipe, StageConfig
from .recipe.recipe_data import DataEntry, settings_of
from .recipe.recipe_file import save_recipe
from .recipe.recipe_parts import ExpertConfig
from .saving.folder_lock import exclusive
from .stages.assembly import (
    assemble,
    connector_owners,
    expert_modalities,
    require_roles_of_experts,
    roles_of,
    save_expert,
    save_router_means,
    trained_by,
)
from .stages.mixer_stage import prepare_mixers, wanted_mixers
from .stages.moe_fit import require_fitting_moe, sparse_layers
from .stages.stage import OnProgress, OnStageStart, RunSettings, StageReport, run_training
from .stages.stage_files import (
    DONE_FILE,
    MODEL_FOLDER,
    START_FOLDER,
    clear_work,
    mark_done,
    saved_report,
    verify_results,
    write_report,
    written_aside,
)
from .stages.stage_processor import confined, processor_of
from .stages.stage_settings import keep_settings, require_same_data, require_same_settings
from .stages.start_model import load_processor, load_start_model, with_implementations

OnStageEnd = Callable[[StageReport, UniMoeForCausalLM, Any], dict[str, Any] | None]


def run_curriculum(
    recipe: Recipe,
    model: UniMoeForCausalLM | None = None,
    processor: Any = None,
    dataset: TrainingData | None = None,
    cache: EncoderCache | None = None,
    augment: Augment | None = None,
    on_progress: OnProgress | None = None,
    on_stage_start: OnStageStart | None = None,
    on_stage_end: OnStageEnd | None = None,
    progress_bar: bool = True,
    training_arguments: dict[str, Any] | None = None,
) -> list[StageReport]:
    """Run all stages that are not done yet.

    Args:
        model, processor: where the first stage starts; loaded from `recipe.model` when None. The model is changed.
        dataset: in place of `recipe.data`; a stage's own `data` still counts.
        cache: states of the frozen towers, in place of `recipe.cache`; media that it lacks are encoded first.
        augment: see `CachedCollator`.
        on_progress: called at every log with a `Progress`.
        on_stage_start: called with a run's name, its table of what trains and its number of steps.
        on_stage_end: called with a stage's report, its model (in eval mode) and the processor; what it returns is kept
            in the report. For "experts" the model is the one that the stage started from.
        training_arguments: override `TrainingArguments` of every stage.

    Returns:
        One report per stage, also for those done earlier.

    Raises:
        RecipeError: the recipe is impossible, or a stage in `recipe.out` was made with other settings or other data.
        DataError, CheckpointError, TrainingError: see their makers.
    """
    recipe.check()
    _require_all_there(recipe, model, processor, dataset, cache)
    out = Path(recipe.out)
    with joined(recipe.parallel), exclusive(out) if is_first() else nullcontext(), transformers_bars(shown=False):
        run = _Curriculum(
            recipe,
            model,
            processor,
            dataset,
            cache,
            augment,
            on_stage_end,
            on_start=on_stage_start if is_first() else None,
            on_progress=on_progress if is_first() else None,
            progress_bar=progress_bar and is_first(),
            max_bad_samples=recipe.max_bad_samples,
            gradient_checkpointing=recipe.gradient_checkpointing,
            telemetry=recipe.telemetry,
            training_arguments=dict(training_arguments or {}),
        )
        for stage in recipe.stages:
            require_same_settings(out / stage.name, stage.name, run.settings_of(stage))
        only_first(lambda: save_recipe(recipe, out / "recipe.yaml"))
        return [run.stage(stage) for stage in recipe.stages]


def _require_all_there(
    recipe: Recipe, model: UniMoeForCausalLM | None, processor: Any, dataset: TrainingData | None, cache: Any
) -> None:
    """Raise, before anything is loaded, where something is missing or does not fit."""
    if model is not None and recipe.parallel.ranks > 1:
        raise RecipeError("Several ranks load the model themselves: give it as the recipe's model, a folder.")
    if cache is None and recipe.cache is None:
        require_cache_where_needed(recipe)
    if processor is None:
        require_model_folder(recipe.model)
    if dataset is None and not Path(recipe.out).exists():
        require_data(recipe)
    require_fitting_moe(recipe, None if model is None else model.config)


class _Curriculum:
    """The state that goes from stage to stage; `run_options` are further fields of `RunSettings`."""

    def __init__(
        self,
        recipe: Recipe,
        model: UniMoeForCausalLM | None,
        processor: Any,
        dataset: TrainingData | None,
        cache: EncoderCache | None,
        augment: Augment | None,
        on_stage_end: OnStageEnd | None,
        **run_options: Any,
    ) -> None:
        self.recipe = recipe
        self.model = None if model is None else with_implementations(model, recipe)
        self.model_folder = Path(recipe.model)
        self.processor = processor if processor is not None else load_processor(recipe.model)
        self.dataset = dataset
        self.cache = cache
        self.augment = augment
        self.on_stage_end = on_stage_end
        self.expert_folders: list[Path] = []
        self.reader = confined(self.processor, recipe.media_root)
        self.processors = {stage.name: processor_of(stage, self.reader) for stage in recipe.stages}
        self.settings = RunSettings(
            self.processor,
            self.collator,
            seed=recipe.seed,
            precision=recipe.precision,
            parallel=recipe.parallel,
            **run_options,
        )

    def stage(self, stage: StageConfig) -> StageReport:
        """Run one stage, or take over what it left when it was done."""
        folder = Path(self.recipe.out) / stage.name
        report, done = of_first((saved_report(folder), (folder / DONE_FILE).is_file()))
        if report is None:
            report = self._run(stage, folder)
        else:
            # Not the path in the report: the whole output may have been moved.
            self._enter(folder / MODEL_FOLDER if stage.kind != "experts" else self.model_folder, load=not done)
            if done:
                only_first(lambda: clear_work(folder))
            else:
                report = self._finish(report, folder)
        if stage.kind == "experts":
            self.expert_folders = [folder / expert.name for expert in stage.experts]
        return report

    def collator(self, stage: StageConfig) -> Any:
        processor = self.processors[stage.name]
        collator: Any = RawCollator(processor, self.recipe.pad_to_multiple_of, row_rules(stage))
        if self.cache is not None:
            collator = CachedCollator(
                processor,
                self.cache,
                self.recipe.pad_to_multiple_of,
                feature_noise=stage.feature_noise,
                token_dropout=stage.token_dropout,
                augment=self.augment,
                rules=row_rules(stage),
            )
        if self.recipe.perception is not None:
            collator = PerceivedCollator(collator, self.recipe.perception)
        return TolerantCollator(collator)

    def _run(self, stage: StageConfig, folder: Path) -> StageReport:
        if self.recipe.parallel.ranks > 1:
            self.model = None  # an engine has wrapped it, or it must be spread
        self._change_model(stage, folder)
        self._enter(self.model_folder)
        folder.mkdir(parents=True, exist_ok=True)
        keep_settings(folder, self.settings_of(stage))
        dataset = self._data(stage)
        if stage.kind == "experts":
            report = self._train_experts(stage, in_memory(dataset, f"The stage {stage.name!r}"), folder)
            return self._finish(report, folder)
        self.model, report = run_training(self.model, dataset, stage, folder, self.settings)
        self._save_model(folder / MODEL_FOLDER)
        self.model_folder = folder / MODEL_FOLDER
        report.model = str(self.model_folder)
        return self._finish(report, folder)

    def _change_model(self, stage: StageConfig, folder: Path) -> None:
        """Give the current model experts and mixers where the stage wants them; several ranks read what one has made."""
        if stage.kind == "moe":
            for own in self.expert_folders:
                verify_results(own)
        start = folder / START_FOLDER
        if self.recipe.parallel.ranks == 1:
            self._enter(self.model_folder)
            self.model = self._changed(self.model, stage)
            return
        text = UniMoeConfig.from_pretrained(self.model_folder).text_config
        if stage.kind != "moe" and wanted_mixers(text, stage.train, self.recipe.mixers, stage.name) is None:
            return
        if is_first() and not start.exists():
            model = UniMoeForCausalLM.from_pretrained(self.model_folder, dtype=torch.float32)
            with written_aside(start) as written:
                self._changed(model, stage).save_pretrained(written)
        wait_for_all()
        self._enter(start, load=False)

    def _changed(self, model: UniMoeForCausalLM, stage: StageConfig) -> UniMoeForCausalLM:
        if stage.kind == "moe":
            model = self._sparse(model)
        prepare_mixers(model, stage.train, self.recipe.mixers, self.recipe.seed, stage.name)
        return model

    def _sparse(self, dense: UniMoeForCausalLM) -> UniMoeForCausalLM:
        sparse = assemble(dense, self.recipe.moe, self.expert_folders, self.recipe.seed)
        return with_implementations(sparse, self.recipe)

    def _train_experts(self, stage: StageConfig, dataset: ConversationDataset, folder: Path) -> StageReport:
        layers = sparse_layers(self.model.config.text_config, self.recipe.moe)
        owners = connector_owners(self.model, [(e.name, expert_modalities(dataset, e)) for e in stage.experts])
        require_roles_of_experts(self.model, stage, owners, layers)
        runs = []
        for expert in stage.experts:
            own = folder / expert.name
            done = saved_report(own) if (own / DONE_FILE).is_file() else None
            if done:
                only_first(functools.partial(clear_work, own))
            runs.append(done or self._train_expert(stage, expert, dataset, own, layers, owners))
        return StageReport(
            name=stage.name,
            kind=stage.kind,
            steps=sum(run.steps for run in runs),
            seconds=sum(run.seconds for run in runs),
            trainable_parameters=sum(run.trainable_parameters for run in runs),
            loss_first=sum(run.loss_first for run in runs) / len(runs),
            loss_last=sum(run.loss_last for run in runs) / len(runs),
            model=str(self.model_folder),
            runs=runs,
        )

    def _train_expert(
        self,
        stage: StageConfig,
        expert: ExpertConfig,
        dataset: ConversationDataset,
        folder: Path,
        layers: list[int],
        owners: dict[str, str],
    ) -> StageReport:
        """Train one copy of the FFN in place, keep it in a folder, and put the dense one back."""
        trained = trained_by(expert.name, owners, layers)
        own_data = dataset.select(expert.modalities)
        stage = _stage_of_expert(stage, expert, own_data, roles_of(self.model, trained))
        reloads = self.recipe.parallel.uses_deepspeed  # which does not let go of the model
        saved = {n: p.detach().clone() for n, p in self.model.named_parameters() if trained(n) and not reloads}
        name = f"{stage.name}/{expert.name}"
        self.model, report = run_training(
            self.model, own_data, stage, folder, self.settings, name=name, trained_names=trained
        )
        collator = self.collator(stage)
        sampler = ModalityBatchSampler(own_data.groups, stage.batch_size, seed=self.recipe.seed)
        batches = (collator([own_data[draw.index] for draw in draws]) for draws in sampler)
        if is_first() or not reloads:  # ZeRO-3 leaves a model to the first rank only
            save_router_means(self.model, batches, layers, folder)
        save_expert(self.model, folder, trained)
        wait_for_all()
        if reloads:
            self.model = load_start_model(self.model_folder, self.recipe)
        with torch.no_grad():
            for parameter_name, parameter in self.model.named_parameters():
                if parameter_name in saved:
                    parameter.copy_(saved[parameter_name])
        write_report(report, folder)
        only_first(lambda: mark_done(folder))
        return report

    def _finish(self, report: StageReport, folder: Path) -> StageReport:
        write_report(report, folder)
        if self.on_stage_end is not None:
            report.evaluation = self.on_stage_end(report, self.model.eval(), self.processor)
            write_report(report, folder)
        only_first(lambda: mark_done(folder))
        return report

    def _data(self, stage: StageConfig) -> TrainingData:
        def read(data: list[str | DataEntry]) -> TrainingData:
            recipe = self.recipe
            return open_data(data, recipe.media_root, recipe.voice_as, recipe.max_bad_samples)

        if stage.data is not None:
            dataset = read(stage.data)
        else:
            self.dataset = self.dataset or read(self.recipe.data)
            dataset = self.dataset
        dataset = dataset.select(stage.modalities)
        require_same_data(Path(self.recipe.out) / stage.name, stage.name, dataset)
        if self.cache is None and self.recipe.cache is not None:
            self.cache = EncoderCache(self.recipe.cache, self.model, self.reader)
        if self.cache is not None:
            if self.recipe.parallel.ranks > 1:
                self.cache.model = self.model  # an engine has changed the one before
            samples = in_memory(dataset, "The cache").samples
            with first_goes_ahead():
                self.cache.build(samples, self.settings.progress_bar, skip_unreadable=True)
        return dataset

    def _enter(self, folder: Path, load: bool = True) -> None:
        """Make the model of a folder the current one; it is loaded when it is not in memory yet."""
        if folder != self.model_folder:
            self.model = None
            self.model_folder = folder
        if load and self.model is None:
            verify_results(folder.parent)
            self.model = load_start_model(folder, self.recipe)

    def _save_model(self, folder: Path) -> None:
        """A whole bundle: what a recipe leaves behind loads where unimoe is not installed."""
        aside = written_aside(folder) if is_first() else nullcontext(folder.with_name(f"{folder.name}.new"))
        with aside as written:
            wait_for_all()  # until the first rank has cleared the place
            if is_first() or self.recipe.parallel.shards_models:  # ranks put their parts together
                self.model.save_pretrained(written, is_main_process=is_first())
            if is_first():
                self.processor.save_pretrained(written)
                sections = keep_perception(self.recipe.model, self.recipe.perception, written)
                name, config = Path(self.recipe.out).name, self.model.config
                card = model_card(name, config, count_parameters(config), sections=sections)
                complete_bundle(written, card)
        wait_for_all()

    def settings_of(self, stage: StageConfig) -> dict[str, Any]:
        """What decides about a stage's results, apart from its samples."""
        moe = None if stage.kind == "train" or self.recipe.moe is None else asdict(self.recipe.moe)
        shared = {"seed": self.recipe.seed, "precision": self.recipe.precision}
        data = settings_of(self.recipe.data if stage.data is None else stage.data)
        mixers = {} if self.recipe.mixers is None else {"mixers": asdict(self.recipe.mixers)}
        return {"stage": asdict(stage), "moe": moe, **mixers, **shared, "data": data}


def _stage_of_expert(
    stage: StageConfig, expert: ExpertConfig, dataset: ConversationDataset, roles: set[str]
) -> StageConfig:
    """A stage's settings for one of its experts: only roles that its run has, weights of its own data only."""
    train = [role for role in stage.train if role in roles]
    names = {name for group in dataset.groups for name in dataset.names_of(group)}
    weights = {name: weight for name, weight in stage.modality_weights.items() if name in names}
    return dataclasses.replace(stage, train=train, modality_weights=weights, steps=stage.steps_of(expert))

"""A recipe: what a curriculum trains, on what, in which stages. `recipe_file` reads and writes it as YAML.

Everything that can be checked without opening a model or a data file is checked here, when a recipe is made.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from ...errors import RecipeError
from ...modeling_unimoe.routing_validation_unimoe import LOSS_COEFFICIENTS
from ...roles import ROLES
from ..parallel.settings import Parallel, check_stage
from .recipe_data import VOICES, DataEntry, check_batches, check_data, check_use_of_data
from .recipe_mixers import MixersConfig
from .recipe_parts import ExpertConfig, LoraSettings, MoeConfig, require_folder_name
from .recipe_values import require, require_choice, require_range
from .telemetry_settings import TelemetrySettings

STAGE_KINDS = ("train", "experts", "moe")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16")
COEFFICIENTS = tuple(LOSS_COEFFICIENTS.values())


@dataclass
class StageConfig:
    """One stage.

    Args:
        kind: "train" continues the previous stage's model. "experts" trains one FFN copy per entry of `experts`, each
            from the same dense model. "moe" assembles the sparse model (`Recipe.moe`) and then trains it.
        train: roles whose parameters are trained (see `unimoe.roles`); everything else is frozen.
        modalities: modalities or tasks whose samples are used; empty means all.
        data: own data of this stage, as in `Recipe`; None uses the recipe's.
        chat_template: name of the one of the processor's chat templates that this stage trains with; None: its default.
        image_aspect_ratio: of pictures in this stage, see `UniMoeProcessor`; None: the processor's.
        steps: optimizer steps; of an "experts" stage those of every run that sets none of its own.
        batch_size: samples per device and forward pass; with packing, rows.
        gradient_accumulation_steps: batches per optimizer step.
        batches: "by_modality": all batches of an optimizer step, on all devices, hold one modality. "mixed": whatever comes.
        group_by_length: draw samples of about the same length for a step, which saves padding.
        max_length: tokens of a row. Samples with media that are longer are left out and listed as bad samples, and so are
            texts unless cut_long_texts; None: no limit.
        cut_long_texts: samples without media that are longer than max_length lose their end.
        packing: several samples without media share a row of max_length; none sees another.
        learning_rate: one figure, or one per role in `train` and `lora.targets`.
        schedule: of the learning rate after `warmup_steps`; it ends at `min_learning_rate_ratio` of its peak.
        weight_decay, adam_betas: of AdamW; biases and norms do not decay.
        max_grad_norm: longer gradients are scaled down to it; 0 leaves them.
        max_skipped_steps: steps whose loss or gradient is not finite that may be left out; one more ends the run.
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        lora: adapters that train beside `train`.
        experts: the runs of a stage of kind "experts".
        modality_weights: share of the batches by task or modality; without them, by the number of samples.
        router_aux_loss_coef, router_z_loss_coef, router_modality_loss_coef, router_divergence_loss_coef: override the
            model's coefficients during this stage.
        router_aux_loss_final_coef: where `router_aux_loss_coef` goes, linearly within `router_aux_loss_decay_steps`
            optimizer steps (0: the whole stage); None leaves it where it is.
        mixer_choice: how mixers choose their experts in this stage: "random" (MoAI's first step) or "gates" (its second).
        feature_noise: standard deviation of Gaussian noise on cached tower states, relative to the states' own; one
            figure or one per modality. Cached training only, as is token_dropout.
        token_dropout: probability that a position of the cached tower states becomes the mean state.
        save_every: steps between checkpoints; 0 saves none before the stage's end.
        keep_checkpoints: newest checkpoints that stay while the stage runs.
        time_limit_seconds: measure the speed at the start and cut `steps` to fit; per expert run in an "experts" stage.
        log_every: steps between progress reports.
    """

    name: str
    kind: Literal["train", "experts", "moe"] = "train"
    train: list[str] = field(default_factory=lambda: ["connectors"])
    modalities: list[str] = field(default_factory=list)
    data: list[str | DataEntry] | None = None
    chat_template: str | None = None
    image_aspect_ratio: Literal["square", "pad"] | None = None
    steps: int = 1000
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    batches: Literal["by_modality", "mixed"] = "by_modality"
    group_by_length: bool = False
    max_length: int | None = None
    cut_long_texts: bool = False
    packing: bool = False
    learning_rate: float | dict[str, float] = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_learning_rate_ratio: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 0
    label_smoothing: float = 0.0
    lora: LoraSettings | None = None
    experts: list[ExpertConfig] = field(default_factory=list)
    modality_weights: dict[str, float] = field(default_factory=dict)
    router_aux_loss_coef: float | None = None
    router_z_loss_coef: float | None = None
    router_modality_loss_coef: float | None = None
    router_divergence_loss_coef: float | None = None
    router_aux_loss_final_coef: float | None = None
    router_aux_loss_decay_steps: int = 0
    mixer_choice: Literal["gates", "random"] = "gates"
    feature_noise: float | dict[str, float] = 0.0
    token_dropout: float | dict[str, float] = 0.0
    save_every: int = 0
    keep_checkpoints: int = 1
    time_limit_seconds: float | None = None
    log_every: int = 10

    def check(self, where: str) -> None:
        require_folder_name(f"{where}.name", self.name)
        require_choice(f"{where}.kind", self.kind, STAGE_KINDS)
        require_choice(f"{where}.schedule", self.schedule, SCHEDULES)
        if self.data is not None:
            check_data(f"{where}.data", self.data)
        check_batches(self, where)
        self._check_numbers(where)
        self._check_roles(where)
        for index, expert in enumerate(self.experts):
            expert.check(f"{where}.experts[{index}]")
        if (self.kind == "experts") != bool(self.experts):
            raise RecipeError(
                f"{where} is of kind {self.kind!r} with {len(self.experts)} experts: list experts in a stage of kind "
                "'experts' and only there."
            )
        _require_different(f"{where}.experts", [expert.name for expert in self.experts])

    def steps_of(self, expert: ExpertConfig) -> int:
        return self.steps if expert.steps is None else expert.steps

    def _check_numbers(self, where: str) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "keep_checkpoints", "log_every"):
            require_range(f"{where}.{name}", getattr(self, name), 1, 1 << 40)
        for name in ("warmup_steps", "save_every", "max_skipped_steps", "router_aux_loss_decay_steps"):
            require_range(f"{where}.{name}", getattr(self, name), 0, 1 << 40)
        for name in ("weight_decay", "max_grad_norm", *COEFFICIENTS, "router_aux_loss_final_coef"):
            value = getattr(self, name)
            if value is not None:
                require(math.isfinite(value) and value >= 0, f"{where}.{name}", value, "finite and at least 0")
        for name in ("feature_noise", "modality_weights", "learning_rate"):
            for key, value in _figures(f"{where}.{name}", getattr(self, name)):
                require(math.isfinite(value) and value >= 0, key, value, "finite and at least 0")
        for key, value in _figures(f"{where}.token_dropout", self.token_dropout):
            require(0 <= value < 1, key, value, "at least 0 and below 1")
        for name in ("label_smoothing", "min_learning_rate_ratio"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{where}.{name}", value, "at least 0 and below 1")
        betas_fit = len(self.adam_betas) == 2 and all(0 <= beta < 1 for beta in self.adam_betas)
        require(betas_fit, f"{where}.adam_betas", self.adam_betas, "two numbers, at least 0 and below 1")
        if self.time_limit_seconds is not None:
            require(self.time_limit_seconds > 0, f"{where}.time_limit_seconds", self.time_limit_seconds, "above 0")

    def _check_roles(self, where: str) -> None:
        for role in self.train:
            require_choice(f"{where}.train", role, ROLES)
        if self.mixer_choice == "random" and "mixer_gates" in self.train:
            raise RecipeError(
                f"{where} draws the mixers' experts, so their gates would learn nothing: leave mixer_gates out of train, "
                "or set mixer_choice to 'gates'."
            )
        if self.lora is not None:
            self.lora.check(f"{where}.lora")
            both = sorted(set(self.train) & set(self.lora.targets))
            if both:
                raise RecipeError(
                    f"{where} trains {both} both fully and through LoRA: keep each role in train or in lora.targets."
                )
        trained = [*self.train, *(self.lora.targets if self.lora else [])]
        require(bool(trained), f"{where}.train", self.train, f"a list of roles of {ROLES}")
        if isinstance(self.learning_rate, dict):
            missing = sorted(set(trained) - set(self.learning_rate))
            unused = sorted(set(self.learning_rate) - set(trained))
            if missing or unused:
                raise RecipeError(
                    f"{where}.learning_rate must name exactly the trained roles {sorted(trained)}; "
                    f"missing: {missing}, not trained: {unused}."
                )


@dataclass
class Recipe:
    """A whole curriculum.

    Args:
        model: folder of the model that the first stage starts from, with its processor.
        data: paths of files and folders of conversations, or `DataEntry`s, which can also have weights, be streamed or
            come from the Hub; media paths are relative to `media_root`, or to the file's folder when that is None.
        media_root: folder of the media; no file outside of it is opened then, also where a symbolic link in it leads.
        out: folder of the stages' results.
        moe: needed by stages of kind "experts" and "moe".
        mixers: what a model without mixers gets before the first stage that trains them.
        precision: "bfloat16" runs the matrix products in it; weights and optimizer stay float32.
        attention: "auto" takes "eager" on CPUs, where training with it is faster, and "sdpa" elsewhere.
        experts_implementation: of transformers ("grouped_mm", "batched_mm", "eager"); None leaves its default.
        cache: folder for the frozen towers' states; None runs the towers in every step.
        perception: folder that `unimoe perceive` filled: images carry what it says was seen in them, for models with mixers.
        pad_to_multiple_of: sequence lengths are rounded up to it, because every new shape costs time.
        voice_as: what audio in `data` is that does not name its modality, the clips under `voice` in LLaVA's form among
            it: "speech", or "sound" for a model without a speech tower.
        max_bad_samples: share of the samples that may be unreadable: they are left out and listed in `bad_samples.jsonl`
            of the stage; more of them end the run.
        parallel: how many processes train and how they share the work.
        gradient_checkpointing: compute the decoder's activations again in the backward pass: less memory, a third more
            time.
        telemetry: what is reported where, and what a collapsed router leads to.
    """

    model: str
    data: list[str | DataEntry]
    out: str
    stages: list[StageConfig]
    media_root: str | None = None
    seed: int = 0
    moe: MoeConfig | None = None
    mixers: MixersConfig | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    attention: str = "auto"
    experts_implementation: str | None = None
    cache: str | None = None
    perception: str | None = None
    pad_to_multiple_of: int = 8
    gradient_checkpointing: bool = False
    max_bad_samples: float = 0.01
    voice_as: Literal["speech", "sound"] = "speech"
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    parallel: Parallel = field(default_factory=Parallel)

    def check(self, where: str = "recipe") -> None:
        """Raise RecipeError naming field, value and what is allowed, if anything in the recipe is impossible."""
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("voice_as", self.voice_as, VOICES)
        require_range("seed", self.seed, 0, (1 << 32) - 1)
        require_range("pad_to_multiple_of", self.pad_to_multiple_of, 1, 4096)
        require(0 <= self.max_bad_samples <= 1, "max_bad_samples", self.max_bad_samples, "between 0 and 1")
        check_data("data", self.data)
        self.telemetry.check("telemetry")
        require(bool(self.stages), "stages", self.stages, "a list with at least one stage")
        for index, stage in enumerate(self.stages):
            stage.check(f"stages[{index}] ({stage.name})")
            if self.cache is not None and "towers" in stage.train:
                raise RecipeError(
                    f"stages[{index}] ({stage.name}) trains the towers, whose states the cache holds: leave cache out."
                )
            if self.cache is not None and stage.image_aspect_ratio is not None:
                raise RecipeError(
                    f"stages[{index}] ({stage.name}) has an image_aspect_ratio of its own, but the cache holds states of "
                    "pictures as the model's processor shapes them: leave one of the two out."
                )
            check_use_of_data(self, stage, f"stages[{index}] ({stage.name})")
        _require_different("stages", [stage.name for stage in self.stages])
        self.parallel.check()
        for index, stage in enumerate(self.stages):
            check_stage(self.parallel, stage, f"stages[{index}] ({stage.name})")
        self._check_assembly()

    def _check_assembly(self) -> None:
        if self.moe is not None:
            self.moe.check("moe")
        if self.mixers is not None:
            self.mixers.check("mixers")
        trained_experts: int | None = None
        for index, stage in enumerate(self.stages):
            where = f"stages[{index}] ({stage.name})"
            if stage.kind != "train" and self.moe is None:
                raise RecipeError(f"{where} is of kind {stage.kind!r} but the recipe has no moe section: add one.")
            if stage.kind == "experts":
                trained_experts = len(stage.experts)
            if stage.kind != "moe":
                continue
            if trained_experts is None and (self.moe.num_experts is None or self.moe.router_init == "modality_means"):
                raise RecipeError(
                    f"{where} has no stage of kind 'experts' before it: set moe.num_experts, and moe.router_init to "
                    "'normal' or 'zeros'."
                )
            if trained_experts not in (None, self.moe.num_experts or trained_experts):
                raise RecipeError(
                    f"moe.num_experts is {self.moe.num_experts} but {trained_experts} experts are trained before "
                    f"{where}: make them equal or leave moe.num_experts out."
                )


def _figures(where: str, value: float | dict[str, float]) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [(f"{where}.{key}", figure) for key, figure in value.items()]
    return [(where, value)]


def _require_different(where: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, where, twice, "different names")

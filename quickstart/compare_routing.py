"""Dense, Vanilla MoE, Modality MoE, MoIIE and MoIIE with five groups, at equal active parameters over several seeds.

One dense model goes through the quickstart's stages 0 and 1. Every variant starts from it, as the same function, and trains
the same number of steps on the same batches; `runs/compare_routing.sh` runs it all and prints a table.

OUT/work/                        parts, tower states, the dense model: as in a quickstart
OUT/comparison/<variant>-<seed>/ losses.jsonl, and result.json when the run is done: the same command goes on after a stop
OUT/comparison.json              the table's figures, and what they are of
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..commands._argument_types import positive
from ..errors import UniMoeError
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..processing.processing_unimoe import UniMoeProcessor
from ..progress_bars import transformers_bars
from ..trainers.caches.encoder_cache import EncoderCache
from ..trainers.curriculum import load_start_model, run_curriculum
from ..trainers.data.collator import CachedCollator
from ..trainers.data.conversations import ConversationDataset
from ..trainers.recipe.recipe import StageConfig
from ..trainers.saving.checkpoints import write_durably
from ..trainers.stages.stage import RunSettings, run_training
from .augment_videos import vary_videos
from .comparison import kept_result, model_after_stage1, require_same_comparison
from .comparison_table import print_table
from .evaluate import accuracy_by_task, answer_loss, answer_samples, spread
from .prepare import assemble_start, encode_media, find_parts, prepare_dense
from .routing_variants import VARIANTS, RoutingVariant, decoder_parameters, make_variant
from .run import Quickstart
from .schedule import Budget
from .stages import dense_twin_recipe, language_recipe, multimodal_recipe

# Stages 0 and 1, which all variants share; no others are run.
SHARED = Budget(language=400, connectors=600)
STEPS = 150
SEEDS = 3
SAMPLES_PER_TASK = 100
_RATES = {"ffn": 1e-3, "experts": 1e-3, "attention": 1e-3, "router": 1e-3, "connectors": 5e-4}


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where.

    Args:
        start: output folder of a finished quickstart, whose model after stage 1 and tower states are taken; None makes
            them in `out`.
        steps: that every variant trains.
        words: see `Quickstart`.
    """

    out: Path
    start: Path | None = None
    steps: int = STEPS
    seeds: int = SEEDS
    samples_per_task: int = SAMPLES_PER_TASK
    words: tuple[str, ...] | None = None
    shared: Budget = SHARED


def compare_routing(comparison: Comparison) -> dict[str, Any]:
    """Train and test every variant with every seed; returns the content of comparison.json.

    Raises:
        RecipeError: `out` holds a comparison of other settings, or `start` no finished quickstart.
    """
    run = Quickstart(comparison.out, seed=0, budget=comparison.shared, words=comparison.words)
    with run.attempt():
        require_same_comparison(comparison.out, _settings(comparison))
        bench = _Bench.prepare(run, comparison)
        results = [
            bench.result(variant, seed) for seed in range(comparison.seeds) for variant in VARIANTS
        ]  # by seeds, so that a comparison that is stopped has whole rounds
        summary = {
            "settings": _settings(comparison),
            "seconds": round(run.total_seconds, 1),
            "torch": torch.__version__,
            "results": results,
        }
        write_durably(comparison.out / "comparison.json", json.dumps(summary, indent=1))
    return summary


class _Bench:
    """What all variants share: a dense model, data and tower states."""

    def __init__(
        self,
        run: Quickstart,
        comparison: Comparison,
        dense: Path,
        processor: UniMoeProcessor,
        caches: tuple[EncoderCache, EncoderCache],
    ) -> None:
        self.run, self.comparison, self.processor = run, comparison, processor
        self.recipe = dense_twin_recipe(dense, run.work, run.seed, comparison.steps, run.precision())
        self.data = ConversationDataset.from_samples(run.training_samples())
        self.heldout = spread(run.heldout_samples(), comparison.samples_per_task)
        self.test_cache = caches[1]
        stage = self.stage(VARIANTS[0])
        self.collator = CachedCollator(
            processor,
            caches[0],
            self.recipe.pad_to_multiple_of,
            feature_noise=stage.feature_noise,
            token_dropout=stage.token_dropout,
            augment=vary_videos,
        )

    @classmethod
    def prepare(cls, run: Quickstart, comparison: Comparison) -> "_Bench":
        if comparison.start is None:
            return cls(run, comparison, *_shared_stages(run))
        source, dense = replace(run, out=comparison.start), model_after_stage1(comparison.start)
        model, processor = UniMoeForCausalLM.from_pretrained(dense), UniMoeProcessor.from_pretrained(dense)
        return cls(run, comparison, dense, processor, encode_media(source, model, processor, run.heldout_samples()))

    def stage(self, variant: RoutingVariant) -> StageConfig:
        """As the quickstart's dense twin trains, and the experts like its FFNs."""
        [twin] = self.recipe.stages
        rates = {role: _RATES[role] for role in variant.trained_roles}
        warmup = self.comparison.steps // 10
        name, roles = variant.name, variant.trained_roles
        return replace(twin, name=name, train=roles, learning_rate=rates, warmup_steps=warmup, save_every=0)

    def result(self, variant: RoutingVariant, seed: int) -> dict[str, Any]:
        """Of one run; from disk if it is done."""
        folder = self.run.out / "comparison" / f"{variant.name.replace(', ', ' ').replace(' ', '-').lower()}-{seed}"
        found = kept_result(folder, lambda: self._train(variant, seed, folder))
        shown = ", ".join(f"{task} {100 * value:.0f} %" for task, value in found["accuracy"].items())
        self.run.say(f"{variant.name}, seed {seed}: {shown}; loss {found['loss']:.3f}; {found['seconds']:.0f} s")
        return found

    def _train(self, variant: RoutingVariant, seed: int, folder: Path) -> dict[str, Any]:
        started = time.monotonic()
        dense = load_start_model(self.recipe.model, self.recipe)
        model = make_variant(variant, dense, seed)
        settings = RunSettings(
            self.processor, lambda _: self.collator, seed=seed, precision=self.recipe.precision, progress_bar=False
        )
        model, report = run_training(model, self.data, self.stage(variant), folder, settings)
        answers = answer_samples(model, self.processor, self.test_cache, self.heldout)
        return {
            "variant": variant.name,
            "seed": seed,
            "accuracy": accuracy_by_task(answers),
            "loss": answer_loss(model, self.processor, self.test_cache, self.heldout),
            "parameters": asdict(decoder_parameters(model.config)),
            "steps": report.steps,
            "training_seconds": round(report.seconds, 1),
            "seconds": round(time.monotonic() - started, 1),
        }


def _shared_stages(run: Quickstart) -> tuple[Path, UniMoeProcessor, tuple[EncoderCache, EncoderCache]]:
    """The quickstart up to its stage 1; what is done is taken from disk."""
    parts = find_parts(run)
    run.require_same_run(parts)
    model, processor = assemble_start(run, parts)
    caches = encode_media(run, model, processor, run.heldout_samples())
    common: dict[str, Any] = {"processor": processor, "cache": caches[0], "augment": vary_videos}
    language = language_recipe(run.work / "start", run.work, run.seed, run.budget, run.precision())
    [report] = run_curriculum(language, dataset=run.language_dataset(), **common)
    dense = prepare_dense(run, Path(str(report.model)), processor)
    layers = model.config.text_config.num_hidden_layers
    stages = multimodal_recipe(dense, run.work, run.seed, run.budget, layers, run.precision())
    first = replace(stages, stages=stages.stages[:1], moe=None)
    [report] = run_curriculum(first, dataset=ConversationDataset.from_samples(run.training_samples()), **common)
    run.say(f"The dense model after stages 0 and 1: loss {report.loss_last:.2f}")
    return Path(str(report.model)), processor, caches


def _settings(comparison: Comparison) -> dict[str, Any]:
    """What must be the same for results to stand beside each other."""
    fields = {name: value for name, value in asdict(comparison).items() if name not in ("out", "seeds")}
    fields["start"] = None if comparison.start is None else str(comparison.start.absolute())
    return json.loads(json.dumps(fields))


def main(arguments: list[str] | None = None) -> int:
    """`runs/compare_routing.sh`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="compare_routing.sh", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("compare-routing-out"), help="default: %(default)s")
    parser.add_argument(
        "--start", type=Path, metavar="DIR", help="a finished quickstart, whose first stages are taken"
    )
    parser.add_argument("--steps", type=positive, default=STEPS, help="that every model trains (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help="how many (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        with transformers_bars(shown=False):
            summary = compare_routing(Comparison(given.out, given.start, given.steps, given.seeds))
    except UniMoeError as error:
        print(f"error: {error}")
        return 2
    print_table(summary)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Does a language model answer better when it is told what OCR read? MoAI's mixers on a finished quickstart's model.

Signs are drawn, OCR reads them, and mixers learn in MoAI's two steps (arXiv 2403.07508) to answer what a sign says. Beside
it the same model, with the same mixers, on the same batches, to which every picture's aux says the same. Both start from
the quickstart's model after a lesson in spelling; `runs/moai_ocr.sh` runs it all and prints a table.

OUT/signs/                     pictures and data files
OUT/seen/                      what OCR read
OUT/photographs/               photographs, from packages, and words cut out of them
OUT/work/                      the model after its lesson, the vision tower's states of the pictures
OUT/runs/<model>-<seed>/       losses of both steps, and result.json when the run is done: the same command goes on after a stop
OUT/moai_ocr.json              the table's figures, and what they are of
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..commands._argument_types import positive
from ..errors import UniMoeError
from ..modeling_unimoe.configuration_unimoe_moai import UniMoeMixerConfig
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..processing.perception.interface import Reader
from ..processing.perception.ocr_rapidocr import RapidOcrReader
from ..processing.processing_unimoe import UniMoeProcessor
from ..progress_bars import transformers_bars
from ..trainers.caches.encoder_cache import EncoderCache
from ..trainers.curriculum import load_start_model
from ..trainers.data.collator import CachedCollator
from ..trainers.data.conversations import ConversationDataset, Sample
from ..trainers.recipe.recipe import Recipe, StageConfig
from ..trainers.saving.checkpoints import write_durably
from ..trainers.stages.mixer_stage import add_mixers
from ..trainers.stages.stage import RunSettings, run_training
from .comparison import kept_result, model_after_stage1, require_same_comparison
from .copying_start import start_as_copies
from .evaluate import answer_samples
from .photographs import PhotographReading, fetch_photographs, photographed_words, read_photographs
from .reading_table import Reading, print_table, reading_of
from .run import Quickstart
from .schedule import Budget
from .sign_data import SignOptions
from .sign_rates import reading_rate
from .sign_reading import SignCounts, draw_signs, sign_test, untold
from .spelling import STEPS as SPELLING_STEPS
from .spelling import teach_spelling

# Name in the table -> whether its aux are what OCR read.
MODELS = {"told what OCR read": True, "told nothing": False}
STEPS = 180
SEEDS = 3
# Text that fills much of a small picture is read so as well as at rapidocr's own side, four times as fast.
_DETECTION_SIDE = 320
_NUM_LATENTS = 8
_DEPTH = 1
_BATCH_SIZE = 32
_WARMUP = 20
_ALONE = 0.2  # share of the steps in which experts are drawn
# What trains in both steps, and how fast. MoAI's decoder of 7B stays frozen; so few layers learn too slowly from mixers alone.
_RATES = {"compressor": 1e-3, "mixers": 1e-3, "attention": 3e-4, "ffn": 3e-4}


@dataclass(frozen=True)
class OcrComparison:
    """What is compared, and where.

    Args:
        start: output folder of a finished quickstart, whose model after stage 1 is taken.
        steps: of a run, over both of MoAI's steps.
        spelling_steps: of the lesson before, which all runs share.
        photographs: also read photographs, which are fetched, and ask about words that are cut out of them.
    """

    out: Path
    start: Path
    steps: int = STEPS
    seeds: int = SEEDS
    spelling_steps: int = SPELLING_STEPS
    counts: SignCounts = field(default_factory=SignCounts)
    options: SignOptions = field(default_factory=lambda: SignOptions(size=192))
    photographs: bool = False


def compare_reading(comparison: OcrComparison, reader: Reader | None = None) -> dict[str, Any]:
    """Train and test both models with every seed; returns the content of moai_ocr.json.

    Args:
        reader: reads the pictures; None takes rapidocr.

    Raises:
        RecipeError: `out` holds a comparison of other settings, or `start` no finished quickstart.
        MissingPackageError: rapidocr or matplotlib is not installed.
        PartError: photographs are wanted and cannot be had.
    """
    run = Quickstart(comparison.out, seed=0, budget=Budget())
    dense = model_after_stage1(comparison.start)
    with run.attempt():
        require_same_comparison(comparison.out, _settings(comparison))
        photographs = _photographs(run, reader or RapidOcrReader()) if comparison.photographs else []
        bench = _Bench(run, comparison, dense, reader or RapidOcrReader(detection_side=_DETECTION_SIDE))
        results = [bench.result(name, seed) for seed in range(comparison.seeds) for name in MODELS]
        summary = {
            "settings": _settings(comparison),
            "seconds": round(run.total_seconds, 1),
            "torch": torch.__version__,
            "perceiver": bench.signs.cache.identity,
            "read_exactly": bench.read_exactly(),
            "photographs": [asdict(reading) for reading in photographs],
            "results": results,
        }
        write_durably(comparison.out / "moai_ocr.json", json.dumps(summary, indent=1))
    return summary


def _photographs(run: Quickstart, reader: Reader) -> list[PhotographReading]:
    run.say("OCR reads photographs")
    return read_photographs(fetch_photographs(run.out / "photographs"), reader)


class _Bench:
    """What all runs share: the quickstart's model, signs, what OCR read in them, and the vision tower's states."""

    def __init__(self, run: Quickstart, comparison: OcrComparison, dense: Path, reader: Reader) -> None:
        self.run, self.comparison = run, comparison
        self.processor = UniMoeProcessor.from_pretrained(dense)
        run.say("Signs are drawn")
        draw_signs(run.out / "signs", self.processor.tokenizer, comparison.counts, comparison.options)
        run.say("OCR reads them")
        more = self._photographed() if comparison.photographs else {}
        self.signs = sign_test(
            run.out / "signs", run.out / "seen", self.processor.tokenizer, comparison.counts, reader, more
        )
        run.say("The language model learns to spell")
        self.recipe = Recipe(
            model=str(self._spelling_model(dense)),
            data=[str(run.out / "signs" / "train.jsonl")],
            out=str(run.out / "runs"),
            stages=mixer_steps(comparison.steps),
            precision=run.precision(),  # type: ignore[arg-type]
        )
        run.say("The frozen vision tower looks at the signs")
        model = load_start_model(self.recipe.model, self.recipe)
        self.cache = EncoderCache(run.work / "tower_states", model, self.processor, dtype="float16", batch_size=32)
        self.cache.build([*self.signs.train, *(s for test in self.signs.tests.values() for s in test)], progress=False)
        self.collator = CachedCollator(self.processor, self.cache, self.recipe.pad_to_multiple_of)

    def _photographed(self) -> dict[str, list[Sample]]:
        folder = self.run.out / "photographs"
        return {"photographed words": photographed_words(folder, folder / "words", self.comparison.options.size)}

    def _spelling_model(self, dense: Path) -> Path:
        """Taught once for all runs; of the words to be tested with none is in the lesson."""
        work, precision, steps = self.run.work / "spelling", self.run.precision(), self.comparison.spelling_steps
        return teach_spelling(
            dense, self.processor, self.signs.trained_words, self.signs.unseen_words, work, precision, steps
        )

    def read_exactly(self) -> dict[str, float]:
        """Share of each test's signs that OCR read to the letter."""
        rates = {name: reading_rate(samples, self.signs.cache) for name, samples in self.signs.tests.items()}
        return {name: rate.exact / rate.signs for name, rate in rates.items()}

    def result(self, name: str, seed: int) -> dict[str, Any]:
        """Of one run; from disk if it is done."""
        folder = self.run.out / "runs" / f"{name.replace(' ', '-').lower()}-{seed}"
        found = kept_result(folder, lambda: self._train(name, seed, folder))
        shown = ", ".join(f"{100 * reading['exact']:.0f} % of {test}" for test, reading in found["readings"].items())
        self.run.say(f"{name}, seed {seed}: {shown}; {found['seconds']:.0f} s")
        return found

    def _train(self, name: str, seed: int, folder: Path) -> dict[str, Any]:
        started = time.monotonic()
        model = load_start_model(self.recipe.model, self.recipe)
        add_mixers(model, mixers_of(model), seed)
        start_as_copies(model)
        settings = RunSettings(
            self.processor, lambda _: self.collator, seed=seed, precision=self.recipe.precision, progress_bar=False
        )
        data = ConversationDataset.from_samples(self._told(name, self.signs.train))
        steps = 0
        for stage in self.recipe.stages:
            model, report = run_training(model, data, stage, folder / stage.name, settings)
            steps += report.steps
        readings = {test: self._reading(model, name, samples) for test, samples in self.signs.tests.items()}
        return {
            "model": name,
            "seed": seed,
            "readings": {test: asdict(reading) for test, reading in readings.items()},
            "steps": steps,
            "trained_parameters": report.trainable_parameters,
            "seconds": round(time.monotonic() - started, 1),
        }

    def _reading(self, model: UniMoeForCausalLM, name: str, samples: Sequence[Sample]) -> Reading:
        return reading_of(answer_samples(model, self.processor, self.cache, self._told(name, samples)))

    @staticmethod
    def _told(name: str, samples: Sequence[Sample]) -> list[Sample]:
        return list(samples) if MODELS[name] else untold(samples)


def mixers_of(model: UniMoeForCausalLM) -> UniMoeMixerConfig:
    """A mixer in every layer: a quickstart's decoder has as many as MoAI has mixers. They are as wide as the decoder."""
    text = model.config.text_config
    layers, rank = list(range(text.num_hidden_layers)), text.hidden_size
    return UniMoeMixerConfig(layers=layers, rank=rank, num_latents=_NUM_LATENTS, compressor_depth=_DEPTH)


def mixer_steps(steps: int) -> list[StageConfig]:
    """MoAI's two: first each expert by itself, drawn anew for every batch, then all of them, weighed by the gates."""
    common: dict[str, Any] = {
        "batch_size": _BATCH_SIZE,
        "warmup_steps": _WARMUP,
        "adam_betas": [0.9, 0.98],
        "weight_decay": 0.01,
        "min_learning_rate_ratio": 0.1,
    }
    alone, rates = max(1, round(_ALONE * steps)), {**_RATES, "mixer_gates": _RATES["mixers"]}
    return [
        StageConfig(
            "experts_alone", train=list(_RATES), mixer_choice="random", steps=alone, learning_rate=_RATES, **common
        ),
        StageConfig("gates", train=list(rates), steps=max(1, steps - alone), learning_rate=rates, **common),
    ]


def _settings(comparison: OcrComparison) -> dict[str, Any]:
    """What must be the same for results to stand beside each other."""
    fields = {name: value for name, value in asdict(comparison).items() if name not in ("out", "seeds")}
    fields["start"] = str(comparison.start.absolute())
    del fields["options"]["words"]
    return json.loads(json.dumps(fields))


def main(arguments: list[str] | None = None) -> int:
    """`runs/moai_ocr.sh`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="moai_ocr.sh", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("moai-ocr-out"), help="default: %(default)s")
    parser.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        default=Path("quickstart-out"),
        help="a finished quickstart (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=positive, default=STEPS, help="of a run, over both of MoAI's (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=positive, default=SEEDS, help="how many (default: %(default)s)")
    counts = SignCounts()
    parser.add_argument("--train", type=positive, default=counts.train, metavar="N", help="pictures to learn from")
    parser.add_argument("--unseen", type=positive, default=counts.unseen, metavar="N", help="pictures of other words")
    parser.add_argument(
        "--no-photographs", action="store_true", help="leave out photographs, which are fetched (15 MB)"
    )
    given = parser.parse_args(arguments)
    counts = replace(counts, train=given.train, unseen=given.unseen)
    photographs = not given.no_photographs
    comparison = OcrComparison(
        given.out, given.start, given.steps, given.seeds, counts=counts, photographs=photographs
    )
    try:
        with transformers_bars(shown=False):
            summary = compare_reading(comparison)
    except UniMoeError as error:
        print(f"error: {error}")
        return 2
    print_table(summary)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

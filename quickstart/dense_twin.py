"""`--compare`: the same dense model without experts, trained on as many batches as stages 2 and 3 took."""

from typing import Any

from ..processing.processing_unimoe import UniMoeProcessor
from ..trainers.caches.encoder_cache import EncoderCache
from ..trainers.curriculum import load_start_model, run_curriculum
from ..trainers.data.conversations import ConversationDataset
from ..trainers.stages.stage import StageReport
from .augment_videos import vary_videos
from .evaluate import accuracy_by_task, answer_samples
from .run import Quickstart
from .stages import dense_twin_recipe


def train_dense_twin(
    run: Quickstart,
    reports: list[StageReport],
    processor: UniMoeProcessor,
    caches: tuple[EncoderCache, EncoderCache],
    heldout: list[dict[str, Any]],
) -> dict[str, Any]:
    """Train the dense model that stage 1 left on the mixed data, as many steps as stages 2 and 3 took together.

    Args:
        reports: of the stages that the sparse model went through.
        caches: tower states of the training and of the held-out media.

    Returns:
        "steps", "seconds" and "trainable_parameters" of the twin's run, "accuracy" by task of its held-out answers.
    """
    by_name = {report.name: report for report in reports}
    steps = by_name["stage2"].steps + by_name["stage3"].steps
    recipe = dense_twin_recipe(run.work / "stages" / "stage1" / "model", run.work, run.seed, steps, run.precision())
    run.say(
        f"--compare: the dense model after stage 1 trains {steps} steps on the same mix (not counted in the minutes)"
    )
    [report] = run_curriculum(
        recipe,
        processor=processor,
        dataset=ConversationDataset.from_samples(run.training_samples()),
        cache=caches[0],
        augment=vary_videos,
    )
    model = load_start_model(report.model, recipe)
    accuracy = accuracy_by_task(answer_samples(model, processor, caches[1], heldout))
    return {
        "steps": report.steps,
        "seconds": report.seconds,
        "trainable_parameters": report.trainable_parameters,
        "accuracy": accuracy,
    }

"""The load-balancing weight that falls during a stage, and memory saved by computing activations again."""

from pathlib import Path

import pytest
import tiny_training

from unimoe.errors import RecipeError
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.recipe.recipe import Recipe, StageConfig


def run(folder: Path, steps: int = 4, checkpointing: bool = False, **stage: object) -> tuple[float, list[float]]:
    """One stage on router and experts; the coefficient at its end, and (loss - ce_loss) / aux_loss of every step."""
    processor = tiny_training.processor()
    model = tiny_training.model(processor, sparse=True)
    data = tiny_training.write_jsonl(folder / "data", 4)
    fields = {"train": ["router", "experts"], "modalities": ["text"], "batch_size": 2, "log_every": 1, **stage}
    recipe = Recipe(
        "in memory",
        [str(data)],
        str(folder / "out"),
        [StageConfig("tune", steps=steps, **fields)],
        gradient_checkpointing=checkpointing,
    )
    weights = []
    run_curriculum(
        recipe,
        model,
        processor,
        on_progress=lambda p: weights.append((p.losses["loss"] - p.losses["ce_loss"]) / p.losses["aux_loss"]),
        progress_bar=False,
    )
    return model.config.text_config.router_aux_loss_coef, weights


def test_the_weight_falls_to_its_end_and_stays(tmp_path: Path) -> None:
    last, weights = run(
        tmp_path,
        steps=6,
        router_aux_loss_coef=0.4,
        router_aux_loss_final_coef=0.1,
        router_aux_loss_decay_steps=4,
    )
    assert weights == pytest.approx([0.4, 0.325, 0.25, 0.175, 0.1, 0.1], abs=1e-3)
    assert last == pytest.approx(0.1)


def test_without_a_number_of_steps_it_falls_over_the_whole_stage(tmp_path: Path) -> None:
    _, weights = run(tmp_path, router_aux_loss_coef=0.4, router_aux_loss_final_coef=0.0)
    assert weights == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-3)


def test_impossible_values_are_refused() -> None:
    for name, value in (("router_aux_loss_final_coef", -0.1), ("router_aux_loss_decay_steps", -1)):
        with pytest.raises(RecipeError, match=name):
            StageConfig("tune", **{name: value}).check("stages[0]")


def test_checkpointing_is_on_and_changes_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unimoe import UniMoeForCausalLM

    switched: list[bool] = []
    enable = UniMoeForCausalLM.gradient_checkpointing_enable
    monkeypatch.setattr(
        UniMoeForCausalLM,
        "gradient_checkpointing_enable",
        lambda self, *a, **k: (switched.append(True), enable(self, *a, **k)),
    )
    losses = [run(tmp_path / str(flag), router_aux_loss_coef=0.4, checkpointing=flag)[1] for flag in (False, True)]
    assert switched == [True]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)

"""What a training tells about itself: figures in the log, lines in a file, a page at the end, trackers by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from training_bench import Bench
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from unimoe.errors import RecipeError
from unimoe.pages.line_chart import Curve, line_chart
from unimoe.trainers.data.bad_samples import FILE as BAD_SAMPLES_FILE
from unimoe.trainers.data.collator import CachedCollator
from unimoe.trainers.recipe import telemetry_settings
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.telemetry_settings import TelemetrySettings
from unimoe.trainers.stages import stage
from unimoe.trainers.stages.stage import RunSettings, run_training
from unimoe.trainers.steps.trainable import set_trainable
from unimoe.trainers.telemetry.stage_page import _by_layer, write_stage_page
from unimoe.trainers.telemetry.telemetry import TELEMETRY_FILE, read_telemetry, watch_stage

STEPS = 12
FIGURES = (
    "tokens_per_second",
    "memory_gb",
    "expert_load_entropy",
    "dead_experts",
    "max_load_ratio",
    "router_drift",
    "experts_per_token",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def finished(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A stage that has run, with its folder, its model, the model before and its trainer's log."""
    folder = tmp_path_factory.mktemp("stage")
    model = bench.model()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = StageConfig(
        "mixed", train=["router", "experts"], steps=STEPS, batch_size=4, learning_rate=1e-2, log_every=4
    )
    logs: list[dict[str, Any]] = []

    class Keep(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            kept.append(dict(logs))

    kept = logs
    build = stage._build_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_build_trainer", lambda *a: _with(build(*a), Keep()))
        settings = RunSettings(
            bench.processor,
            lambda _: CachedCollator(bench.processor, bench.cache),
            progress_bar=False,
            telemetry=TelemetrySettings(),
        )
        model, _ = run_training(model, bench.dataset, config, folder, settings)
    return folder, model, start, logs


def _with(trainer: Any, callback: TrainerCallback) -> Any:
    trainer.add_callback(callback)
    return trainer


def test_figures_are_in_the_log(finished: Any) -> None:
    logs = [log for log in finished[3] if "loss" in log]
    for log in logs:
        assert set(FIGURES) <= set(log)
        assert not any("/" in name for name in log)  # a curve per layer is for trackers
    assert logs[0]["experts_per_token"] == pytest.approx(2.0)
    assert 0.5 <= logs[-1]["expert_load_entropy"] <= 1
    assert logs[-1]["tokens_per_second"] > 0
    assert 0.1 < logs[-1]["memory_gb"] < 100


def test_lines_hold_every_token_and_choice_once(finished: Any) -> None:
    records = read_telemetry(finished[0])
    assert [record["step"] for record in records] == [1, 4, 8, 12]
    for record in records:
        tokens = sum(record["tokens"].values())
        assert tokens > 0
        for layer in record["chosen"]:
            assert sum(map(sum, layer)) == 2 * tokens
    assert set(records[0]["learning_rates"]) == {"router", "experts"}
    assert records[0]["layers"] == [0, 2]


def test_drift_is_the_distance_from_the_start(finished: Any) -> None:
    folder, model, start, _ = finished
    for index, layer in enumerate((0, 2)):
        name = f"model.language_model.layers.{layer}.mlp.gate.weight"
        before, after = start[name], model.state_dict()[name]
        expected = (after - before).norm() / max(before.norm(), after.norm())
        assert read_telemetry(folder)[-1]["router_drift"][index] == pytest.approx(float(expected), rel=1e-5)


def test_the_page_shows_it_all(finished: Any) -> None:
    folder = finished[0]
    page = (folder / "report.html").read_text(encoding="utf-8")
    titles = re.findall("<h3>(.+?)</h3>", page)
    for title in (
        "cross entropy",
        "balance loss (aux)",
        "router z-loss",
        "total",
        "learning rate",
        "load entropy per layer",
        "router drift since the stage's start".replace("'", "&#x27;"),
        "tokens per second",
        "peak memory, GiB",
        "text, first tenth",
        "text, last tenth",
    ):
        assert title in titles, title
    assert not re.search(r"(src|href)=|url\(|http:|https:|<script", page)
    assert "Collapsed routers" not in page
    assert "NaN" not in page
    records = read_telemetry(folder)
    first = torch.tensor(records[0]["chosen"])[0, 0, :4].float()
    cells = re.search(r"text, first tenth</h3>.*?<tbody><tr><th>layer 0</th>(.*?)</tr>", page).group(1)
    shown = [int(cell) for cell in re.findall(r">(\d+)</td>", cells)]
    assert shown == [round(float(100 * share)) for share in first / first.sum()]


def test_alarms_skipped_samples_and_balanced_values_are_on_the_page(finished: Any, tmp_path: Path) -> None:
    folder, model, *_ = finished
    for name in ("losses.jsonl", TELEMETRY_FILE):
        records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for record in records:
            record["aux_loss_balanced"] = 1.0
            record["alarms"] = [{"step": record["step"], "what": "layer <2>: expert 3 takes 100 % of the text tokens"}]
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records) + '{"half')
    (tmp_path / BAD_SAMPLES_FILE).write_text('{"id": "a", "reason": "b"}\n')
    write_stage_page(tmp_path, "x <b>", model.config.text_config)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Step 12: layer &lt;2&gt;: expert 3 takes 100 % of the text tokens." in page
    assert "<b>1</b><span>skipped samples</span>" in page
    assert "x &lt;b&gt;" in page
    assert "stroke-dasharray" in page


def test_a_resumed_run_forgets_what_came_after_the_checkpoint(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / TELEMETRY_FILE
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "ha')
    trainer = bench.trainer(tmp_path, bench.model(), 1)
    trainer.telemetry.folder = tmp_path
    trainer.state.global_step = 2
    trainer.telemetry.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert [record["step"] for record in read_telemetry(tmp_path)] == [1, 2]


def test_trackers_get_a_curve_per_layer_and_modality(bench: Bench, tmp_path: Path) -> None:
    written: dict[str, list[int]] = {}

    class Writer:
        def add_text(self, *args: Any) -> None: ...
        def flush(self) -> None: ...
        def close(self) -> None: ...
        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.setdefault(name, []).append(step)

    model = bench.model()
    set_trainable(model, ["router"])
    trainer = bench.trainer(tmp_path, model, 2)
    trainer.telemetry.settings = TelemetrySettings(report_to=["tensorboard"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
        patch.setitem(__import__("sys").modules, "tensorboardX", type("X", (), {"SummaryWriter": Writer}))
        patch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
        trainer.add_callback(TensorBoardCallback(Writer()))
        trainer.train()
    for name in ("expert_load_entropy", "max_load_ratio", "dead_experts", "router_drift"):
        assert written[f"train/{name}/layer_2"] == [1, 2], name
    assert "train/expert_load_entropy/text" in written
    assert written["train/tokens_per_second"] == [1, 2]


def test_dense_models_tell_speed_and_memory(bench: Bench, tmp_path: Path) -> None:
    model = tiny_training.model(bench.processor)
    set_trainable(model, ["ffn"])
    trainer = bench.trainer(tmp_path, model, 1)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["tokens_per_second"] > 0
    assert "expert_load_entropy" not in log


def recipe(**telemetry: Any) -> Recipe:
    return Recipe("m", ["d"], "o", [StageConfig("s")], telemetry=TelemetrySettings(**telemetry))


def test_tensorboards_files_lie_where_they_outlive_checkpoints(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path / "checkpoints", bench.model(), 1)
    callback = TensorBoardCallback.__new__(TensorBoardCallback)
    callback.logging_dir = None
    trainer.callback_handler.callbacks.append(callback)
    watch_stage(trainer, TelemetrySettings(), tmp_path)
    assert callback.logging_dir == str(tmp_path / "tensorboard")
    assert trainer.telemetry.folder == tmp_path


def test_many_layers_share_a_chart() -> None:
    records = [{"step": 1, "layers": list(range(9)), "entropy": [0.1 * i for i in range(8)] + [None]}]
    curves = {curve.name: curve.points for curve in _by_layer(records, "entropy")}
    assert curves == {"highest": [(1, pytest.approx(0.7))], "mean": [(1, pytest.approx(0.35))], "lowest": [(1, 0.0)]}
    records = [{"step": 1, "layers": [4, 6], "entropy": [0.5, None]}]
    assert [curve.name for curve in _by_layer(records, "entropy")] == ["layer 4", "layer 6"]


def test_settings_are_checked() -> None:
    recipe().check()
    with pytest.raises(
        RecipeError, match=r"telemetry.on_collapse is 'shout'; it must be one of 'warn', 'stop', 'ignore'"
    ):
        recipe(on_collapse="shout").check()
    with pytest.raises(RecipeError, match=r"telemetry.report_to is 'paper'"):
        recipe(report_to=["paper"]).check()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry_settings, "find_spec", lambda name: None)
        with pytest.raises(RecipeError, match=r"'wandb', which is not installed: pip install wandb"):
            recipe(report_to=["wandb"]).check()
    assert TelemetrySettings(report_to=["wandb"]).training_arguments("x") == {"report_to": ["wandb"], "run_name": "x"}


def test_charts_of_odd_values() -> None:
    assert line_chart("t", [Curve("a", [(1, None), (2, float("nan"))])]) == ""
    for values in ([0.0], [5.0, 5.0], [-1.0, 1e9], [1e-9, 2e-9]):
        chart = line_chart("t", [Curve("a & b", list(enumerate(values)))])
        assert "nan" not in chart
        assert "a &amp; b" in chart
        places = [float(y) for y in re.findall(r"[ML]\d+\.\d (\d+\.\d)", chart.split("<text")[-1])]
        assert all(0 <= y <= 190 for y in places)
    many = line_chart("t", [Curve("", [(i, float(i % 7)) for i in range(10_000)])])
    assert len(many) < 10_000

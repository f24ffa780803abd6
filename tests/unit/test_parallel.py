"""The `parallel` section of a recipe: what goes together, what a launcher must have started, and which ranks hold what."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from unimoe.errors import CheckpointError, RecipeError
from unimoe.trainers.parallel.parallel_run import engine_of
from unimoe.trainers.parallel.settings import Parallel, can_spread_experts, check_stage, require_launched
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_file import load_recipe, save_recipe
from unimoe.trainers.saving.optimizer_parts import load_parts, save_parts
from unimoe.trainers.saving.optimizer_state import WHOLE_STATE, state_by_name
from unimoe.trainers.saving.sharded_tensors import Region
from unimoe.trainers.saving.state_tree import save_tree


@pytest.mark.parametrize(
    ("degrees", "engine"),
    [
        ({}, "no engine"),
        ({"data": 4}, "DistributedDataParallel"),
        ({"data": 4, "zero": 1}, "DeepSpeed ZeRO-1"),
        ({"data": 4, "zero": 3}, "DeepSpeed ZeRO-3"),
        ({"data": 4, "zero": 3, "engine": "fsdp"}, "transformers' sharding, experts in 1 parts"),
        ({"data": 4, "expert": 2, "zero": 2}, "transformers' sharding, experts in 2 parts"),
        ({"data": 2, "tensor": 2, "expert": 4, "zero": 3}, "transformers' sharding, experts in 4 parts"),
        ({"tensor": 2, "expert": 2}, "transformers' sharding, experts in 2 parts"),
    ],
)
def test_degrees_that_go_together_have_an_engine(degrees: dict[str, Any], engine: str) -> None:
    parallel = Parallel(**degrees)
    parallel.check()
    assert engine_of(parallel) == engine
    if parallel.expert > 1 and not can_spread_experts():
        with pytest.raises(RecipeError, match="cannot spread models over such ranks"):
            parallel.distributed_config()
        return
    config = parallel.distributed_config()
    assert (config is not None) == engine.startswith("transformers")
    if config is not None:
        assert (config.fsdp_size, config.tp_size) == (parallel.data, parallel.tensor)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"data": 0}, r"parallel\.data is 0"),
        ({"data": 4, "expert": 3, "zero": 3}, r"parallel\.expert is 3.*divisor of data \* tensor \(4\)"),
        ({"data": 2, "tensor": 2, "expert": 1, "zero": 1}, r"parallel\.zero is 1.*2 or 3"),
        ({"data": 2, "expert": 2}, r"parallel\.zero is 0"),
        ({"zero": 2}, r"parallel\.zero is 2.*0 with data = 1"),
        ({"data": 2, "zero": 1, "engine": "fsdp"}, r"parallel\.zero is 1"),
        ({"data": 2, "expert": 2, "zero": 3, "engine": "deepspeed"}, r"parallel\.engine is 'deepspeed'"),
        ({"data": 2, "engine": "deepspeed"}, r"parallel\.zero is 0"),
        ({"silence_seconds": -1}, "silence_seconds"),
    ],
)
def test_degrees_that_do_not_are_refused(degrees: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Parallel(**degrees).check()


def test_a_model_must_divide() -> None:
    config = tiny.config({"num_experts": 4})
    Parallel(data=4, expert=4, zero=3).require_fits(config)
    with pytest.raises(RecipeError, match=r"divisor of the model's 4 experts"):
        Parallel(data=8, expert=8, zero=3).require_fits(config)
    with pytest.raises(RecipeError, match=r"num_key_value_heads \(2\)"):
        Parallel(tensor=4).require_fits(config)
    shared = {"num_experts": 4, "num_shared_experts": 1, "shared_intermediate_size": 49}
    with pytest.raises(RecipeError, match=r"shared_intermediate_size \(49\)"):
        Parallel(data=2, tensor=2, zero=3).require_fits(tiny.config(shared))
    dense = tiny.config({"num_experts": 0, "sparse_layers": []})
    spread = Parallel(data=4, expert=4, zero=3)
    with pytest.raises(RecipeError, match="dense model"):
        spread.require_fits(dense)
    assert spread.for_model(dense) == Parallel(data=4, zero=3, engine="fsdp")


@pytest.mark.parametrize(
    ("started", "parallel", "message"),
    [
        ("1", Parallel(data=2), "1 process was started, but the recipe asks for 2"),
        ("4", Parallel(data=2), "4 processes were started, but the recipe asks for 2"),
        ("2", Parallel(), r"2 processes were started, but the recipe is for one: set parallel"),
    ],
)
def test_another_number_of_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, started: str, parallel: Parallel, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(RecipeError, match=message):
        require_launched(parallel)


@pytest.mark.parametrize(
    ("setting", "parallel", "allowed"),
    [
        ({"time_limit_seconds": 5.0}, Parallel(data=2), Parallel()),
        ({"max_skipped_steps": 1}, Parallel(data=2, zero=2), Parallel(data=2, zero=2, engine="fsdp")),
    ],
)
def test_what_several_ranks_cannot_do_is_refused(
    setting: dict[str, Any], parallel: Parallel, allowed: Parallel
) -> None:
    stage = StageConfig("s", **setting)
    check_stage(allowed, stage, "stage")
    with pytest.raises(RecipeError, match=rf"stage\.{next(iter(setting))} is "):
        check_stage(parallel, stage, "stage")


def test_a_recipe_keeps_its_section(tmp_path: Path) -> None:
    recipe = Recipe("model", ["data.jsonl"], "out", [StageConfig("s")], parallel=Parallel(data=2, expert=2, zero=3))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml").parallel == recipe.parallel
    assert load_recipe(tmp_path / "recipe.yaml", ["parallel.data=4"]).parallel.data == 4


def test_regions_overlap_as_boxes_do() -> None:
    left, right = Region((0, 0), (2, 3)), Region((1, 2), (4, 4))
    assert left.overlap(right) == Region((1, 2), (1, 1))
    assert Region((1, 2), (1, 1)).slices(right) == (slice(0, 1), slice(0, 1))
    assert left.overlap(Region((2, 0), (1, 1))) is None


@pytest.mark.parametrize("form", ["parts", "whole"])
def test_an_optimizer_reads_either_form(tmp_path: Path, form: str) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    if form == "parts":
        save_parts(tmp_path, model, optimizer)
    else:
        save_tree(state_by_name(optimizer, model), tmp_path, WHOLE_STATE)
    # Other groups, in another order: only names count.
    again = torch.optim.AdamW([{"params": [other.bias]}, {"params": [other.weight]}], lr=0.2)
    load_parts(tmp_path, other, again)
    for name in ("weight", "bias"):
        then, now = optimizer.state[getattr(model, name)], again.state[getattr(other, name)]
        assert then.keys() == now.keys()
        assert all(torch.equal(then[key], now[key]) for key in then)
    assert again.param_groups[0]["lr"] == 0.2
    with pytest.raises(CheckpointError, match="differ in what they train"):
        load_parts(tmp_path, other, torch.optim.AdamW([other.bias]))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save_parts(tmp_path, model, optimizer)
    (tmp_path / "optimizer_parts-00000-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer_parts-00000-of-00001\.safetensors is missing"):
        load_parts(tmp_path, model, optimizer)

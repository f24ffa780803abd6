"""Checkpoints of MoAI's code: there and back, positions of another size, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import moai_shapes
import PIL.Image
import pytest
import tiny_training
import torch
from moai_shapes import TINY_CONFIG
from safetensors.torch import load_file

from unimoe import UniMoeForCausalLM, cli
from unimoe.conversion.released.export_moai import export_moai
from unimoe.conversion.released.import_moai import import_moai, plan_moai
from unimoe.conversion.released.moai_keys import EMBEDDING, HEAD, POSITIONS
from unimoe.conversion.released.moai_processor import moai_image_processor, resized_positions
from unimoe.errors import ConversionError
from unimoe.processing.perception.choice import PerceiverChoice, original_models
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.data.conversations import ConversationDataset
from unimoe.trainers.recipe.recipe import Recipe, StageConfig


def checkpoint(folder: Path, **changes: Any) -> Path:
    """A tiny checkpoint; a change to None removes a tensor."""
    tensors = {**moai_shapes.tiny_tensors(changes.pop("dtype", torch.float32)), **changes}
    return moai_shapes.write(folder, {n: t for n, t in tensors.items() if t is not None}, TINY_CONFIG)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_checkpoint_survives_the_way_there_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = checkpoint(tmp_path / "original", dtype=dtype)
    receipt = import_moai(str(folder), tmp_path / "out")
    assert receipt.variant == "moai"
    assert {r.fate for records in receipt.sources.values() for r in records.values()} == {"consumed"}
    lines = export_moai(tmp_path / "out", tmp_path / "back")
    assert any("pixels of pictures: 28; the original's code has 490" in line for line in lines)
    before, after = stored(folder), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    before[EMBEDDING], after[EMBEDDING] = before[EMBEDDING][:-1], after[EMBEDDING][:-1]
    for name, value in before.items():
        assert value.dtype == after[name].dtype == dtype
        assert torch.equal(value, after[name]), name
    import_moai(str(tmp_path / "back"), tmp_path / "again")
    one, two = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one | two)
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


def test_a_model_trained_in_both_steps_goes_back_and_loads_again(tmp_path: Path) -> None:
    processor = tiny_training.processor()
    processor.image_processor = moai_image_processor(28)
    rows = len(processor.tokenizer)
    tables = {EMBEDDING: torch.randn(rows + 1, 32), HEAD: torch.randn(rows, 32)}
    original = checkpoint(tmp_path / "original", **tables)
    import_moai(str(original), tmp_path / "ours")
    assert PerceiverChoice.of_folder(tmp_path / "ours") == original_models()
    grey = {
        "type": "image",
        "image": PIL.Image.new("RGB", (28, 28)),
        "aux": "The image includes text descriptions: red.",
    }
    data = ConversationDataset.from_samples([tiny_training.sample("image", i, grey, "What?", "red") for i in range(4)])
    model = UniMoeForCausalLM.from_pretrained(tmp_path / "ours")
    model.config.image_token_id = processor.image_token_id
    roles = ["compressor", "mixers"]
    stages = [
        StageConfig("alone", train=roles, mixer_choice="random", steps=2, batch_size=2, learning_rate=1e-2),
        StageConfig("gates", train=[*roles, "mixer_gates"], steps=2, batch_size=2, learning_rate=1e-2),
    ]
    recipe = Recipe(str(tmp_path / "ours"), ["unused"], str(tmp_path / "out"), stages)
    run_curriculum(recipe, model, processor, data, progress_bar=False)
    trained = tmp_path / "out" / "gates" / "model"
    replace(original_models(), detect="some/detector").save(trained)
    export_moai(trained, tmp_path / "back")
    before, after = stored(original), stored(tmp_path / "back")
    changed = {name for name in before if name != EMBEDDING and not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "moai_" in name}
    import_moai(str(tmp_path / "back"), tmp_path / "again")
    one, two = stored(trained), stored(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one | two)
    assert PerceiverChoice.of_folder(tmp_path / "again") == replace(original_models(), detect="some/detector")
    assert "- objects: some/detector" in (tmp_path / "again" / "README.md").read_text()


def test_queries_keys_and_values_alternate_per_key_value_head(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "original")
    import_moai(str(folder), tmp_path / "out")
    attention = UniMoeForCausalLM.from_pretrained(tmp_path / "out").model.language_model.layers[0].self_attn
    for original, parts in (
        ("Plora_main", (attention.q_proj, attention.k_proj, attention.v_proj)),
        ("Plora_B", (attention.plora.q_b, attention.plora.k_b, attention.plora.v_b)),
    ):
        rows = stored(folder)[f"model.layers.0.attention.wqkv.{original}.weight"].view(2, 4, 8, -1)
        query, key, value = (part.weight for part in parts)
        assert torch.equal(query, rows[:, :2].reshape(query.shape))
        assert torch.equal(key, rows[:, 2].reshape(key.shape))
        assert torch.equal(value, rows[:, 3].reshape(value.shape))


def test_positions_of_other_pictures_are_resized(tmp_path: Path) -> None:
    table = torch.randn(3 * 3 + 1, 16)
    receipt = import_moai(str(checkpoint(tmp_path / "original", **{POSITIONS: table})), tmp_path / "out")
    state = stored(tmp_path / "out")
    name = next(name for name in state if name.endswith("position_embedding.weight"))
    assert torch.equal(state[name], resized_positions(table, 2))
    assert any("10 positions were resized to 5" in note for note in receipt.notes)
    record = next(r for records in receipt.sources.values() for n, r in records.items() if n == POSITIONS)
    assert (record.shape, record.fate, record.note) == ([10, 16], "consumed", name)


def test_the_commands_print_plan_and_receipt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "original")
    assert cli.main(["convert", "moai", str(folder), "--dtype", "bf16", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "mixers in layers 1, 3 of 4, rank 8" in printed
    assert "no tokenizer.model" in printed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert cli.main(["convert", "export-moai", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    assert "moai: " in capsys.readouterr().out


FIRST = "model.layers.0.attention.wqkv.Plora_main.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moai_compressor.latents": None}, "no checkpoint of MoAI's code"),
        ({"output.weight": None}, "output.weight"),
        ({FIRST: None}, "cannot be made"),
        ({FIRST: torch.zeros(56, 32)}, "64 rows"),
        ({"model.layers.0.attention.unknown": torch.zeros(1)}, "unexpected tensor"),
        ({"model.tok_embeddings.weight": torch.zeros(99, 32)}, "99 rows"),
        ({POSITIONS: torch.zeros(8, 16)}, "no square grid"),
    ],
)
def test_what_is_no_whole_moai_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = checkpoint(tmp_path / "original", **changes)
    with pytest.raises(ConversionError, match=message):
        plan_moai(str(folder))


def test_a_model_that_is_no_moai_is_not_exported(tmp_path: Path) -> None:
    import tiny

    tiny.model().save_pretrained(tmp_path / "model")
    with pytest.raises(ConversionError, match="no mixer_config"):
        export_moai(tmp_path / "model", tmp_path / "back")
    assert not (tmp_path / "back").exists()

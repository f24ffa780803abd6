"""docs/routing.md: every example of it works as it stands."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

import unimoe
from unimoe import UniMoeTextModel, cli
from unimoe.conversion.upcycling.group_presets import GROUP_PRESETS, group_preset
from unimoe.modeling_unimoe.configuration_unimoe_text import MODALITIES
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_parts import MoeConfig
from unimoe.trainers.recipe.recipe_values import build
from unimoe.trainers.stages.moe_fit import require_fitting_moe

PAGE = (Path(unimoe.__file__).parent / "docs" / "routing.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.+?)^```", PAGE, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: it holds the model `dense`."""
    root = tmp_path_factory.mktemp("page")
    tiny.model({"num_experts": 0, "sparse_layers": None, "num_hidden_layers": 2}).save_pretrained(root / "dense")
    return root


def test_the_page_has_examples_of_every_kind() -> None:
    assert len(blocks("json")) >= 11
    assert len(COMMANDS) >= 6
    assert len(blocks("yaml")) == len(blocks("python")) == 1


@pytest.mark.parametrize("text", blocks("json"))
def test_fields_make_a_decoder_that_trains(text: str) -> None:
    fields = {"sparse_layers": None, "num_hidden_layers": 4, "router_aux_loss_coef": 0.0, **json.loads(text)}
    config = tiny.text_config(**fields)
    assert config.to_dict().items() >= json.loads(text).items()
    decoder = UniMoeTextModel(config)
    types = torch.arange(10)[None] % len(MODALITIES)
    states = decoder(inputs_embeds=torch.randn(1, 10, tiny.HIDDEN), mm_token_type_ids=types).last_hidden_state
    states.square().mean().backward()
    assert states.isfinite().all()


def test_presets_are_what_the_page_says() -> None:
    shown = [json.loads(text) for text in blocks("json")]
    for name in re.findall(r"preset `([\w-]+)`", PAGE):
        experts = int(GROUP_PRESETS[name].split()[1])
        groups, modalities = group_preset(name, experts)
        written = modalities if groups is None or set(groups) != set(MODALITIES) else None
        assert any(
            fields["num_experts"] == experts
            and fields.get("expert_groups") == groups
            and fields.get("modality_groups") == written
            for fields in shown
        ), name
    assert set(re.findall(r"preset `([\w-]+)`", PAGE)) == set(GROUP_PRESETS)


def test_the_table_of_modalities() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows == [(str(index), name) for index, name in enumerate(MODALITIES)]


def test_the_example_in_python() -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    assert names["groups"].tolist() == [[0, 1, 1, 1, 0]]
    assert names["output"].logits.shape == (1, 5, 64)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    program, *arguments = shlex.split(command)
    assert program == "unimoe"
    assert cli.main(arguments) == 0
    receipt = json.loads((folder / arguments[arguments.index("--out") + 1] / "receipt.json").read_text())
    assert receipt["exact"]


def test_the_moe_section_of_a_recipe() -> None:
    moe = build(MoeConfig, yaml.safe_load(blocks("yaml")[0]), "moe")
    recipe = Recipe("model", ["data"], "out", [StageConfig("sparse", "moe", ["router"])], moe=moe)
    recipe.check()
    dense = unimoe.UniMoeConfig(text_config=tiny.text_config(num_experts=0, sparse_layers=None, num_hidden_layers=4))
    require_fitting_moe(recipe, dense)


@pytest.mark.parametrize(
    "fields",
    [
        {"router_type": "dynamic", **tiny.MOIIE_GROUPS},
        {"router_type": "dynamic", "router_scoring": "sigmoid"},
        {"router_type": "dynamic", "norm_topk_prob": False},
        {"router_type": "dynamic", "router_bias_update_rate": 0.1},
        {"router_top_p": 0.5},
        {"expert_capacity_factor": 1.0},
        {"router_divergence_loss_coef": 0.1, **tiny.MOIIE_GROUPS},
        {"router_modality_loss_coef": 0.1, "modality_experts": {"image": [0]}, **tiny.MOIIE_GROUPS},
        {"router_bias_update_rate": 0.1, "router_pick": "sample"},
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(unimoe.UniMoeError):
        tiny.text_config(**fields)

"""`unimoe inspect` says what a folder holds, from configuration and headers alone."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from unimoe import UniMoeForCausalLM, cli
from unimoe.commands.inspect import router_load_lines
from unimoe.conversion.checkpoints.parameters import count_parameters, total_and_active
from unimoe.conversion.checkpoints.router_load import RouterLoad
from unimoe.conversion.publishing.hub import save_bundle
from unimoe.errors import ConversionError
from unimoe.inspection.model_description import describe_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_bundle(tiny.model(tiny.MOIIE_GROUPS), None, tmp_path / "model")


def write_load(folder: Path, **record: object) -> None:
    (folder / "router_load.json").write_text(json.dumps(record))


def test_text_names_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_load(folder, layers=[0, 2], modalities={"image": [[0.7, 0.1, 0.1, 0.1], [0.25] * 4]})
    assert cli.main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "takes      image, video, speech, sound, text",
        "tower      sound: unimoe_beats, width 32, frozen",
        "connector  speech: query decoder, 32 -> 32, 3 tokens",
        "connector  video: the image connector",
        "layers     3: S·S",
        "4 per sparse layer, 2 per token",
        "group      vision: image, video -> experts [0, 1, 2]",
        "router_aux_loss_coef 0.01",
        "float32 (",
        "layer 0",
        "█ 70",
    ):
        assert expected in text
    assert "PROBLEM" not in text


def test_json_holds_the_same_facts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sparse_layers"] == [0, 2]
    assert facts["groups"]["language"] == {"experts": [1, 2, 3], "modalities": ["text", "speech", "sound"]}
    assert facts["weights"]["num_bytes"] == (folder / "model.safetensors").stat().st_size
    assert facts["router_load"] is None
    assert facts["total"]["total"] == sum(role["total"] for role in facts["parameters"].values())


def test_a_receipt_may_be_a_strangers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for summary, shown in ((["wrote \x1b[31mred"], "    wrote ?[31mred\n"), ({"a": 1}, None), ([3], None)):
        (folder / "receipt.json").write_text(json.dumps({"summary": summary}))
        assert cli.main(["inspect", str(folder)]) == 0
        printed = capsys.readouterr().out
        assert ("receipt of the conversion" in printed) == (shown is not None)
        assert shown is None or shown in printed


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model_and_half_of_the_experts_are_active(tied: bool) -> None:
    model = tiny.model({"tie_word_embeddings": tied})
    counts = count_parameters(model.config)
    assert total_and_active(counts).total == sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert (counts["experts"].total, counts["experts"].active) == (experts, experts // 2)
    assert ("head" in counts) is not tied


def test_dynamic_routing_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {"router_type": "dynamic", "router_top_p": 0.7, "num_null_experts": 1, "num_shared_experts": 2}
    folder = save_bundle(tiny.model({**text, "expert_capacity_factor": 3.0}), None, tmp_path / "model")
    assert cli.main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "4 per sparse layer, at most 4 per token; 1 null (chosen, but empty); 2 shared (used by every" in printed
    assert "type dynamic, top_p 0.7" in printed
    assert "expert_capacity_factor 3.0" in printed
    assert "PROBLEM" not in printed
    assert "4 experts, at most 4 per token, 1 null expert, 2 shared experts, in" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "used"),
    [
        ({"num_shared_experts": 2, "shared_intermediate_size": 24}, 2),
        ({"num_null_experts": 4}, 1),
        ({"num_null_experts": 1, "router_type": "dynamic", "router_top_p": 0.7}, 4 * 4 / 5),
        ({"num_null_experts": 3, **tiny.MOIIE_GROUPS}, 1),
    ],
    ids=["shared", "null", "dynamic", "groups"],
)
def test_active_parameters_are_those_of_a_token(text: dict[str, object], used: float) -> None:
    """Shared experts work for every token, null experts cost nothing; 2 layers of 4 experts with 3 * 32 * 48 each."""
    count = count_parameters(tiny.config(text))["experts"]
    shared = 2 * 3 * 32 * 24 * text.get("num_shared_experts", 0)
    assert count.total == 2 * 4 * 3 * 32 * 48 + shared
    assert count.active == round(2 * used * 3 * 32 * 48 + shared)


def test_dense_text_model_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tiny.text_config(num_experts=0, sparse_layers=None)
    UniMoeForCausalLM.config_class(text_config=text).save_pretrained(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "none, the decoder is dense" in printed
    assert "weights    none in this folder" in printed
    assert "takes      text\n" in printed


def test_weights_that_do_not_fit_are_pointed_out(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors")
    weights = describe_model(str(folder)).weights
    assert weights is not None
    assert weights.problems == ["model.language_model.norm.weight is missing", "lm_head.weight has another shape"]


def test_no_weights_are_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("unimoe.conversion.checkpoints.checkpoint_reader.Checkpoint.read", forbidden)
    monkeypatch.setattr(UniMoeForCausalLM, "from_pretrained", forbidden)
    assert describe_model(str(folder)).num_experts == 4


@pytest.mark.parametrize(
    "record",
    [
        {"layers": [0, 2]},
        {"layers": [0, 2], "modalities": {"image": [[0.5, 0.5]] * 2}},
        {"layers": [0, 2], "modalities": {"image": [[0.25] * 4]}},
        {"layers": [0, 2], "modalities": {"image": [[0.25] * 4, ["a"] * 4]}},
        {"layers": [0, 2], "modalities": {"image": [[-1.0] * 4] * 2}},
    ],
)
def test_a_load_of_another_model_is_refused(record: dict[str, object], folder: Path) -> None:
    write_load(folder, **record)
    with pytest.raises(ConversionError, match=r"router_load.json is no table of 4 experts"):
        describe_model(str(folder))


def test_heat_map_shades_against_an_even_share() -> None:
    load = RouterLoad([1], ["image", "text"], {"image": [[0.98, 0.02]], "text": [[5, 5]]})
    assert router_load_lines(load)[1:] == [
        "  image       image  text",
        "    layer 1    ▓ 98     2",
        "  text        image  text",
        "    layer 1    ░ 50  ░ 50",
    ]


def test_other_models_are_refused_with_a_way_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "convert upcycle" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (["text_config"], "x", ["text_config", "'x'"]),
        (["vision_config"], "x", ["vision_config", "'x'"]),
        (["image_connector"], [1], ["image_connector", "[1]"]),
        (["text_config", "num_attention_heads"], 3, ["num_attention_heads is 3", "multiple"]),
        (["text_config", "num_attention_heads"], "4", ["num_attention_heads", "'4'"]),
        (["text_config", "head_dim"], 7, ["head_dim is 7", "even"]),
        (["vision_config", "num_attention_heads"], 3, ["vision_config", "(3)", "multiple"]),
        (["speech_config", "d_model"], 33, ["33", "towers"]),
        (["vision_config", "patch_size"], 0, ["towers"]),
        (["vision_config", "hidden_act"], "foo", ["'foo'", "towers"]),
        (["speech_connector", "decoder_config"], {"d_model": "x"}, ["d_model", "'x'", "connectors"]),
        (["dtype"], "float33", ["float33"]),
        (["id2label"], 3, ["int"]),
    ],
)
def test_wrong_fields_are_named_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], place: list[str], value: object, said: list[str]
) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    inner = config
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    path.write_text(json.dumps(config))
    capsys.readouterr()
    for command in (["inspect", str(folder)], ["convert", "upcycle", str(folder), "--out", str(folder / "sparse")]):
        assert cli.main(command) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("unimoe: ")
        for part in ["config.json", *said]:
            assert part in error


def test_a_config_that_is_no_object_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text("[1]")
    assert cli.main(["inspect", str(folder)]) == 2
    assert "config.json does not hold a JSON object" in capsys.readouterr().err

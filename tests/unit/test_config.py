"""Bad configurations are refused with the field, the value and what is allowed; good ones survive JSON."""

import copy
import json
import math
import tracemalloc
from typing import Any

import pytest
import tiny
import twins
from transformers import AutoConfig, PreTrainedConfig

from unimoe import UniMoeConfig, UniMoeConnectorConfig, UniMoeTextConfig
from unimoe.errors import ConfigurationError
from unimoe.modeling_unimoe import validation_unimoe

GROUPS = tiny.MOIIE_GROUPS["expert_groups"]
TEXT_MISTAKES = [
    ({"num_experts": -3}, ["num_experts", "-3", "between 0 and 4096"]),
    ({"num_experts": 5000}, ["num_experts", "5000", "4096"]),
    ({"num_experts_per_tok": 8}, ["num_experts_per_tok", "8", "between 1 and 4"]),
    ({"num_experts_per_tok": 0}, ["num_experts_per_tok", "0", "between 1 and 4"]),
    ({**tiny.MOIIE_GROUPS, "num_experts_per_tok": 4}, ["num_experts_per_tok", "4", "between 1 and 3"]),
    ({"sparse_layers": [0, 3]}, ["sparse_layers", "[0, 3]", "between 0 and 2"]),
    ({"sparse_layers": [-1]}, ["sparse_layers", "[-1]", "between 0 and 2"]),
    ({"sparse_layers": [1, 1]}, ["sparse_layers", "[1, 1]", "different"]),
    ({"num_experts": 0, "sparse_layers": [1]}, ["sparse_layers", "[1]", "num_experts is 0"]),
    ({"expert_groups": {"all": [0, 1, 2, 9]}}, ["expert_groups", "[0, 1, 2, 9]", "between 0 and 3"]),
    ({"expert_groups": {"all": []}}, ["expert_groups", "[]", "between 0 and 3"]),
    ({"expert_groups": {"all": [0, 0, 1]}}, ["expert_groups", "[0, 0, 1]", "different"]),
    ({"expert_groups": GROUPS}, ["modality_groups", "'text'", "language", "vision"]),
    (
        {**tiny.MOIIE_GROUPS, "modality_groups": {**tiny.MOIIE_GROUPS["modality_groups"], "image": "seeing"}},
        ["modality_groups", "'image'", "'seeing'", "language"],
    ),
    (
        {**tiny.MOIIE_GROUPS, "expert_groups": {"vision": [0, 1], "language": [1, 2]}},
        ["expert_groups", "[3]"],
    ),
    ({"router_aux_loss_coef": math.nan}, ["router_aux_loss_coef", "nan", "finite"]),
    ({"router_aux_loss_coef": -0.1}, ["router_aux_loss_coef", "-0.1", ">= 0"]),
    ({"router_z_loss_coef": math.inf}, ["router_z_loss_coef", "inf", "finite"]),
    ({"router_jitter_noise": -1.0}, ["router_jitter_noise", "-1.0", ">= 0"]),
    ({"router_jitter_noise": 2}, ["router_jitter_noise", "2", "below 1"]),
    ({"router_jitter_noise": math.nan}, ["router_jitter_noise", "nan", "below 1"]),
    ({"modality_groups": {"smell": "all"}}, ["modality_groups", "'smell'", "'image'"]),
    ({"modality_groups": {"image": "vision"}}, ["modality_groups", "'image'", "'vision'", "['all']"]),
    (
        {**tiny.MOIIE_GROUPS, "modality_groups": {**tiny.MOIIE_GROUPS["modality_groups"], "smell": "vision"}},
        ["modality_groups", "'smell'", "'image'"],
    ),
    ({"hidden_act": "foo"}, ["hidden_act", "'foo'", "silu"]),
    ({"head_dim": 7}, ["head_dim", "7", "even"]),
    ({"rope_theta": math.nan}, ["rope_parameters.rope_theta", "nan", "> 0"]),
    ({"rope_theta": -1}, ["rope_parameters.rope_theta", "-1", "> 0"]),
    ({"rope_parameters": {"rope_theta": "x"}}, ["rope_parameters.rope_theta", "'x'", "> 0"]),
    ({"rope_parameters": {"rope_type": "foo"}}, ["rope_parameters.rope_type", "'foo'", "'default'"]),
    ({"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters.factor", "None", "'linear'"]),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 0}}, ["rope_parameters.factor", "0", "> 0"]),
    (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": 3}},
        ["rope_parameters.long_factor", "3", "a list"],
    ),
    ({"num_null_experts": -1}, ["num_null_experts", "-1", "between 0 and 4096"]),
    ({"num_shared_experts": 5000}, ["num_shared_experts", "5000", "between 0 and 4096"]),
    ({"shared_intermediate_size": 0}, ["shared_intermediate_size", "0", "between 1"]),
    ({"num_null_experts": 1, "num_experts_per_tok": 6}, ["num_experts_per_tok", "6", "between 1 and 5", "null"]),
    ({"router_type": "dynamic", "router_top_p": 1.5}, ["router_top_p", "1.5", "between 0 and 1"]),
    ({"router_type": "dynamic", "router_near_max_band": math.inf}, ["router_near_max_band", "inf", "finite"]),
    ({"router_type": "dynamic", "expert_capacity_factor": 0}, ["expert_capacity_factor", "0", "> 0", "None"]),
    ({"router_type": "dynamic", "min_expert_capacity": 0}, ["min_expert_capacity", "0", "between 1"]),
    ({"router_top_p": 0.7}, ["router_top_p", "0.7", "'top_k'", "'dynamic'"]),
    ({"router_losses_as_released": True, "router_type": "dynamic"}, ["router_losses_as_released", "'top_k'"]),
    ({"router_aux_loss_counts": "first", "router_type": "dynamic"}, ["router_aux_loss_counts", "'all'"]),
    ({"router_modality_loss_coef": 0.1}, ["router_modality_loss_coef", "0.1", "modality_experts"]),
    ({"router_divergence_loss_coef": -1.0}, ["router_divergence_loss_coef", "-1.0", ">= 0"]),
    ({"modality_experts": {"smell": [0]}}, ["modality_experts", "smell", "image"]),
    ({"modality_experts": {"image": [99]}}, ["modality_experts", "99"]),
    ({**tiny.MOIIE_GROUPS, "router_divergence_loss_coef": 0.1}, ["router_divergence_loss_coef", "expert_groups"]),
    ({"expert_capacity_factor": 2.0}, ["expert_capacity_factor", "2.0", "None", "'dynamic'"]),
    ({"router_type": "dynamic", "router_scoring": "sigmoid"}, ["router_scoring", "'sigmoid'", "'softmax'", "'top_k'"]),
    ({"router_type": "dynamic", "norm_topk_prob": False}, ["norm_topk_prob", "False", "'top_k'"]),
    ({"router_type": "dynamic", **tiny.MOIIE_GROUPS}, ["expert_groups", "vision", "None", "'top_k'"]),
    ({"hidden_size": 0}, ["hidden_size", "0", "between 1 and 65536"]),
    ({"num_attention_heads": 0}, ["num_attention_heads", "0", "between 1 and 4096"]),
    ({"num_key_value_heads": 0}, ["num_key_value_heads", "0", "between 1 and 4096"]),
    ({"num_key_value_heads": 3}, ["num_attention_heads", "4", "multiple", "3"]),
    ({"head_dim": 0}, ["head_dim", "0", "between 1"]),
    ({"sliding_window": 0}, ["sliding_window", "0", "between 1"]),
    ({"attention_dropout": 1.5}, ["attention_dropout", "1.5", "between 0 and 1"]),
    ({"rms_norm_eps": -1e-6}, ["rms_norm_eps", "-1e-06", "between 0 and 1"]),
    ({"initializer_range": math.nan}, ["initializer_range", "nan", "between 0 and 1"]),
    ({"pad_token_id": 96}, ["pad_token_id", "96", "between 0 and 95"]),
    ({"pad_token_id": -1}, ["pad_token_id", "-1", "between 0 and 95"]),
]
# What would ask for terabytes, or for years, from a configuration file of a few bytes.
HOSTILE_SIZES = [
    {"hidden_size": 1 << 30},
    {"vocab_size": 1 << 40},
    {"intermediate_size": 1 << 40},
    {"moe_intermediate_size": 1 << 40},
    {"num_hidden_layers": 10**9},
    {"num_attention_heads": 1 << 20},
    {"num_experts": 10**9},
    {"num_null_experts": 10**9},
    {"num_shared_experts": 10**9},
    {"shared_intermediate_size": 1 << 40},
    {"head_dim": 1 << 40},
    {"max_position_embeddings": 1 << 60},
]


def ids(cases: list[Any]) -> list[str]:
    fields = [case[0] if isinstance(case, tuple) else case for case in cases]
    return [f"{'-'.join(case)}={list(case.values())[-1]}"[:60] for case in fields]


@pytest.mark.parametrize(("fields", "said"), TEXT_MISTAKES, ids=ids(TEXT_MISTAKES))
def test_text_mistakes_are_explained(fields: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        tiny.text_config(**fields)
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize("fields", HOSTILE_SIZES, ids=ids(HOSTILE_SIZES))
def test_hostile_sizes_are_refused(fields: dict[str, Any]) -> None:
    (field,) = fields
    with pytest.raises(ConfigurationError, match=field):
        tiny.text_config(**fields)


def test_a_billion_layers_are_refused_before_they_are_counted() -> None:
    """Without `sparse_layers` the configuration lists every layer; a list of a billion would take the memory."""
    tracemalloc.start()
    with pytest.raises(ConfigurationError, match="num_hidden_layers is 10000000;"):
        UniMoeTextConfig(num_hidden_layers=10**7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_placeholders_may_follow_the_vocabulary() -> None:
    assert tiny.config(sound_token_id=tiny.VOCAB_SIZE).sound_token_id == tiny.VOCAB_SIZE


@pytest.mark.parametrize("layer", [-4, 3])
def test_every_hidden_state_of_the_tower_may_be_read(layer: int) -> None:
    assert tiny.config(vision_feature_layer=layer).vision_feature_layer == layer


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"num_experts": "four"}, "num_experts"),
        ({"hidden_size": 32.5}, "hidden_size"),
        ({"router_scoring": "top-p"}, "router_scoring"),
        ({"expert_groups": [0, 1]}, "expert_groups"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ],
    ids=["word for number", "half a unit", "unknown scoring", "list for groups", "word for switch"],
)
def test_wrong_types_name_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(Exception, match=field) as error:
        tiny.text_config(**fields)
    assert str(fields[field]) in str(error.value)


MODEL_MISTAKES = [
    ({"vision_config": None}, ["image_connector", "vision_config"]),
    ({"image_connector": None}, ["vision_config", "image_connector"]),
    ({"speech_config": None}, ["speech_connector", "speech_config"]),
    ({"sound_connector": None}, ["audio_config", "sound_connector"]),
    ({"image_connector": tiny.connector(output_size=40)}, ["image_connector.output_size", "40", "32"]),
    ({"image_token_id": None}, ["image_token_id", "None"]),
    ({"audio_token_id": None}, ["audio_token_id", "None"]),
    ({"sound_token_id": None}, ["sound_token_id", "None"]),
    ({"video_token_id": tiny.IMAGE}, ["placeholder ids", "92", "different"]),
    ({"image_token_id": -1}, ["image_token_id", "-1", "between 0"]),
    ({"sound_token_id": 10**9}, ["sound_token_id", "1000000000", "between 0 and 65631"]),
    ({"vision_feature_layer": 99}, ["vision_feature_layer", "99", "between -4 and 3"]),
    ({"vision_feature_layer": -5}, ["vision_feature_layer", "-5", "between -4 and 3"]),
    ({"vision_token_grid": 0}, ["vision_token_grid", "0", "between 1 and 256"]),
    ({"video_num_frames": 0}, ["video_num_frames", "0", "between 1 and 4096"]),
    ({"num_labels": 10**9}, ["UniMoeConfig.num_labels", "1000000000", "between 0 and 65536"]),
    ({"text_config": {"num_labels": 10**9}}, ["text_config.num_labels", "1000000000", "between 0 and 65536"]),
    ({"speech_config": {"d_model": 8}}, ["speech_config", "model_type"]),
    ({"speech_config": {"model_type": "whispr"}}, ["speech_config.model_type", "'whispr'", "'whisper'"]),
    ({"speech_config": {"model_type": ["whisper"]}}, ["speech_config.model_type", "['whisper']"]),
    ({"speech_config": {"model_type": "whisper", "d_model": "8"}}, ["speech_config", "d_model", "'8'"]),
    ({"text_config": {"hidden_size": "8"}}, ["text_config", "hidden_size", "'8'"]),
    ({"image_connector": {"type": "glue"}}, ["image_connector", "type", "glue", "qformer"]),
    (
        {"vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 10**9}},
        ["vision_config.num_hidden_layers", "1000000000", "between 1 and 1024"],
    ),
    (
        {"speech_config": {"model_type": "whisper", "encoder_layers": 10**9}},
        ["speech_config.encoder_layers", "1000000000", "between 1 and 1024"],
    ),
]


@pytest.mark.parametrize(("fields", "said"), MODEL_MISTAKES, ids=ids(MODEL_MISTAKES))
def test_model_mistakes_are_explained(fields: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        tiny.config(**fields)
    for part in said:
        assert part in str(error.value)


CONNECTOR_MISTAKES = [
    ({"input_size": 0}, ["input_size", "0", "between 1 and 65536"]),
    ({"output_size": 1 << 30}, ["output_size", "65536"]),
    ({"depth": 0}, ["depth", "0", "between 1 and 16"]),
    ({"num_tokens": 0}, ["num_tokens", "0", "between 1 and 65536"]),
    ({"type": "qformer"}, ["num_tokens", "None", "qformer"]),
    ({"decoder_config": {"decoder_layers": 10**9}}, ["decoder_config.decoder_layers", "1000000000", "1024"]),
    ({"qformer_config": {"num_labels": 10**9}}, ["qformer_config.num_labels", "1000000000", "65536"]),
]


@pytest.mark.parametrize(("fields", "said"), CONNECTOR_MISTAKES, ids=ids(CONNECTOR_MISTAKES))
def test_connector_mistakes_are_explained(fields: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        UniMoeConnectorConfig(**fields)
    for part in said:
        assert part in str(error.value)


def plain(config: PreTrainedConfig) -> dict[str, Any]:
    """All fields, as JSON holds them; not where the configuration came from."""
    return {**json.loads(config.to_json_string(use_diff=False)), "_name_or_path": ""}


@pytest.mark.parametrize("name", twins.TWINS)
def test_json_round_trip(name: str, tmp_path: Any) -> None:
    config = twins.TWINS[name]().config
    config.save_pretrained(tmp_path)
    for loaded in (
        UniMoeConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        UniMoeConfig(**json.loads(config.to_json_string(use_diff=False))),
    ):
        assert type(loaded) is UniMoeConfig
        assert plain(loaded) == plain(config)
        for field in UniMoeConfig.sub_configs:
            assert type(getattr(loaded, field)) is type(getattr(config, field))
        assert loaded.text_config.router_groups == config.text_config.router_groups


def test_text_config_alone_round_trip(tmp_path: Any) -> None:
    config = tiny.text_config(**tiny.MOIIE_GROUPS, rope_parameters={"rope_type": "linear", "factor": 2.0})
    config.save_pretrained(tmp_path)
    assert plain(UniMoeTextConfig.from_pretrained(tmp_path)) == plain(config)


def test_defaults_are_filled_in() -> None:
    config = UniMoeTextConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=3, intermediate_size=96)
    assert (config.num_key_value_heads, config.head_dim, config.moe_intermediate_size) == (4, 16, 96)
    assert config.sparse_layers == [0, 1, 2]
    assert config.num_local_experts == config.num_experts
    assert [group.experts for group in config.router_groups] == [(0, 1, 2, 3)]
    assert UniMoeTextConfig(num_experts=0).sparse_layers == []


def test_plans_name_modules_that_exist() -> None:
    text = {"use_qk_norm": True, "num_shared_experts": 1, "plora_config": {"rank": 4}}
    model = tiny.model(text).model.language_model
    names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    config = model.config
    for plan in (config.base_model_tp_plan, config.base_model_ep_plan, config.base_model_pp_plan):
        for pattern in plan:
            layers = range(config.num_hidden_layers)
            assert any(pattern.replace("*", str(layer)) in names for layer in layers), pattern


def test_videos_go_through_the_image_connector_unless_they_have_their_own() -> None:
    config = tiny.config()
    assert list(config.connectors) == ["image", "video", "speech", "sound"]
    config.video_connector = None
    assert config.connectors["video"] is config.image_connector
    config.video_connector = copy.deepcopy(config.image_connector)
    assert config.connectors["video"] is config.video_connector
    config.sound_connector = None
    assert config.connectors["sound"] is None


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(validation_unimoe.logger, "warning_once", said.append, raising=False)
    return said


@pytest.mark.parametrize(
    ("build", "name", "meant"),
    [
        (tiny.text_config, "num_experts_per_token", "num_experts_per_tok"),
        (tiny.text_config, "spare_layers", "sparse_layers"),
        (tiny.config, "image_token_index", "image_token_id"),
        (UniMoeConnectorConfig, "output_norms", "output_norm"),
    ],
)
def test_misspelt_fields_are_pointed_out(warnings: list[str], build: Any, name: str, meant: str) -> None:
    build(**{name: 1})
    assert len(warnings) == 1
    assert f"{name!r}" in warnings[0]
    assert f"{meant!r}" in warnings[0]


def test_what_transformers_adds_is_no_misspelling(warnings: list[str], tmp_path: Any) -> None:
    config = tiny.config(
        {"dtype": "float32", "torch_dtype": "float32", "num_local_experts": 4, "rope_theta": 5e5, "temperature": 0.5},
        architectures=["UniMoeForCausalLM"],
        auto_map={"AutoConfig": "configuration_unimoe.UniMoeConfig"},
        transformers_version="5.0.0",
        license_note="something of one's own",
        num_labels=2,
    )
    config.save_pretrained(tmp_path)
    UniMoeConfig.from_pretrained(tmp_path, attn_implementation="eager")
    UniMoeConfig(**config.to_dict())
    assert warnings == []

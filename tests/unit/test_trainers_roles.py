"""Every parameter has a role, and stages train exactly the roles they name."""

import pytest
import tiny

from unimoe import UniMoeForCausalLM
from unimoe.errors import RecipeError
from unimoe.roles import ROLES, role_of
from unimoe.trainers.recipe.recipe_parts import LoraSettings
from unimoe.trainers.steps.lora import add_lora, merge_lora
from unimoe.trainers.steps.trainable import count_trainable, format_trainable_table, set_trainable, trainable_table


@pytest.fixture
def model() -> UniMoeForCausalLM:
    mixer = {"layers": [1], "rank": 4, "num_heads": 2, "num_latents": 4, "compressor_depth": 1}
    return tiny.model({"use_qk_norm": True, "mixer_config": mixer, "plora_config": {"rank": 4, "alpha": 4}})


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", "towers"),
        ("model.speech_connector.decoder.layers.0.self_attn.q_proj.weight", "aligners"),
        ("model.sound_connector.qformer.layernorm.weight", "aligners"),
        ("model.speech_connector.query_tokens", "connectors"),
        ("model.image_connector.output_norm.weight", "connectors"),
        ("model.aux_compressor.blocks.0.attention.norm_media.weight", "compressor"),
        ("model.language_model.layers.1.mixer.image_experts.own.q_proj.down.weight", "mixers"),
        ("model.language_model.layers.1.mixer.image_gate.bias", "mixer_gates"),
        ("model.language_model.layers.1.self_attn.plora.q_b.weight", "plora"),
        ("model.language_model.layers.1.mlp.plora.gate_a.weight", "plora"),
        ("model.language_model.layers.1.mlp.gate_proj.weight", "ffn"),
        ("model.language_model.layers.0.mlp.gate.weight", "router"),
        ("model.language_model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("model.language_model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.language_model.layers.0.post_attention_layernorm.weight", "norms"),
        ("model.language_model.norm.weight", "norms"),
        ("model.language_model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "head"),
        ("module.lm_head.weight", "head"),
        (
            "base_model.model.model.language_model.layers.0.mlp.experts.base_layer.lora_A.default.weight",
            "experts",
        ),
        ("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.default.weight", "attention"),
        ("base_model.model.model.language_model.layers.0.self_attn.q_proj.base_layer.weight", "attention"),
    ],
)
def test_roles_by_name(name: str, role: str) -> None:
    assert role_of(name) == role


def test_every_parameter_has_a_role(model: UniMoeForCausalLM) -> None:
    assert {role_of(name) for name, _ in model.named_parameters()} == set(ROLES)
    with pytest.raises(RecipeError, match=r"'classifier\.weight' has no role"):
        role_of("classifier.weight")


def test_only_named_roles_train(model: UniMoeForCausalLM) -> None:
    set_trainable(model, ["router", "connectors"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {role_of(name) for name in trained} == {"router", "connectors"}
    rows = {row.role: row for row in trainable_table(model)}
    assert rows["router"].trainable == rows["router"].parameters == 2 * 4 * tiny.HIDDEN
    assert rows["experts"].trainable == 0
    assert sum(row.trainable for row in rows.values()) == count_trainable(model)
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in model.parameters())
    assert f"{rows['router'].trainable:,}" in format_trainable_table(rows.values())


def test_a_part_of_a_role(model: UniMoeForCausalLM) -> None:
    set_trainable(model, ["connectors"], lambda name: name.startswith("model.image_connector."))
    assert count_trainable(model) == sum(p.numel() for p in model.model.image_connector.parameters())


def test_impossible_roles(model: UniMoeForCausalLM) -> None:
    with pytest.raises(RecipeError, match=r"'layers' does not exist; choose from towers"):
        set_trainable(model, ["layers"])
    with pytest.raises(RecipeError, match=r"'router' is to be trained but this model has no such"):
        set_trainable(tiny.model({"num_experts": 0, "sparse_layers": []}), ["router"])
    with pytest.raises(RecipeError, match=r"tied to the embeddings: train 'embeddings'"):
        set_trainable(tiny.model({"tie_word_embeddings": True}), ["head"])


def test_lora_trains_adapters_beside_what_trained_before(model: UniMoeForCausalLM) -> None:
    set_trainable(model, ["router", "connectors"])
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {name for name, _ in model.named_parameters()}
    adapted = add_lora(model, LoraSettings(rank=2, targets=["experts", "attention", "ffn"]))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    full = {name.removeprefix("base_model.model.") for name in trained if "lora_" not in name}
    assert full == before
    adapters = [name for name in trained if "lora_" in name]
    assert {role_of(name) for name in adapters} == {"experts", "attention", "ffn"}
    # Layers 0 and 2 are sparse, 1 is dense; A and B each. Connectors have a q_proj too, and must have no adapter.
    layers, projections = 3, 4
    assert sum(role_of(name) == "attention" for name in adapters) == 2 * layers * projections
    assert sum(role_of(name) == "experts" for name in adapters) == 2 * 2 * 2
    assert sum(role_of(name) == "ffn" for name in adapters) == 2 * 3
    merged = merge_lora(adapted)
    assert isinstance(merged, UniMoeForCausalLM)
    assert {name for name, _ in merged.named_parameters()} == names


def test_lora_on_experts_needs_experts() -> None:
    with pytest.raises(RecipeError, match=r"targets holds 'experts' but the model has none"):
        add_lora(tiny.model({"num_experts": 0, "sparse_layers": []}), LoraSettings())

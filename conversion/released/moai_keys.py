"""Tensor names of MoAI's code and what each becomes in ours.

model.tok_embeddings, model.norm, output      the language model outside its layers
model.layers.{i}.attention.wqkv|wo            queries, keys and values alternate per key-value head (InternLM2)
model.layers.{i}.feed_forward.w1|w3|w2        gate, up, down
    .Plora_main, .Plora_A, .Plora_B           each of these: the weight and its partial LoRA
model.layers.{i}.attention.moai_{CA,SA,GA}_*  experts and gates of a mixer
moai_compressor, vision_proj, vit             compressor, image projector, CLIP
"""

from dataclasses import dataclass

from ..checkpoints.key_rules import Rows, Rule

_LAYER, _OUR_LAYER = "model.layers.{layer}.", "model.language_model.layers.{layer}."
VISION_TOWER = "vit.vision_tower.vision_model."
POSITIONS = VISION_TOWER + "embeddings.position_embedding.weight"
EMBEDDING, HEAD = "model.tok_embeddings.weight", "output.weight"

# Expert of the original -> side and source of ours; see `modeling_unimoe_moai`.
EXPERTS = {
    "CA_img_aux": "image_experts.aux",
    "CA_img_lang": "image_experts.other",
    "SA_img": "image_experts.own",
    "CA_lang_aux": "language_experts.aux",
    "CA_lang_img": "language_experts.other",
    "SA_lang": "language_experts.own",
}
GATES = {"GA_img": "image_gate", "GA_lang": "language_gate"}
_PROJECTIONS = ("q", "k", "v", "o")
_BOTTLENECK = {"0": "down", "1": "up"}
_FFN = {"w1": "gate", "w3": "up", "w2": "down"}


@dataclass(frozen=True)
class MoaiSizes:
    """What the rows of fused and cut tensors depend on.

    Args:
        vocabulary: rows of the head. embeddings: rows of the embedding table, one more with `<image>`.
    """

    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    embeddings: int


def moai_rules(sizes: MoaiSizes, vision_prefix: str) -> tuple[Rule, ...]:
    """All rules; `vision_prefix` is what the vision tower's tensors start with in ours."""
    # `<image>` has a row that nobody reads: its places are filled with features.
    words = Rows(0, sizes.vocabulary, sizes.embeddings) if sizes.embeddings > sizes.vocabulary else None
    outside = (
        Rule(EMBEDDING, "model.language_model.embed_tokens.weight", taken=words),
        Rule("model.norm.weight", "model.language_model.norm.weight"),
        Rule(HEAD, "lm_head.weight"),
        Rule(_LAYER + "attention_norm.weight", _OUR_LAYER + "input_layernorm.weight"),
        Rule(_LAYER + "ffn_norm.weight", _OUR_LAYER + "post_attention_layernorm.weight"),
    )
    vision = (
        Rule(VISION_TOWER + "embeddings.position_ids", None, reason="computed from the configuration: 0, 1, 2, ..."),
        Rule(VISION_TOWER + "{rest}", vision_prefix + "{rest}"),
        Rule("vision_proj.0.{parameter}", "model.image_connector.layers.0.{parameter}"),
        Rule("vision_proj.2.{parameter}", "model.image_connector.layers.1.{parameter}"),
    )
    angles = Rule(
        _LAYER + "attention.rotary_emb.{rest}", None, reason="computed from the configuration: rotary angles"
    )
    return (*outside, *_attention_rules(sizes), *_ffn_rules(), *_mixer_rules(), *_compressor_rules(), *vision, angles)


def _attention_rules(sizes: MoaiSizes) -> tuple[Rule, ...]:
    original, ours = _LAYER + "attention.", _OUR_LAYER + "self_attn."
    main = {name: f"{ours}{name}_proj.weight" for name in "qkv"}
    added = {name: f"{ours}plora.{name}_b.weight" for name in "qkv"}
    return (
        *_alternating(f"{original}wqkv.Plora_main.weight", main, sizes),
        *_alternating(f"{original}wqkv.Plora_B.weight", added, sizes),
        Rule(f"{original}wqkv.Plora_A.weight", f"{ours}plora.qkv_a.weight"),
        Rule(f"{original}wo.Plora_main.weight", f"{ours}o_proj.weight"),
        Rule(f"{original}wo.Plora_A.weight", f"{ours}plora.o_a.weight"),
        Rule(f"{original}wo.Plora_B.weight", f"{ours}plora.o_b.weight"),
    )


def _alternating(original: str, ours: dict[str, str], sizes: MoaiSizes) -> list[Rule]:
    """Per key-value head the rows of its queries, of its key and of its value."""
    groups = sizes.key_value_heads
    rows = {"q": sizes.heads // groups * sizes.head_dim, "k": sizes.head_dim, "v": sizes.head_dim}
    total, rules = groups * sum(rows.values()), []
    for name, count in rows.items():
        before = sum(rows[other] for other in "qkv"[: "qkv".index(name)])
        for group in range(groups):
            start = group * sum(rows.values()) + before
            rules.append(
                Rule(
                    original,
                    ours[name],
                    "rows",
                    part=group,
                    parts=groups,
                    taken=Rows(start, start + count, total),
                    filled=Rows(group * count, (group + 1) * count, groups * count),
                )
            )
    return rules


def _ffn_rules() -> list[Rule]:
    rules = []
    for theirs, name in _FFN.items():
        original, ours = f"{_LAYER}feed_forward.{theirs}.", f"{_OUR_LAYER}mlp."
        rules += [
            Rule(f"{original}Plora_main.weight", f"{ours}{name}_proj.weight"),
            Rule(f"{original}Plora_A.weight", f"{ours}plora.{name}_a.weight"),
            Rule(f"{original}Plora_B.weight", f"{ours}plora.{name}_b.weight"),
        ]
    return rules


def _mixer_rules() -> list[Rule]:
    gates = [
        Rule(f"{_LAYER}attention.moai_{theirs}.{{parameter}}", f"{_OUR_LAYER}mixer.{ours}.{{parameter}}")
        for theirs, ours in GATES.items()
    ]
    experts = [
        Rule(
            f"{_LAYER}attention.moai_{theirs}.linear_{projection}.{half}.weight",
            f"{_OUR_LAYER}mixer.{ours}.{projection}_proj.{name}.weight",
        )
        for theirs, ours in EXPERTS.items()
        for projection in _PROJECTIONS
        for half, name in _BOTTLENECK.items()
    ]
    return gates + experts


def _compressor_rules() -> list[Rule]:
    original, ours = "moai_compressor.", "model.aux_compressor."
    block, our_block = original + "layers.{layer}.", ours + "blocks.{layer}."
    return [
        Rule(original + "latents", ours + "latents"),
        Rule(original + "norm.{parameter}", ours + "norm.{parameter}"),
        *(
            Rule(f"{block}0.{name}.{{parameter}}", f"{our_block}attention.{name}.{{parameter}}")
            for name in ("norm_media", "norm_latents", "to_q", "to_kv", "to_out")
        ),
        Rule(block + "1.0.{parameter}", our_block + "ffn.norm.{parameter}"),
        Rule(block + "1.1.weight", our_block + "ffn.up.weight"),
        Rule(block + "1.3.weight", our_block + "ffn.down.weight"),
    ]


__all__ = ["EMBEDDING", "EXPERTS", "GATES", "HEAD", "POSITIONS", "VISION_TOWER", "MoaiSizes", "moai_rules"]

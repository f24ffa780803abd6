"""Rules for what descendants of LLaVA's code have in common: a LLaMA decoder, an image projector, a vision tower.

Uni-MoE and MoIIE (through Bunny) are such descendants.
"""

from collections.abc import Iterable

from .key_rules import Rule

LANGUAGE = "model.language_model."
VISION_TOWER = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."

OUTSIDE_LAYERS = (
    Rule("lm_head.weight", "lm_head.weight"),
    Rule("model.embed_tokens.weight", LANGUAGE + "embed_tokens.weight"),
    Rule("model.norm.weight", LANGUAGE + "norm.weight"),
    Rule(
        "model.layers.{layer}.self_attn.rotary_emb.inv_freq",
        None,
        reason="computed from the configuration: rotary angles",
    ),
)

# One Linear, or Linears at the even places of a sequence with GELU between them.
PROJECTOR_RULES = (
    *(Rule(f"{PROJECTOR}{2 * i}.{{parameter}}", f"model.image_connector.layers.{i}.{{parameter}}") for i in range(16)),
    Rule(PROJECTOR + "{parameter}", "model.image_connector.layers.0.{parameter}"),
)


def layer_rules(*modules: str) -> tuple[Rule, ...]:
    """Rules of weights that are called so below a decoder layer in both."""
    return tuple(
        Rule(f"model.layers.{{layer}}.{module}.weight", f"{LANGUAGE}layers.{{layer}}.{module}.weight")
        for module in modules
    )


NORMS = ("input_layernorm", "post_attention_layernorm")
ATTENTION = tuple(f"self_attn.{projection}_proj" for projection in "qkvo")
FFN = tuple(f"mlp.{projection}_proj" for projection in ("gate", "up", "down"))
LLAMA_DECODER = (*OUTSIDE_LAYERS, *layer_rules(*NORMS, *ATTENTION, *FFN))


def expert_rules(module: str, experts: range | None = None, numbered: bool = True) -> tuple[Rule, ...]:
    """Rules of experts with three projections each, which the original keeps so below `mlp.`.

    Args:
        experts: which of our experts they are; None means all.
        numbered: whether the module holds them by number, or is the one expert itself.
    """
    below = f"model.layers.{{layer}}.mlp.{module}" + (".{expert}" if numbered else "")
    return tuple(
        Rule(
            f"{below}.{projection}.weight",
            f"{LANGUAGE}layers.{{layer}}.mlp.experts.{fused}",
            "expert",
            part,
            parts,
            experts=experts,
        )
        for projection, fused, part, parts in (
            ("gate_proj", "gate_up_proj", 0, 2),
            ("up_proj", "gate_up_proj", 1, 2),
            ("down_proj", "down_proj", 0, 1),
        )
    )


def vision_rules(prefix: str) -> tuple[Rule, ...]:
    """Rules of the vision tower; `prefix` is what its tensors start with in ours, see `vision_prefix`."""
    return (
        Rule(
            VISION_TOWER + "vision_model.embeddings.position_ids",
            None,
            reason="computed from the configuration: 0, 1, 2, ...",
        ),
        Rule(VISION_TOWER + "vision_model.{rest}", prefix + "{rest}"),
    )


def without_numbers(sources: dict[str, list[str]]) -> dict[str, list[str]]:
    """By original names: an image projector of one layer has no numbers in its names."""
    return {name.replace(PROJECTOR + "0.", PROJECTOR): ours for name, ours in sources.items()}


def vision_prefix(our_names: Iterable[str]) -> str:
    """Start of the vision tower's names among ours: releases of transformers differ in an inner module."""
    nested = "model.vision_tower.vision_model."
    return nested if any(name.startswith(nested) for name in our_names) else "model.vision_tower."

"""Roles: the parts of a model that are trained or frozen, have learning rates of their own, and are counted apart."""

import re

from .errors import RecipeError

ROLES = (
    "towers",
    "connectors",
    "aligners",
    "compressor",
    "mixers",
    "mixer_gates",
    "plora",
    "router",
    "experts",
    "ffn",
    "attention",
    "norms",
    "embeddings",
    "head",
)

# First match wins; names are those of UniMoeForCausalLM after `plain_name`.
_PATTERNS = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        ("towers", r"^model\.(vision|speech|audio)_tower\."),
        # The networks inside query connectors (a Whisper decoder, a Q-Former) are often pretrained and want a rate of
        # their own; Uni-MoE freezes them in stage 3. Queries and projections are "connectors".
        ("aligners", r"^model\.(image|video|speech|sound)_connector\.(decoder|qformer)\."),
        ("connectors", r"^model\.(image|video|speech|sound)_connector\."),
        # MoAI's parts: its compressor, the experts and the gates of its mixers, its partial LoRA.
        ("compressor", r"^model\.aux_compressor\."),
        ("mixer_gates", r"\.mixer\.(image|language)_gate\."),
        ("mixers", r"\.mixer\."),
        ("plora", r"\.plora\."),
        ("head", r"^lm_head\."),
        ("embeddings", r"^model\.language_model\.embed_tokens\."),
        ("router", r"\.mlp\.gate\."),
        ("experts", r"\.mlp\.(experts|shared_experts)\."),
        ("ffn", r"\.mlp\.(gate_proj|up_proj|down_proj)\."),
        ("norms", r"(layernorm|_norm|\.norm)\."),
        ("attention", r"\.self_attn\."),
    )
)


def plain_name(parameter_name: str) -> str:
    """A parameter's name without what PEFT and wrappers put around it; an adapter gets the name of its target."""
    name = re.sub(r"^(module\.|base_model\.model\.|_orig_mod\.)+", "", parameter_name)
    name = name.replace(".base_layer", "")
    return re.sub(r"\.(lora_[A-Za-z_]+)(\.\w+)*(\.weight)?$", ".weight", name)


def role_of(parameter_name: str) -> str:
    """The role of a parameter of `UniMoeForCausalLM`, also when PEFT wraps it.

    Raises:
        RecipeError: the name belongs to no part of the model.
    """
    name = plain_name(parameter_name)
    for role, pattern in _PATTERNS:
        if pattern.search(name):
            return role
    raise RecipeError(f"The parameter {parameter_name!r} has no role: it is in none of {ROLES}.")

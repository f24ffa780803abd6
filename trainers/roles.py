"""Roles: the parts of a model that a stage trains or freezes, and that have learning rates of their own."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from unimoe.errors import RecipeError

ROLES = ("towers", "connectors", "aligners", "router", "experts", "ffn", "attention", "norms", "embeddings", "head")

# First match wins; names are those of UniMoeForCausalLM after `plain_name`.
_PATTERNS = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        ("towers", r"^model\.(vision|speech|audio)_tower\."),
        # The networks inside query connectors (a Whisper decoder, a Q-Former) are often pretrained and want a rate of
        # their own; Uni-MoE freezes them in stage 3. Queries and projections are "connectors".
        ("aligners", r"^model\.(image|video|speech|sound)_connector\.(decoder|qformer)\."),
        ("connectors", r"^model\.(image|video|speech|sound)_connector\."),
        ("head", r"^lm_head\."),
        ("embeddings", r"^model\.language_model\.embed_tokens\."),
        ("router", r"\.mlp\.gate\."),
        ("experts", r"\.mlp\.(experts|shared_experts)\."),
        ("ffn", r"\.mlp\.(gate_proj|up_proj|down_proj)\."),
        ("norms", r"(layernorm|_norm|\.norm)\."),
        ("attention", r"\.self_attn\."),
    )
)


@dataclass(frozen=True)
class TrainableRow:
    """One line of the table of what trains: number of tensors and of parameters of a role, trained and in all."""

    role: str
    tensors: int
    parameters: int
    trainable_tensors: int
    trainable: int


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


def set_trainable(model: nn.Module, roles: Iterable[str], where: Callable[[str], bool] | None = None) -> None:
    """Train the parameters of these roles and freeze all others.

    Args:
        where: if given, only parameters whose plain name it accepts are trained.

    Raises:
        RecipeError: a role is unknown, or the model has no parameter of it.
    """
    roles = list(roles)
    for role in roles:
        if role not in ROLES:
            raise RecipeError(f"The role {role!r} does not exist; choose from {', '.join(ROLES)}.")
    found = set()
    for name, parameter in model.named_parameters():
        role = role_of(name)
        trained = role in roles and (where is None or where(plain_name(name)))
        parameter.requires_grad_(trained)
        if trained:
            found.add(role)
    for role in roles:
        if role not in found:
            hint = " Its head is tied to the embeddings: train 'embeddings'." if role == "head" else ""
            raise RecipeError(f"The role {role!r} is to be trained but this model has no such parameters.{hint}")


def trainable_table(model: nn.Module) -> list[TrainableRow]:
    """One row per role that the model has, in the order of `ROLES`."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = counts.setdefault(role_of(name), [0, 0, 0, 0])
        row[0] += 1
        row[1] += parameter.numel()
        if parameter.requires_grad:
            row[2] += 1
            row[3] += parameter.numel()
    return [TrainableRow(role, *counts[role]) for role in ROLES if role in counts]


def count_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def format_trainable_table(rows: Iterable[TrainableRow]) -> str:
    """The table as text, one line per role and a sum."""
    rows = list(rows)
    lines = [f"{'role':<12}{'tensors':>9}{'parameters':>15}{'trained':>15}"]
    for row in rows:
        lines.append(f"{row.role:<12}{row.tensors:>9,}{row.parameters:>15,}{row.trainable:>15,}")
    total, trained = sum(row.parameters for row in rows), sum(row.trainable for row in rows)
    lines.append(f"{'all':<12}{sum(row.tensors for row in rows):>9,}{total:>15,}{trained:>15,}")
    return "\n".join(lines)

"""Which parameters train: by role, and as a table for people."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from ...errors import RecipeError
from ...roles import ROLES, plain_name, role_of


@dataclass(frozen=True)
class TrainableRow:
    """One line of the table of what trains: number of tensors and of parameters of a role, trained and in all."""

    role: str
    tensors: int
    parameters: int
    trainable_tensors: int
    trainable: int


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

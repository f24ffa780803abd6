"""What the tests of recipes in runs/ share."""

from pathlib import Path

import torch

from unimoe import UniMoeForCausalLM

_PARTS = ("tower", "connector", "self_attn", "mlp.gate.", "mlp.experts", "mlp.", "embed_tokens", "norm", "lm_head")


def lines_without_source(recipe: Path) -> list[str]:
    """Lines of a recipe that set a value without a comment on the line, or on one of its own before it, that says whose."""
    lines, found = recipe.read_text(encoding="utf-8").splitlines(), []
    for before, line in zip(["", *lines], lines, strict=False):
        opens = line.strip().endswith(":") or line.strip().startswith("- name:")
        if line and not opens and "#" not in line and not before.strip().startswith("#"):
            found.append(line)
    return found


def changed(before: Path, after: Path) -> set[str]:
    """Parts of the model of which a weight changed."""
    states = [UniMoeForCausalLM.from_pretrained(folder).state_dict() for folder in (before, after)]
    names = [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])]
    return {next(part for part in _PARTS if part in name) for name in names}

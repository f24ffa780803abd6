"""Routing groups as a person gives them: a preset's name, JSON, or a file that holds it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import ConversionError
from .group_presets import GROUP_PRESETS, group_preset


def parse_groups(
    text: str | None, num_experts: int, num_experts_per_tok: int = 1
) -> tuple[dict[str, list[int]] | None, dict[str, str] | None]:
    """`expert_groups` and `modality_groups` of the configuration, from a preset's name, JSON or a file that holds it.

    Raises:
        ConversionError: it is none of these, the preset does not fit the number of experts, or a group lacks its experts
            or modalities.
    """
    if text is None:
        return None, None
    if text in GROUP_PRESETS:
        return group_preset(text, num_experts, num_experts_per_tok)
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            presets = ", ".join(GROUP_PRESETS)
            raise ConversionError(
                f"--groups {text!r} is no preset ({presets}) and neither JSON nor a file to read ({error})."
            ) from error
    try:
        groups = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConversionError(f"--groups is not JSON ({error}).") from error
    if not isinstance(groups, dict) or not groups:
        raise ConversionError('--groups must be an object {"name": {"experts": [...], "modalities": [...]}, ...}.')
    for name, group in groups.items():
        for field, is_item in (("experts", _is_int), ("modalities", _is_text)):
            if not isinstance(group, dict) or not _is_list_of(group.get(field), is_item):
                raise ConversionError(f"--groups: {name!r} needs a list {field!r}.")
    expert_groups = {name: group["experts"] for name, group in groups.items()}
    return expert_groups, {modality: name for name, group in groups.items() for modality in group["modalities"]}


def _is_list_of(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(is_item(item) for item in value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


__all__ = ["parse_groups"]

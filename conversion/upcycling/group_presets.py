"""Routing groups by name: which experts the tokens of which modality may choose from.

    uni-moe    one group of all experts (Uni-MoE, arXiv 2405.11273; "Vanilla MoE" in arXiv 2508.09779)
    modality   vision and language have one expert each and no choice ("Modality MoE" in arXiv 2508.09779)
    separate   vision and language choose from pools of their own, half of the experts each
    moiie      vision and language have a quarter of the experts each, and share the other half (MoIIE, arXiv 2508.09779,
               section 3.2)
    five       image, video, speech, sound and text have a tenth of the experts each, at least one, and share the rest

"Vision" is images and video, "language" all else. This file knows numbers only: it loads nothing of the model.
"""

from ...errors import ConversionError

ExpertGroups = dict[str, list[int]]
ModalityGroups = dict[str, str]

_FAMILIES = {"image": "vision", "video": "vision", "text": "language", "speech": "language", "sound": "language"}
_FIVE = ("image", "video", "speech", "sound", "text")
# Name -> options of `unimoe convert upcycle` that it goes with.
GROUP_PRESETS = {
    "uni-moe": "--experts 4 --top-k 2",
    "modality": "--experts 2 --top-k 1",
    "separate": "--experts 4 --top-k 2",
    "moiie": "--experts 4 --top-k 2",
    "five": "--experts 10 --top-k 2",
}


def group_preset(
    name: str, num_experts: int, num_experts_per_tok: int = 1
) -> tuple[ExpertGroups | None, ModalityGroups | None]:
    """`expert_groups` and `modality_groups` of `UniMoeTextConfig`; both None for one group of all experts.

    Own experts come first in the order of the groups, except that MoIIE's language experts are the last ones, as in the
    original: vision 0, shared 1 and 2, language 3 of four.

    Raises:
        ConversionError: there is no such preset, it cannot be made of so many experts, or its groups have fewer than a
            token shall use.
    """
    expert_groups, modality_groups = _preset(name, num_experts)
    smallest = num_experts if expert_groups is None else min(map(len, expert_groups.values()))
    if num_experts_per_tok > smallest:
        raise ConversionError(
            f"With {num_experts} experts the preset {name!r} lets a token choose from {smallest}, and it shall use "
            f"{num_experts_per_tok}: lower --top-k, or give more --experts. It goes with {GROUP_PRESETS[name]}, for example."
        )
    return expert_groups, modality_groups


def _preset(name: str, num_experts: int) -> tuple[ExpertGroups | None, ModalityGroups | None]:
    if name not in GROUP_PRESETS:
        raise ConversionError(f"There is no preset {name!r} of routing groups; use one of {', '.join(GROUP_PRESETS)}.")
    if name == "uni-moe":
        return None, None
    experts = list(range(num_experts))
    if name == "five":
        own = max(1, num_experts // 10)
        _require(
            num_experts > 5 * own, name, num_experts, "at least 6 experts, one for each modality and one to share"
        )
        shared = experts[5 * own :]
        groups = {group: experts[i * own : (i + 1) * own] + shared for i, group in enumerate(_FIVE)}
        return groups, {modality: modality for modality in _FIVE}
    if name == "modality":
        _require(num_experts == 2, name, num_experts, "exactly 2 experts (the preset 'separate' takes more)")
    elif name == "separate":
        _require(num_experts >= 2 and num_experts % 2 == 0, name, num_experts, "an even number of experts")
    else:
        _require(num_experts >= 4 and num_experts % 4 == 0, name, num_experts, "a multiple of 4 experts")
    # How many experts, counted from either end, each family may use.
    width = num_experts // 4 * 3 if name == "moiie" else num_experts // 2
    return {"vision": experts[:width], "language": experts[-width:]}, dict(_FAMILIES)


def _require(holds: bool, name: str, num_experts: int, needed: str) -> None:
    if not holds:
        raise ConversionError(
            f"The preset {name!r} of routing groups needs {needed}, and there are {num_experts}. It goes with "
            f"{GROUP_PRESETS[name]}, for example."
        )


__all__ = ["GROUP_PRESETS", "group_preset"]

"""Presets of routing groups are what they are called, and every one makes a configuration."""

import pytest
import tiny

from unimoe.conversion.upcycling.group_presets import GROUP_PRESETS, group_preset
from unimoe.errors import ConversionError


def test_moiie_has_a_quarter_each_and_shares_the_middle_half() -> None:
    groups, modalities = group_preset("moiie", 4)
    assert groups == {"vision": [0, 1, 2], "language": [1, 2, 3]}
    assert modalities == {"image": "vision", "video": "vision"} | dict.fromkeys(
        ("text", "speech", "sound"), "language"
    )
    assert group_preset("moiie", 8)[0] == {"vision": [0, 1, 2, 3, 4, 5], "language": [2, 3, 4, 5, 6, 7]}


def test_pools_of_their_own_share_nothing() -> None:
    assert group_preset("modality", 2)[0] == {"vision": [0], "language": [1]}
    assert group_preset("separate", 6)[0] == {"vision": [0, 1, 2], "language": [3, 4, 5]}
    assert group_preset("uni-moe", 4) == (None, None)


@pytest.mark.parametrize(("experts", "own"), [(6, 1), (8, 1), (10, 1), (20, 2)])
def test_five_modalities_have_experts_of_their_own_and_a_shared_pool(experts: int, own: int) -> None:
    groups, _ = group_preset("five", experts)
    assert groups is not None
    shared = set.intersection(*map(set, groups.values()))
    assert len(shared) == experts - 5 * own
    alone = [set(group) - shared for group in groups.values()]
    assert sorted(expert for group in alone for expert in group) == list(range(5 * own))
    assert {len(group) for group in alone} == {own}


@pytest.mark.parametrize("name", GROUP_PRESETS)
def test_every_preset_makes_a_configuration(name: str) -> None:
    experts, per_token = {"modality": (2, 1)}.get(name, (8, 2))
    groups, modalities = group_preset(name, experts)
    config = tiny.text_config(
        num_experts=experts, num_experts_per_tok=per_token, expert_groups=groups, modality_groups=modalities
    )
    assert sum(len(group.modalities) for group in config.router_groups) == 5


@pytest.mark.parametrize(
    ("name", "experts", "needed"),
    [("moiie", 6, "multiple of 4"), ("modality", 4, "exactly 2"), ("separate", 3, "even"), ("five", 5, "at least 6")],
)
def test_impossible_numbers_are_refused(name: str, experts: int, needed: str) -> None:
    with pytest.raises(ConversionError, match=needed):
        group_preset(name, experts)
    with pytest.raises(ConversionError, match="no preset 'six'"):
        group_preset("six", 6)

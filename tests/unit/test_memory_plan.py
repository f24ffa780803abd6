"""The arithmetic of memory per rank, against figures worked out by hand."""

import dataclasses

import pytest

from unimoe.trainers.planning.memory_plan import (
    Count,
    Degrees,
    MemorySettings,
    ParameterSizes,
    activation_bytes,
    memory_per_rank,
)

MODEL = ParameterSizes(
    experts=Count(800, 800),
    split=Count(400, 200),
    whole=Count(100, 40),
    adapted_experts=80,
    largest_layer=60,
    layer_experts=40,
)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        # weights, gradients, optimizer, buffers; 4, 4 and 8 bytes per parameter
        (Degrees(), (4 * 1300, 4 * 1040, 8 * 1040, 0)),
        (Degrees(data=4), (4 * 1300, 4 * 1040, 8 * 1040, 4 * 1040)),
        (Degrees(data=4, zero=1), (4 * 1300, 4 * 1040, 8 * 260, 0)),
        (Degrees(data=4, zero=2), (4 * 1300, 4 * 260, 8 * 260, 0)),
        (Degrees(data=4, zero=3), (4 * 325, 4 * 260, 8 * 260, 2 * 60 * 4)),
        # Two of four processes hold all experts: 400 each, on two replicas.
        (Degrees(data=4, expert=2), (4 * 900, 4 * 640, 8 * 640, 4 * 640)),
        (Degrees(data=4, expert=2, zero=3), (4 * (200 + 125), 4 * (200 + 60), 8 * (200 + 60), 2 * (60 - 20) * 4)),
        # Nobody else holds this rank's experts, so only the 20 others of a layer are gathered.
        (Degrees(data=4, expert=4, zero=3), (4 * (200 + 125), 4 * (200 + 60), 8 * (200 + 60), 2 * 20 * 4)),
        (Degrees(data=2, tensor=2), (4 * (400 + 200 + 100), 4 * (400 + 100 + 40), 8 * (400 + 100 + 40), 4 * 540)),
        (Degrees(data=2, tensor=2, expert=4), (4 * (200 + 200 + 100), 4 * 340, 8 * 340, 4 * 340)),
    ],
)
def test_states_are_split_over_ranks(degrees: Degrees, expected: tuple[int, ...]) -> None:
    plan = memory_per_rank(MODEL, MemorySettings(), degrees)
    assert tuple(plan.bytes_of[kind] for kind in ("weights", "gradients", "optimizer", "buffers")) == expected


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (Degrees(data=4, zero=3), (4 * 30, 4 * 30, 8 * 30, 0)),
        # transformers' sharding leaves adapters whole; their gradients are summed over the ranks at once.
        (Degrees(data=4, zero=3, engine="fsdp"), (4 * 120, 4 * 120, 8 * 120, 4 * 120)),
        (Degrees(data=4, expert=2, zero=3), (4 * 120, 4 * 120, 8 * 120, 4 * 120)),
        (Degrees(data=2, tensor=2, zero=2), (4 * 120, 4 * 120, 8 * 120, 4 * 120)),
    ],
)
def test_adapters_are_split_by_deepspeed_only(degrees: Degrees, expected: tuple[int, ...]) -> None:
    plan = memory_per_rank(ParameterSizes(adapters=Count(120, 120)), MemorySettings(), degrees)
    assert tuple(plan.bytes_of[kind] for kind in ("weights", "gradients", "optimizer", "buffers")) == expected


def test_bfloat16_products_keep_copies_of_the_matrices() -> None:
    half = MemorySettings(compute_bytes=2, layers=4)
    assert memory_per_rank(MODEL, half).bytes_of["copies"] == 80 * 4 + 1200 * 2
    assert memory_per_rank(MODEL, MemorySettings(layers=4)).bytes_of["copies"] == 80 * 4
    one_layer = dataclasses.replace(half, checkpointing=True)
    assert memory_per_rank(MODEL, one_layer).bytes_of["copies"] == (80 * 4 + 1200 * 2) / 4


def test_gradients_and_activations_take_turns_unless_gradients_wait() -> None:
    settings = MemorySettings(tower_activations=10_000)
    plan = memory_per_rank(MODEL, settings)
    sizes = plan.bytes_of
    assert sizes["activations"] == 10_000 > sizes["gradients"]
    assert plan.total == sizes["weights"] + sizes["optimizer"] + sizes["copies"] + 10_000
    waiting = memory_per_rank(MODEL, dataclasses.replace(settings, keeps_gradients=True))
    assert waiting.total == plan.total + sizes["gradients"]


def test_activations_grow_with_tokens_and_shrink_with_checkpointing() -> None:
    shape = MemorySettings(
        layers=10, hidden_size=64, query_size=64, heads=4, ffn_size=128, vocabulary_size=100,
        rows=2, row_length=16, logits_length=4,
    )  # fmt: skip
    once = activation_bytes(shape)
    assert activation_bytes(dataclasses.replace(shape, rows=4)) == 2 * once
    assert activation_bytes(dataclasses.replace(shape, checkpointing=True)) < once / 4
    assert activation_bytes(dataclasses.replace(shape, compute_bytes=2)) < once
    scores = activation_bytes(dataclasses.replace(shape, stores_scores=True)) - once
    assert scores == 2 * 16 * 4 * 16 * (10 * 4 + 8)  # kept in 10 layers, twice in passing in one
    assert activation_bytes(shape, tensor=2) < once

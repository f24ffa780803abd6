"""The released variants at their real sizes, on the meta device: every name of the original has its place in ours."""

import math

import pytest
from released_shapes import (
    CLIP,
    EXPERTS,
    HIDDEN,
    INNER,
    LAYERS,
    ORIGINAL,
    WHISPER,
    decoder,
    projector,
    sound,
    speech,
    vision,
)

from unimoe import UniMoeBeatsConfig
from unimoe.conversion.checkpoints.key_rules import KeyMap
from unimoe.conversion.checkpoints.llava_keys import vision_prefix
from unimoe.conversion.checkpoints.our_folder import expected_tensors
from unimoe.conversion.checkpoints.parameters import count_parameters, total_and_active
from unimoe.conversion.released.unimoe_config import Encoders, our_config
from unimoe.conversion.released.unimoe_keys import rules_for
from unimoe.conversion.released.unimoe_variant import recognise


@pytest.mark.parametrize(
    ("name", "sparse", "total", "active"),
    [
        ("speech", range(LAYERS), 20_254_083_072, 11_597_039_616),
        ("speech_dp", range(0, LAYERS, 2), 13_761_038_336, 9_432_516_608),
        ("audio", range(0, LAYERS, 2), 13_748_686_832, 9_420_165_104),
    ],
)
def test_every_tensor_of_a_released_model_has_its_place(name: str, sparse: range, total: int, active: int) -> None:
    audio = "beats" if name == "audio" else "whisper"
    shapes = {**decoder(sparse), **projector(), **vision(), **(sound() if audio == "beats" else speech())}
    variant = recognise(shapes, ORIGINAL)
    assert variant.name == name
    encoders = Encoders(CLIP, whisper=WHISPER if audio == "whisper" else None, beats=UniMoeBeatsConfig())
    config = our_config(ORIGINAL, variant, encoders, shapes)
    expected = {key: tuple(tensor.shape) for key, tensor in expected_tensors(config).items()}
    mapped = KeyMap(rules_for(audio, vision_prefix(expected))).map(shapes)
    assert not mapped.unexpected
    assert {key: target.shape(shapes) for key, target in mapped.targets.items()} == expected
    placed = sum(len(target.sources) for target in mapped.targets.values())
    assert placed + len(mapped.dropped) == len(shapes)
    count = total_and_active(count_parameters(config))
    assert (count.total, count.active) == (total, active)
    # The same from the original's side: without the copies of BEATs' shared table and the magnitudes of its convolution.
    taken = sum(math.prod(shapes[source]) for target in mapped.targets.values() for source in target.sources)
    assert taken - count.total == (11 * 320 * 12 + 128 if audio == "beats" else 0)
    assert count.total - count.active == len(sparse) * (EXPERTS - 2) * 3 * INNER * HIDDEN

"""Models that tests of invariants share and may not change."""

import pytest
import twins
from twins import Sample

from unimoe import UniMoeForCausalLM


@pytest.fixture(scope="module", params=twins.TWINS)
def twin(request: pytest.FixtureRequest) -> tuple[UniMoeForCausalLM, list[Sample]]:
    """A model and its samples."""
    return twins.build(request.param), twins.samples(request.param)


@pytest.fixture(scope="module")
def full_model() -> UniMoeForCausalLM:
    return twins.build("everything")

"""How a hostile medium must be refused."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from unimoe.processing.media_policy_unimoe import MediaError

QUICK = 0.5  # seconds of this process; a refusal takes milliseconds, the rest is slack for a busy machine


@contextmanager
def refused(reason: str, kind: str = "") -> Iterator[None]:
    """The block must raise a MediaError of this reason, quickly and without taking memory."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MediaError, match=reason) as caught:
        yield
    assert time.process_time() - start < QUICK
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    assert str(caught.value).startswith(kind)
    assert caught.value.__cause__ is None
    assert "0x" not in str(caught.value)

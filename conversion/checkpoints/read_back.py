"""What was written, read again and compared bit by bit with what it was made from."""

from collections.abc import Iterable

import torch

from ...errors import ConversionError
from .checkpoint_reader import Checkpoint
from .checkpoint_writer import OutputTensor

# Values that are read back at once, so that memory holds each piece once.
_BLOCK = 1 << 20


def verify_written(written: Checkpoint, outputs: Iterable[OutputTensor]) -> None:
    """Make every tensor's pieces again and compare them with the files.

    Raises:
        ConversionError: a tensor reads back differently.
    """
    for output in outputs:
        start = 0
        for make in output.pieces:
            for block in make().reshape(-1).split(_BLOCK):
                read = written.read_flat(output.name, start, block.numel())
                # As bytes, so that NaNs are equal to themselves.
                if not torch.equal(read.view(torch.uint8), block.to(output.dtype).contiguous().view(torch.uint8)):
                    raise ConversionError(
                        f"{output.name} reads back differently from what was written: check the disk."
                    )
                start += block.numel()


__all__ = ["verify_written"]

"""accelerate's view of ranks that share a batch, on CPUs as well."""

from typing import Any

from accelerate import ParallelismConfig


class TensorRanks(ParallelismConfig):
    """Like its base, which has such ranks on accelerators only: gloo's collectives do for them what NCCL's do."""

    def _validate_accelerator(self, accelerator: Any) -> None:
        if accelerator.device.type != "cpu":
            super()._validate_accelerator(accelerator)

"""Checkpoints that keep every expert by itself: they load like fused ones, and saving writes fused ones.

A sparse layer's experts are fused tensors (`mlp.experts.gate_up_proj`, `mlp.experts.down_proj`). Other tools keep
`mlp.experts.{e}.gate_proj.weight`, `up_proj` and `down_proj` apart, and so do files for expert parallelism, in which a
rank shall find its own experts and no others.
"""

from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter


class FusedCheckpointMixin:
    """For models with fused experts: saves them so, even those that were loaded one by one."""

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> Any:
        """As in transformers, except that `save_original_format`, which keeps experts apart, is off."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)  # type: ignore[misc]


# transformers runs this file once per configuration class it loads, hence `overwrite`.
register_checkpoint_conversion_mapping(
    "unimoe",
    [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]),
    ],
    overwrite=True,
)

__all__ = ["FusedCheckpointMixin"]

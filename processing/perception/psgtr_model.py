"""PSGTR (OpenPSG) on transformers' DETR: every query answers with a subject, an object, how they relate, and two masks."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DetrConfig, DetrModel
from transformers.models.detr.modeling_detr import (
    DetrMaskHeadSmallConv,
    DetrMHAttentionMap,
    DetrMLPPredictionHead,
    DetrPreTrainedModel,
)
from transformers.utils import ModelOutput

from .psgtr_postprocess import PsgtrHeads


class PsgtrConfig(DetrConfig):
    """A DETR with classes of objects in `id2label` and predicates in `predicates`, both without their "nothing"."""

    model_type = "unimoe_psgtr"

    predicates: list[str] | None = None


@dataclass
class PsgtrOutput(ModelOutput):
    """The fields of `PsgtrHeads`, each with a batch axis in front: classes and boxes [B, Q, ...], masks [B, Q, h, w]."""

    sub_cls: torch.Tensor | None = None
    obj_cls: torch.Tensor | None = None
    rel_cls: torch.Tensor | None = None
    sub_box: torch.Tensor | None = None
    obj_box: torch.Tensor | None = None
    sub_mask: torch.Tensor | None = None
    obj_mask: torch.Tensor | None = None

    def heads(self, i: int) -> PsgtrHeads:
        """Those of one image, in float32 on the CPU."""
        return PsgtrHeads(**{name: self[name][i].float().cpu() for name in PsgtrHeads._fields})


class PsgtrForSceneGraphs(DetrPreTrainedModel):
    """DETR's body with PSGTR's heads, whose names are those of the original."""

    config_class = PsgtrConfig

    def __init__(self, config: PsgtrConfig) -> None:
        super().__init__(config)
        self.model = DetrModel(config)
        width, classes = config.d_model, config.num_labels + 1
        self.sub_cls_embed = nn.Linear(width, classes)
        self.obj_cls_embed = nn.Linear(width, classes)
        self.rel_cls_embed = nn.Linear(width, len(config.predicates or ()) + 1)
        self.sub_box_embed = DetrMLPPredictionHead(width, width, 4, 3)
        self.obj_box_embed = DetrMLPPredictionHead(width, width, 4, 3)
        self.sub_bbox_attention = DetrMHAttentionMap(width, config.encoder_attention_heads)
        self.obj_bbox_attention = DetrMHAttentionMap(width, config.encoder_attention_heads)
        self.sub_mask_head = self._mask_head(config)
        self.obj_mask_head = self._mask_head(config)
        self.post_init()

    def _mask_head(self, config: PsgtrConfig) -> DetrMaskHeadSmallConv:
        channels = self.model.backbone.intermediate_channel_sizes[::-1][-3:]
        attention = config.encoder_attention_heads
        return DetrMaskHeadSmallConv(config.d_model + attention, channels, config.d_model, config.activation_function)

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> PsgtrOutput:
        """Heads of images [B, 3, H, W]; `pixel_mask` [B, H, W] is 1 on the image and 0 on padding."""
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0])
        maps = self.model.backbone(pixel_values, pixel_mask)
        projected = self.model.input_projection(maps[-1][0])
        memory, queries, visible = self._encode_and_decode(projected, maps[-1][1])
        finer = [features for features, _ in maps[2::-1]]
        # Nothing of the padding may draw attention.
        hidden = torch.zeros_like(visible, dtype=memory.dtype)
        hidden = hidden.masked_fill(~visible, torch.finfo(memory.dtype).min)[:, None, None]
        found = {}
        for part in ("sub", "obj"):
            found[f"{part}_cls"] = getattr(self, f"{part}_cls_embed")(queries)
            found[f"{part}_box"] = getattr(self, f"{part}_box_embed")(queries).sigmoid()
            attention = getattr(self, f"{part}_bbox_attention")(queries, memory, attention_mask=hidden)
            masks = getattr(self, f"{part}_mask_head")(projected, attention, finer)
            found[f"{part}_mask"] = masks.view(*queries.shape[:2], *masks.shape[-2:])
        return PsgtrOutput(rel_cls=self.rel_cls_embed(queries), **found)

    def _encode_and_decode(
        self, projected: torch.Tensor, visible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encoder states [B, C, h, w], decoder states [B, Q, C] and the mask [B, h, w] of what is no padding."""
        body = self.model
        positions = body.position_embedding(
            shape=projected.shape, device=projected.device, dtype=projected.dtype, mask=visible
        )
        where = {"spatial_position_embeddings": positions.flatten(2).transpose(1, 2)}
        flat, tokens = visible.flatten(1), projected.flatten(2).transpose(1, 2)
        encoded = body.encoder(inputs_embeds=tokens, attention_mask=flat, **where).last_hidden_state
        slots = body.query_position_embeddings.weight[None].expand(len(projected), -1, -1)
        queries = body.decoder(
            inputs_embeds=torch.zeros_like(slots),
            object_queries_position_embeddings=slots,
            encoder_hidden_states=encoded,
            encoder_attention_mask=flat,
            **where,
        ).last_hidden_state
        return encoded.transpose(1, 2).view_as(projected), queries, visible

"""OpenPSG's checkpoint of PSGTR (psgtr_r50_epoch_60.pth) as a folder of transformers.

Its keys are mmdetection 2's: `backbone.` a ResNet with torchvision's names; `bbox_head.transformer.` layers of `attentions`,
`ffns` and `norms`; `bbox_head.` heads. Sizes are read off the tensors. The layout is known from the public code; whether
the public file holds further keys could not be looked up, so that any that are left over are named and refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ConversionError
from ...processing.perception.class_names import coco_panoptic_names, psg_predicates
from ..checkpoints.finished_folder import finished_folder
from ..checkpoints.pickle_files import load_pickle

if TYPE_CHECKING:
    from ...processing.perception.psgtr_model import PsgtrConfig, PsgtrForSceneGraphs

_HEAD = "bbox_head."
_STAGES = 4
# Our names as patterns and the original's; "{1}" and so on are the groups, "{+1}" the first one plus 1.
_RULES: tuple[tuple[str, str], ...] = (
    (r"backbone\.model\.embedder\.embedder\.convolution", "backbone.conv1"),
    (r"backbone\.model\.embedder\.embedder\.normalization", "backbone.bn1"),
    (r"backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution", "backbone.layer{+1}.{2}.downsample.0"),
    (r"backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization", "backbone.layer{+1}.{2}.downsample.1"),
    (r"backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution", "backbone.layer{+1}.{2}.conv{+3}"),
    (r"backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization", "backbone.layer{+1}.{2}.bn{+3}"),
    (r"input_projection", "bbox_head.input_proj"),
    (r"query_position_embeddings", "bbox_head.query_embed"),
    (r"decoder\.layernorm", "bbox_head.transformer.decoder.post_norm"),
    (r"(encoder|decoder)\.layers\.(\d+)\.self_attn\.o_proj", "bbox_head.transformer.{1}.layers.{2}.attentions.0.attn.out_proj"),
    (r"(encoder|decoder)\.layers\.(\d+)\.encoder_attn\.o_proj", "bbox_head.transformer.{1}.layers.{2}.attentions.1.attn.out_proj"),
    (r"(encoder|decoder)\.layers\.(\d+)\.mlp\.fc1", "bbox_head.transformer.{1}.layers.{2}.ffns.0.layers.0.0"),
    (r"(encoder|decoder)\.layers\.(\d+)\.mlp\.fc2", "bbox_head.transformer.{1}.layers.{2}.ffns.0.layers.1"),
    (r"(encoder|decoder)\.layers\.(\d+)\.self_attn_layer_norm", "bbox_head.transformer.{1}.layers.{2}.norms.0"),
    (r"decoder\.layers\.(\d+)\.encoder_attn_layer_norm", "bbox_head.transformer.decoder.layers.{1}.norms.1"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm", "bbox_head.transformer.encoder.layers.{1}.norms.1"),
    (r"decoder\.layers\.(\d+)\.final_layer_norm", "bbox_head.transformer.decoder.layers.{1}.norms.2"),
)  # fmt: skip
_HEAD_RULES: tuple[tuple[str, str], ...] = (
    (r"((?:sub|obj)_bbox_attention)\.([qk])_proj", "bbox_head.{1}.{2}_linear"),
    (r"((?:sub|obj)_mask_head)\.conv([12])\.conv", "bbox_head.{1}.lay{2}"),
    (r"((?:sub|obj)_mask_head)\.conv([12])\.norm", "bbox_head.{1}.gn{2}"),
    (r"((?:sub|obj)_mask_head)\.fpn_stages\.(\d)\.fpn_adapter", "bbox_head.{1}.adapter{+2}"),
    (r"((?:sub|obj)_mask_head)\.output_conv", "bbox_head.{1}.out_lay"),
    (r"((?:sub|obj|rel)_cls_embed|(?:sub|obj)_box_embed\.layers\.\d)", "bbox_head.{1}"),
)
_REFINING = re.compile(r"((?:sub|obj)_mask_head)\.fpn_stages\.(\d)\.refine\.(conv|norm)")
_PROJECTION = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(self_attn|encoder_attn)\.([qkv])_proj\.(weight|bias)")


def convert_psgtr(checkpoint: str | Path, out: str | Path) -> list[str]:
    """Write a folder that `PsgtrRelator` takes; returns what was done, in lines.

    Raises:
        ConversionError: the file is no plain checkpoint of PSGTR, or holds tensors that have no place.
    """
    from ...processing.perception.psgtr_model import PsgtrForSceneGraphs

    content = load_pickle(Path(checkpoint), mapped=False)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    config = psgtr_config(state)
    model = PsgtrForSceneGraphs(config)
    load_original(model, state)
    with finished_folder(Path(out)) as new:
        model.save_pretrained(new)
    size = sum(parameter.numel() for parameter in model.parameters())
    return [
        f"{len(state):,} tensors of {checkpoint} read, {size:,} parameters written to {out}",
        f"{config.num_labels} classes, {len(config.predicates)} predicates, {config.num_queries} queries",
    ]


def psgtr_config(state: Mapping[str, torch.Tensor]) -> "PsgtrConfig":
    """The configuration that the tensors of a checkpoint show. Raises ConversionError: they are not PSGTR's."""
    from transformers import ResNetConfig

    from ...processing.perception.psgtr_model import PsgtrConfig

    needed = ("query_embed.weight", "sub_cls_embed.weight", "rel_cls_embed.weight", "sub_mask_head.lay1.weight")
    if missing := [name for name in needed if _HEAD + name not in state]:
        raise ConversionError(f"This is no checkpoint of PSGTR: it has no {_HEAD + missing[0]}.")
    queries, width = state[_HEAD + "query_embed.weight"].shape
    classes = state[_HEAD + "sub_cls_embed.weight"].shape[0] - 1
    heads = state[_HEAD + "sub_mask_head.lay1.weight"].shape[0] - width
    stages = [
        [int(m[1]) for key in state if (m := re.fullmatch(rf"backbone\.layer{s}\.(\d+)\.conv3\.weight", key))]
        for s in range(1, _STAGES + 1)
    ]
    if not all(stages):
        raise ConversionError("Only PSGTR with a ResNet of bottleneck blocks (ResNet-50, -101) is known.")
    encoder, decoder = (_layers(state, part) for part in ("encoder", "decoder"))
    feed_forward = state[f"{_HEAD}transformer.encoder.layers.0.ffns.0.layers.0.0.weight"].shape[0]
    backbone = ResNetConfig(  # type: ignore[call-arg]
        embedding_size=state["backbone.conv1.weight"].shape[0],
        hidden_sizes=[state[f"backbone.layer{s}.0.conv3.weight"].shape[0] for s in range(1, _STAGES + 1)],
        depths=[len(blocks) for blocks in stages],
        out_features=[f"stage{s}" for s in range(1, _STAGES + 1)],
    )
    return PsgtrConfig(
        backbone_config=backbone,
        d_model=width,
        num_queries=queries,
        encoder_layers=encoder,
        decoder_layers=decoder,
        encoder_ffn_dim=feed_forward,
        decoder_ffn_dim=feed_forward,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        id2label=dict(enumerate(_names(coco_panoptic_names(), classes, "class"))),
        predicates=_names(psg_predicates(), state[_HEAD + "rel_cls_embed.weight"].shape[0] - 1, "predicate"),
    )


def load_original(model: "PsgtrForSceneGraphs", state: Mapping[str, torch.Tensor]) -> None:
    """Fill a model from a checkpoint's tensors.

    Raises:
        ConversionError: one is missing, of another shape, or has no place.
    """
    taken, ours = set(), {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            ours[name] = tensor
            continue
        key, part = original_name(name)
        if key not in state:
            raise ConversionError(f"The checkpoint has no {key}, which {name} is made of.")
        source = state[key] if part is None else state[key].chunk(3)[part]
        if source.shape != tensor.shape:
            raise ConversionError(
                f"{key} has the shape {tuple(source.shape)} where {name} takes {tuple(tensor.shape)}."
            )
        taken.add(key)
        ours[name] = source
    left = [key for key in state if key not in taken and not key.endswith("num_batches_tracked")]
    if left:
        raise ConversionError(f"The checkpoint holds {len(left)} tensors that have no place: {', '.join(left[:5])}.")
    model.load_state_dict(ours)


def original_name(name: str) -> tuple[str, int | None]:
    """The original's key of a tensor of ours; and which third of it, where query, key and value lie in one."""
    name = name.removeprefix("model.")
    if found := _PROJECTION.fullmatch(name):
        part, layer, kind, projection, tensor = found.groups()
        place = f"{_HEAD}transformer.{part}.layers.{layer}.attentions.{int(kind == 'encoder_attn')}.attn"
        return f"{place}.in_proj_{tensor}", "qkv".index(projection)
    stem, _, tensor = name.rpartition(".")
    if found := _REFINING.fullmatch(stem):
        kind = "lay" if found[3] == "conv" else "gn"
        return f"{_HEAD}{found[1]}.{kind}{int(found[2]) + 3}.{tensor}", None
    for pattern, target in (*_RULES, *_HEAD_RULES):
        if found := re.fullmatch(pattern, stem):
            return f"{_filled(target, found.groups())}.{tensor}", None
    raise ConversionError(f"{name} has no name in OpenPSG's layout.")


def _filled(target: str, groups: tuple[str, ...]) -> str:
    for number, value in enumerate(groups, 1):
        target = target.replace(f"{{{number}}}", value)
        if f"{{+{number}}}" in target:
            target = target.replace(f"{{+{number}}}", str(int(value) + 1))
    return target


def _layers(state: Mapping[str, Any], part: str) -> int:
    found = {key.split(".")[4] for key in state if key.startswith(f"{_HEAD}transformer.{part}.layers.")}
    if not found:
        raise ConversionError(
            f"The checkpoint has no {_HEAD}transformer.{part}.layers: it is not in OpenPSG's layout."
        )
    return len(found)


def _names(known: tuple[str, ...], count: int, kind: str) -> list[str]:
    """The known names where there are as many; numbers where somebody trained others."""
    return list(known) if len(known) == count else [f"{kind} {i}" for i in range(count)]

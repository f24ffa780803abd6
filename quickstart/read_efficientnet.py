"""EfficientNet-Lite checkpoints (PyTorch `.pth`), read without unpickling code, as transformers' `EfficientNetModel`.

Lite is EfficientNet without squeeze-and-excitation, with ReLU6, and with a stem and head of fixed width. transformers
always has the squeeze-and-excitation gate, so it is set to be exactly 1: weights 0 and a bias whose sigmoid rounds to
1.0 in every floating type. The feature maps are then those of the published network to float32 rounding, for images
whose sides are multiples of 32.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PartError
from .vision_folder import load_whole, write_image_processor

if TYPE_CHECKING:
    import torch
    from transformers import EfficientNetConfig

# Lite2 = EfficientNet-B0 with width 1.1 and depth 1.2; the first and last stage keep one block.
_REPEATS = (1, 3, 3, 4, 4, 5, 1)
_IN_CHANNELS = (32, 16, 24, 48, 88, 120, 208)
_OUT_CHANNELS = (16, 24, 48, 88, 120, 208, 352)
_HEAD_CHANNELS = 1280
_OPEN_GATE_BIAS = 30.0
_IMAGE_SIZE = 160
# The published network was trained on (pixel - 127) / 128.
_MEAN, _STD = 127 / 255, 128 / 255


def read_state_dict(path: Path) -> dict[str, "torch.Tensor"]:
    """Tensors of a PyTorch checkpoint, read with `weights_only=True`, which builds tensors and runs nothing.

    Raises PartError for anything that is not a plain dictionary of finite tensors.
    """
    import torch

    from ..conversion.checkpoints.pickle_files import UNPICKLING_ERRORS

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNPICKLING_ERRORS as error:
        raise PartError(f"{path} is not a plain PyTorch state dict ({error}). Fetch it again.") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise PartError(f"{path} holds something other than named tensors, which is refused.")
    for name, tensor in content.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PartError(f"The tensor {name!r} of {path} has values that are not finite; the file is damaged.")
    return content


def efficientnet_lite2_config() -> "EfficientNetConfig":
    """`EfficientNetConfig` of EfficientNet-Lite2, with every width written out."""
    from transformers import EfficientNetConfig

    return EfficientNetConfig(
        image_size=_IMAGE_SIZE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        in_channels=list(_IN_CHANNELS),
        out_channels=list(_OUT_CHANNELS),
        num_block_repeats=list(_REPEATS),
        squeeze_expansion_ratio=0.001,  # one channel per gate: the least that transformers makes
        hidden_act="relu6",
        hidden_dim=_HEAD_CHANNELS,
        batch_norm_eps=1e-3,
        drop_connect_rate=0.0,
        dropout_rate=0.0,
    )


def efficientnet_lite2_state(published: dict[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """State dict of `EfficientNetModel` from the published names. The classifier (`_fc`) is left out."""
    import torch

    state: dict[str, torch.Tensor] = {}

    def put(target: str, source: str, names: tuple[str, ...]) -> None:
        for name in names:
            if f"{source}.{name}" not in published:
                raise PartError(f"The EfficientNet-Lite2 file lacks {source}.{name!r}; it is not the whole network.")
            state[f"{target}.{name}"] = published[f"{source}.{name}"].to(torch.float32)

    def put_pair(target_convolution: str, target_norm: str, convolution: str, norm: str) -> None:
        put(target_convolution, convolution, ("weight",))
        put(target_norm, norm, ("weight", "bias", "running_mean", "running_var"))

    put_pair("embeddings.convolution", "embeddings.batchnorm", "_conv_stem", "_bn0")
    put_pair("encoder.top_conv", "encoder.top_bn", "_conv_head", "_bn1")
    for index in range(sum(_REPEATS)):
        ours, theirs = f"encoder.blocks.{index}", f"_blocks.{index}"
        if index > 0:  # the first block does not expand
            put_pair(
                f"{ours}.expansion.expand_conv",
                f"{ours}.expansion.expand_bn",
                f"{theirs}._expand_conv",
                f"{theirs}._bn0",
            )
        put_pair(
            f"{ours}.depthwise_conv.depthwise_conv",
            f"{ours}.depthwise_conv.depthwise_norm",
            f"{theirs}._depthwise_conv",
            f"{theirs}._bn1",
        )
        put_pair(
            f"{ours}.projection.project_conv",
            f"{ours}.projection.project_bn",
            f"{theirs}._project_conv",
            f"{theirs}._bn2",
        )
        channels = state[f"{ours}.depthwise_conv.depthwise_conv.weight"].shape[0]
        state |= _open_gate(f"{ours}.squeeze_excite", channels)
    return state


def _open_gate(target: str, channels: int) -> dict[str, "torch.Tensor"]:
    import torch

    return {
        f"{target}.reduce.weight": torch.zeros(1, channels, 1, 1),
        f"{target}.reduce.bias": torch.zeros(1),
        f"{target}.expand.weight": torch.zeros(channels, 1, 1, 1),
        f"{target}.expand.bias": torch.full((channels,), _OPEN_GATE_BIAS),
    }


def convert_efficientnet_lite2(unpacked: Path, target: Path) -> None:
    """Write the EfficientNet-Lite2 of the one `.pth` file in `unpacked` to `target` as a Hugging Face folder (float32)."""
    from transformers import EfficientNetModel

    (path,) = unpacked.glob("*.pth")
    state = efficientnet_lite2_state(read_state_dict(path))
    model = EfficientNetModel(efficientnet_lite2_config())
    load_whole(model, state, "EfficientNet-Lite2")
    model.save_pretrained(target)
    # include_top would divide by the standard deviation a second time.
    write_image_processor(target, "EfficientNetImageProcessor", _IMAGE_SIZE, _MEAN, _STD, include_top=False)

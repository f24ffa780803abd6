"""Keras `.h5` weight files, read with h5py alone, and the MobileNetV2 inside one.

Only plain datasets reached through hard links are read. HDF5 can also point at other files (external links, external
storage, virtual datasets), and a downloaded file has no business pointing anywhere: such files are refused. Nothing
of the Keras model description is evaluated.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import PartError
from .vision_folder import load_whole, write_image_processor

if TYPE_CHECKING:
    import torch
    from transformers import MobileNetV2Config

_MAX_DEPTH = 8
_WEIGHTS_BYTES_LIMIT = 1 << 30
_BLOCKS = 16  # inverted residual blocks after the stem, of every MobileNetV2


def read_keras_weights(path: Path, group: str) -> dict[str, np.ndarray]:
    """All float arrays under `group` of the HDF5 file at `path`, as "layer/variable" → array.

    Raises PartError when the file cannot be read, lacks the group, points at other files, or holds more than 1 GiB.
    """
    import h5py

    arrays: dict[str, np.ndarray] = {}
    try:
        with h5py.File(path, "r") as file:
            node = file
            for name in group.split("/"):
                node = _child(node, name, path)
                if not isinstance(node, h5py.Group):
                    raise PartError(f"{group!r} in {path} is not a group; this is another kind of Keras file.")
            _collect(node, "", path, arrays, depth=0)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, PartError):
            raise
        raise PartError(f"{path} cannot be read as a Keras HDF5 file ({error}). Fetch it again.") from error
    return arrays


def _child(group, name: str, path: Path):
    import h5py

    link = group.get(name, getlink=True)
    if link is None:
        raise PartError(f"{path} has no {name!r} in {group.name!r}; this is another kind of Keras file.")
    if not isinstance(link, h5py.HardLink):
        raise PartError(f"{name!r} in {path} is a link to elsewhere ({type(link).__name__}), which is refused.")
    return group[name]


def _collect(group, prefix: str, path: Path, arrays: dict[str, np.ndarray], depth: int) -> None:
    import h5py

    if depth > _MAX_DEPTH:
        raise PartError(f"{path} nests its groups more than {_MAX_DEPTH} deep at {prefix!r}, which is refused.")
    for name in group:
        child = _child(group, name, path)
        if isinstance(child, h5py.Group):
            _collect(child, f"{prefix}{name}/", path, arrays, depth + 1)
            continue
        if not isinstance(child, h5py.Dataset) or child.dtype.kind != "f":
            raise PartError(f"{prefix}{name} in {path} is not an array of floats, which is all that weights are.")
        if child.is_virtual or child.external:
            raise PartError(f"{prefix}{name} in {path} keeps its values in another file, which is refused.")
        # Checked before reading: HDF5 can declare a huge array that takes no room in the file.
        if child.nbytes + sum(array.nbytes for array in arrays.values()) > _WEIGHTS_BYTES_LIMIT:
            raise PartError(f"{path} holds more than {_WEIGHTS_BYTES_LIMIT} bytes of weights, which is refused.")
        arrays[f"{prefix}{name}"] = child[()]


def mobilenet_v2_from_keras(
    arrays: dict[str, np.ndarray], image_size: int
) -> tuple["MobileNetV2Config", dict[str, "torch.Tensor"]]:
    """Configuration and float32 state dict of `MobileNetV2Model` (width 1.0) from Keras' MobileNetV2 arrays.

    Keras pads as TensorFlow does, hence `tf_padding`; its batch norms use epsilon 1e-3.
    """
    from transformers import MobileNetV2Config

    config = MobileNetV2Config(image_size=image_size, tf_padding=True, layer_norm_eps=1e-3, hidden_act="relu6")
    layers = [
        ("conv_stem.first_conv", "Conv1", "bn_Conv1"),
        ("conv_stem.conv_3x3", "expanded_conv_depthwise", "expanded_conv_depthwise_BN"),
        ("conv_stem.reduce_1x1", "expanded_conv_project", "expanded_conv_project_BN"),
        ("conv_1x1", "Conv_1", "Conv_1_bn"),
    ]
    for index in range(_BLOCKS):
        block = f"block_{index + 1}"
        for ours, theirs in (("expand_1x1", "expand"), ("conv_3x3", "depthwise"), ("reduce_1x1", "project")):
            layers.append((f"layer.{index}.{ours}", f"{block}_{theirs}", f"{block}_{theirs}_BN"))
    state: dict[str, torch.Tensor] = {}
    for target, convolution, norm in layers:
        state[f"{target}.convolution.weight"] = _convolution_weight(arrays, convolution)
        for ours, theirs in (
            ("weight", "gamma"),
            ("bias", "beta"),
            ("running_mean", "moving_mean"),
            ("running_var", "moving_variance"),
        ):
            state[f"{target}.normalization.{ours}"] = _tensor(arrays, f"{norm}/{theirs}")
    return config, state


def _convolution_weight(arrays: dict[str, np.ndarray], layer: str) -> "torch.Tensor":
    """Keras kernels are [height, width, in, out] (depthwise: [height, width, channels, 1]); ours are [out, in, h, w]."""
    if not layer.endswith("_depthwise"):
        return _tensor(arrays, f"{layer}/kernel", 4).permute(3, 2, 0, 1).contiguous()
    # Keras 2 calls the variable depthwise_kernel, Keras 3 kernel.
    name = f"{layer}/depthwise_kernel" if f"{layer}/depthwise_kernel" in arrays else f"{layer}/kernel"
    return _tensor(arrays, name, 4).permute(2, 3, 0, 1).contiguous()


def _tensor(arrays: dict[str, np.ndarray], name: str, rank: int = 1) -> "torch.Tensor":
    import torch

    if name not in arrays:
        raise PartError(f"The Keras file lacks {name!r}; it does not hold a whole MobileNetV2.")
    array = arrays[name]
    if array.ndim != rank or not np.isfinite(array).all():
        raise PartError(f"{name!r} of the Keras file has shape {array.shape} or values that are not finite.")
    return torch.from_numpy(array.astype(np.float32))


def convert_mobilenet_v2(unpacked: Path, target: Path) -> None:
    """Write the MobileNetV2 of the one `.h5` file in `unpacked` to `target` as a Hugging Face folder (float32)."""
    from transformers import MobileNetV2Model

    image_size = 160
    (path,) = unpacked.glob("*.h5")
    arrays = read_keras_weights(path, "model_weights/mobilenetv2_1.00_160")
    config, state = mobilenet_v2_from_keras(arrays, image_size)
    model = MobileNetV2Model(config)
    load_whole(model, state, "MobileNetV2 of width 1.0")
    model.save_pretrained(target)
    write_image_processor(target, "MobileNetV2ImageProcessor", image_size, mean=0.5, std=0.5)

"""Keras' files: tiny files written here must come back bit for bit, damaged ones must be refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from keras_mobilenet import keras_forward
from transformers import MobileNetV2Model

from unimoe.errors import PartError
from unimoe.quickstart.read_keras import convert_mobilenet_v2, mobilenet_v2_from_keras, read_keras_weights

h5py = pytest.importorskip("h5py", reason="h5py comes with the quickstart extra")


def _mobilenet_arrays() -> dict[str, np.ndarray]:
    """Random MobileNetV2 weights under Keras' names and in Keras' layout [height, width, in, out]."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}

    def layer(name: str, norm: str, shape: tuple[int, ...], channels: int) -> None:
        fan_in = np.prod(shape[:2]) * (1 if "depthwise" in name else shape[2])
        arrays[f"{name}/kernel"] = (rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)
        for variable, low, high in (("gamma", 0.5, 1.5), ("beta", -0.5, 0.5), ("moving_mean", -0.5, 0.5)):
            arrays[f"{norm}/{variable}"] = rng.uniform(low, high, channels).astype(np.float32)
        arrays[f"{norm}/moving_variance"] = rng.uniform(0.5, 1.5, channels).astype(np.float32)

    layer("Conv1", "bn_Conv1", (3, 3, 3, 32), 32)
    layer("expanded_conv_depthwise", "expanded_conv_depthwise_BN", (3, 3, 32, 1), 32)
    layer("expanded_conv_project", "expanded_conv_project_BN", (1, 1, 32, 16), 16)
    widths = [16] + [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3 + [320]
    for index in range(1, 17):
        narrow, wide, out = widths[index - 1], 6 * widths[index - 1], widths[index]
        layer(f"block_{index}_expand", f"block_{index}_expand_BN", (1, 1, narrow, wide), wide)
        layer(f"block_{index}_depthwise", f"block_{index}_depthwise_BN", (3, 3, wide, 1), wide)
        layer(f"block_{index}_project", f"block_{index}_project_BN", (1, 1, wide, out), out)
    layer("Conv_1", "Conv_1_bn", (1, 1, 320, 1280), 1280)
    return arrays


def _write_h5(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[f"model_weights/mobilenetv2_1.00_160/{name}"] = array


def test_keras_arrays_come_back_bit_for_bit(tmp_path: Path) -> None:
    arrays = {"conv/kernel": np.random.default_rng(1).random((3, 3, 2, 4)).astype(np.float32)}
    arrays["conv_bn/beta"] = np.arange(4, dtype=np.float32)
    _write_h5(tmp_path / "w.h5", arrays)
    read = read_keras_weights(tmp_path / "w.h5", "model_weights/mobilenetv2_1.00_160")
    assert read.keys() == arrays.keys()
    assert all(np.array_equal(read[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("size", [128, 160])
def test_mobilenet_computes_what_keras_computes(tmp_path: Path, size: int) -> None:
    arrays = _mobilenet_arrays()
    _write_h5(tmp_path / "w.h5", arrays)
    target = tmp_path / "target"
    target.mkdir()
    convert_mobilenet_v2(tmp_path, target)
    model, info = MobileNetV2Model.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        ours = model.eval()(x).last_hidden_state
    difference = (ours - keras_forward(arrays, x)).abs().max().item()
    print(f"MobileNetV2 at {size} px, random weights: max |difference| {difference:.1e}")
    assert ours.std() > 0.1
    assert difference < 1e-5


def test_incomplete_mobilenet_is_refused() -> None:
    arrays = _mobilenet_arrays()
    del arrays["block_7_project/kernel"]
    with pytest.raises(PartError, match="block_7_project/kernel"):
        mobilenet_v2_from_keras(arrays, 160)


def test_keras_garbage_and_truncation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.h5"
    _write_h5(path, {"a/b": np.ones(1000, np.float32)})
    whole = path.read_bytes()
    for content in (b"", b"no HDF5 at all", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(PartError, match="cannot be read as a Keras HDF5 file"):
            read_keras_weights(path, "model_weights")
    path.write_bytes(whole)
    with pytest.raises(PartError, match="has no 'other'"):
        read_keras_weights(path, "other")


def test_keras_file_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.h5"
    _write_h5(secret, {"a/b": np.ones(3, np.float32)})
    (tmp_path / "raw.bin").write_bytes(bytes(12))

    def external_link(group) -> None:
        group["x"] = h5py.ExternalLink(str(secret), "/model_weights")

    def soft_link(group) -> None:
        group["x"] = h5py.SoftLink("/model_weights")

    def external_storage(group) -> None:
        group.create_dataset("x", shape=(3,), dtype="f4", external=[(str(tmp_path / "raw.bin"), 0, 12)])

    def virtual(group) -> None:
        layout = h5py.VirtualLayout(shape=(3,), dtype="f4")
        layout[:] = h5py.VirtualSource(str(secret), "model_weights/mobilenetv2_1.00_160/a/b", shape=(3,))
        group.create_virtual_dataset("x", layout)

    def endless(group) -> None:
        group["x"] = group

    def huge(group) -> None:
        group.create_dataset("x", shape=(2**40,), dtype="f4", chunks=(1024,))

    def pickled(group) -> None:
        group["x"] = np.array([b"cos\nsystem"], dtype="S16")

    for name, write in {
        "is a link to elsewhere": external_link,
        "is a link to else": soft_link,
        "in another file": external_storage,
        "in another": virtual,
        "nests its groups": endless,
        "holds more than": huge,
        "not an array of floats": pickled,
    }.items():
        path = tmp_path / f"{write.__name__}.h5"
        with h5py.File(path, "w") as file:
            write(file.create_group("model_weights"))
        with pytest.raises(PartError, match=name):
            read_keras_weights(path, "model_weights")

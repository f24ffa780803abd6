"""Tiny models in the folders of released Uni-MoE checkpoints, base and fine-tuned."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file

from unimoe import UniMoeForCausalLM
from unimoe.conversion.released.export_unimoe import BEATS_FILE, export_unimoe
from unimoe.conversion.released.import_unimoe import UniMoeFolders
from unimoe.conversion.released.unimoe_keys import AudioKind

RANK, ALPHA = 2, 4
_PEFT = "base_model.model."


@dataclass(frozen=True)
class Released:
    """`model` is what `folders.base` holds, `ours` the folder that it was exported from."""

    model: UniMoeForCausalLM
    ours: Path
    folders: UniMoeFolders


def released(root: Path, audio: AudioKind = "whisper", finetuned: bool = True, **options: Any) -> Released:
    """Export a tiny model, and write a fine-tuned folder over it.

    Args:
        options: `text` and `dtype` of the model, `max_shard_bytes` of the export, other fields of `UniMoeConfig`.
    """
    dtype, shard = options.pop("dtype", torch.float32), options.pop("max_shard_bytes", 1 << 30)
    text = {"router_aux_loss_coef": 0.0, "max_position_embeddings": 256, **options.pop("text", {})}
    absent = ("audio_config", "sound_connector") if audio == "whisper" else ("speech_config", "speech_connector")
    fields = {"video_num_frames": 8, **dict.fromkeys(absent), **options}
    model = tiny.model(text, **fields).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("query_tokens"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(root / "ours")
    export_unimoe(root / "ours", root / "released", max_shard_bytes=shard)
    folder = root / "released"
    if finetuned:
        write_finetuned(folder / "e2", folder / "base")
    speaks = audio == "whisper"
    folders = UniMoeFolders(
        base=folder / "base",
        clip=folder / "clip",
        finetuned=folder / "e2" if finetuned else None,
        whisper=folder / "whisper" if speaks else None,
        beats=None if speaks else folder / BEATS_FILE,
        qformer_config=None if speaks else folder / "qformer_config.json",
    )
    return Released(model, root / "ours", folders)


def base_weights(base: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the base's shards."""
    weights: dict[str, torch.Tensor] = {}
    for file in base.glob("pytorch_model*.bin"):
        weights |= torch.load(file, weights_only=True)
    return weights


def write_finetuned(folder: Path, base: Path, seed: int = 1) -> None:
    """The files that fine-tuning leaves: LoRA on every linear layer of the decoder, the router included."""
    generator = torch.Generator().manual_seed(seed)
    weights = base_weights(base)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def changed(prefix: str) -> dict[str, torch.Tensor]:
        return {n: t + 0.1 * noise(*t.shape).to(t.dtype) for n, t in weights.items() if n.startswith(prefix)}

    adapter, gates = {}, {}
    for name, tensor in weights.items():
        if not name.startswith("model.layers.") or tensor.dim() != 2:
            continue
        module = name.removesuffix(".weight")
        adapter[f"{_PEFT}{module}.lora_A.weight"] = noise(RANK, tensor.shape[1])
        adapter[f"{_PEFT}{module}.lora_B.weight"] = noise(tensor.shape[0], RANK)
        if module.endswith(".gate"):
            gates[name] = tensor + 0.1 * noise(*tensor.shape)
            gates[f"{module}.lora_A.default.weight"] = adapter[f"{_PEFT}{module}.lora_A.weight"]
            gates[f"{module}.lora_B.default.weight"] = adapter[f"{_PEFT}{module}.lora_B.weight"]
    folder.mkdir()
    torch.save(adapter, folder / "adapter_model.bin")
    torch.save(gates, folder / "mlp_gates.bin")
    projector = {f"{_PEFT}{name}": tensor for name, tensor in changed("model.mm_projector.").items()}
    torch.save(projector, folder / "non_lora_trainables.bin")
    torch.save(changed("model.mm_audio_aligner.") | changed("model.query_tokens"), folder / "mm_audio_aligner.bin")
    modules = sorted({name.removeprefix(_PEFT).partition(".lora_")[0] for name in adapter})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "fan_in_fan_out": False}
    config["target_modules"] = modules
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text((base / "config.json").read_text())


def copied(folders: UniMoeFolders, to: Path) -> UniMoeFolders:
    """The released folders copied into `to / "released"`, to be damaged there."""
    shutil.copytree(folders.base.parent, to / "released")
    given = dataclasses.asdict(folders).items()
    return UniMoeFolders(**{name: to / "released" / path.name for name, path in given if path is not None})


def arguments(folders: UniMoeFolders, out: Path) -> list[str]:
    """The command line that converts these folders."""
    options = {name.replace("_", "-"): value for name, value in dataclasses.asdict(folders).items()}
    flags = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    return ["convert", "unimoe", *flags, "--out", str(out)]


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two model folders hold the same weights, to the last bit."""
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )

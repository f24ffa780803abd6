"""What is inside a model folder, read from its configuration and the headers of its weights."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..conversion.checkpoints.bitsandbytes_tensors import held_by_torchao
from ..conversion.checkpoints.checkpoint_reader import Checkpoint
from ..conversion.checkpoints.our_folder import expected_tensors, read_our_config
from ..conversion.checkpoints.parameters import ParameterCount, count_parameters, total_and_active
from ..conversion.checkpoints.router_load import RouterLoad, recorded_load
from ..conversion.publishing.model_card import modalities_of
from ..conversion.publishing.saved_receipt import saved_summary
from ..model_folder import resolve_folder
from ..modeling_unimoe.configuration_unimoe import UniMoeConfig


@dataclass(frozen=True)
class Weights:
    """The stored tensors. `problems` says where they do not fit the configuration."""

    files: int
    num_bytes: int
    dtypes: dict[str, int]
    problems: list[str]


@dataclass(frozen=True)
class ModelDescription:
    """What `unimoe inspect` shows. `towers` and `connectors` map a branch to a line about it; `receipt` are the lines of the
    conversion that made the model; `quantized_by` names the library that holds its weights in fewer bits.
    """

    name: str
    modalities: list[str]
    towers: dict[str, str]
    connectors: dict[str, str]
    num_layers: int
    sparse_layers: list[int]
    num_experts: int
    num_experts_per_tok: int
    num_null_experts: int
    num_shared_experts: int
    max_choices_per_token: int
    groups: dict[str, dict[str, list]]
    routing: dict[str, Any]
    parameters: dict[str, ParameterCount]
    total: ParameterCount
    weights: Weights | None
    router_load: RouterLoad | None
    receipt: list[str] | None = None
    quantized_by: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe_model(name: str) -> ModelDescription:
    """Describe a folder, or a model on the Hub; no weights are read.

    Raises:
        ConversionError: there is no model of ours, or its files are damaged.
    """
    folder = resolve_folder(name, ("*.json", "*.safetensors"))
    config = read_our_config(folder)
    text = config.text_config
    parameters = count_parameters(config)
    return ModelDescription(
        name=name,
        modalities=modalities_of(config),
        towers=_towers(config),
        connectors=_connectors(config),
        num_layers=text.num_hidden_layers,
        sparse_layers=sorted(text.sparse_layers),
        num_experts=text.num_experts,
        num_experts_per_tok=text.num_experts_per_tok,
        num_null_experts=text.num_null_experts,
        num_shared_experts=text.num_shared_experts,
        max_choices_per_token=text.max_choices_per_token,
        groups={g.name: {"experts": list(g.experts), "modalities": list(g.modalities)} for g in text.router_groups},
        routing=_routing(config),
        parameters=parameters,
        total=total_and_active(parameters),
        weights=_weights(folder, config),
        router_load=recorded_load(folder, text.num_experts),
        receipt=saved_summary(folder),
        quantized_by=(getattr(config, "quantization_config", None) or {}).get("quant_method"),
    )


def _routing(config: UniMoeConfig) -> dict[str, Any]:
    """The fields that matter for this type of router."""
    text = config.text_config
    routing: dict[str, Any] = {"type": text.router_type}
    if text.router_type == "dynamic":
        routing |= {"top_p": text.router_top_p, "near_max_band": text.router_near_max_band, "pick": text.router_pick}
        if text.expert_capacity_factor is not None:
            routing |= {
                "expert_capacity_factor": text.expert_capacity_factor,
                "min_expert_capacity": text.min_expert_capacity,
                "capacity_policy": text.capacity_policy,
            }
    else:
        routing |= {"scoring": text.router_scoring, "norm_topk_prob": text.norm_topk_prob, "pick": text.router_pick}
    for coefficient in ("router_modality_loss_coef", "router_divergence_loss_coef"):
        if getattr(text, coefficient):
            routing[coefficient] = getattr(text, coefficient)
    routing |= {
        "router_jitter_noise": text.router_jitter_noise,
        "router_aux_loss_coef": text.router_aux_loss_coef,
        "router_z_loss_coef": text.router_z_loss_coef,
    }
    if text.router_group_aux_loss_coefs:
        coefs = zip(text.router_groups, text.aux_loss_coefs, strict=True)
        routing["router_aux_loss_coef"] = {group.name: coef for group, coef in coefs}
    # What differs from the plain router is told, the rest goes without saying.
    unusual = {
        "router_jitter_reaches_experts": False,
        "router_aux_loss_layers": "each",
        "router_bias_update_rate": 0,
        "router_losses_as_released": False,
    }
    routing |= {field: getattr(text, field) for field, usual in unusual.items() if getattr(text, field) != usual}
    return routing | ({"route_run_end_as_text": True} if config.route_run_end_as_text else {})


def _towers(config: UniMoeConfig) -> dict[str, str]:
    towers = {"vision": config.vision_config, "speech": config.speech_config, "sound": config.audio_config}
    lines = {}
    for name, tower in towers.items():
        if tower is not None:
            width = getattr(tower, "hidden_size", None) or getattr(tower, "d_model", None)
            facts = [tower.model_type, width and f"width {width}", "frozen" if config.freeze_towers else "trained"]
            lines[name] = ", ".join(fact for fact in facts if fact)
    return lines


def _connectors(config: UniMoeConfig) -> dict[str, str]:
    lines = {name: _connector(connector) for name, connector in config.connectors.items() if connector is not None}
    if "video" in lines and config.video_connector is None:
        lines["video"] = "the image connector"
    return lines


def _connector(connector: Any) -> str:
    """A line about a `UniMoeConnectorConfig`."""
    kind = f"mlp of {connector.depth} layers" if connector.type == "mlp" else connector.type.replace("_", " ")
    tokens = "one token per position" if connector.num_tokens is None else f"{connector.num_tokens} tokens"
    return f"{kind}, {connector.input_size} -> {connector.output_size}, {tokens}"


def _weights(folder: Path, config: UniMoeConfig) -> Weights | None:
    if not any(folder.glob("*.safetensors")):
        return None
    checkpoint = Checkpoint(folder)
    dtypes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + math.prod(info.shape)
    expected = {key: tuple(tensor.shape) for key, tensor in expected_tensors(config).items()}
    missing = sorted(set(expected) - set(checkpoint.tensors) - held_by_torchao(checkpoint.tensors))
    differing = sorted(key for key, info in checkpoint.tensors.items() if expected.get(key, info.shape) != info.shape)
    problems = [f"{key} is missing" for key in missing] + [f"{key} has another shape" for key in differing]
    return Weights(len(checkpoint.files), sum(f.stat().st_size for f in checkpoint.files), dtypes, problems)

"""Our models of golden Uni-MoE cases, and the original's batches as ours."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from decoder_inputs import zero_beyond
from golden import GoldenCase
from transformers import CLIPVisionConfig, GenerationConfig, WhisperConfig

from unimoe import UniMoeBeatsConfig, UniMoeForCausalLM
from unimoe.conversion.checkpoints.key_rules import KeyMap, Place, take
from unimoe.conversion.checkpoints.llava_keys import PROJECTOR, VISION_TOWER, vision_prefix
from unimoe.conversion.checkpoints.our_folder import expected_tensors
from unimoe.conversion.released.unimoe_config import Encoders, our_config
from unimoe.conversion.released.unimoe_experts import pairs_in
from unimoe.conversion.released.unimoe_keys import ALIGNER, AUDIO_TOWER, AudioKind, rules_for
from unimoe.conversion.released.unimoe_lora import add_low_rank
from unimoe.conversion.released.unimoe_variant import recognise
from unimoe.processing.placeholders_unimoe import Run, expand, pad

IMAGE, AUDIO, VIDEO = -200, -300, -400
KINDS = {IMAGE: "image", VIDEO: "video", AUDIO: "audio"}
_ENCODER_PREFIXES = (VISION_TOWER, AUDIO_TOWER, ALIGNER, PROJECTOR, "model.query_tokens")


def audio_kind(case: GoldenCase) -> AudioKind:
    return "beats" if case.names(f"{ALIGNER}qformer.*", "weights") else "whisper"


def encoder_weights(case: GoldenCase, prefix: str) -> dict[str, torch.Tensor]:
    """The weights of one tower or connector of ours, named without `prefix`; "model.vision_tower." may be nested."""
    originals = {name: value for name, value in case.weights.items() if name.startswith(_ENCODER_PREFIXES)}
    converted = KeyMap(rules_for(audio_kind(case), "model.vision_tower.")).convert(originals)
    return {name[len(prefix) :]: value for name, value in converted.items() if name.startswith(prefix)}


def encoders_of(case: GoldenCase) -> Encoders:
    config = case.config
    speaks = audio_kind(case) == "whisper"
    return Encoders(
        vision=CLIPVisionConfig(**config["_clip_vision_config"]),
        whisper=WhisperConfig(**config["_whisper_config"]) if speaks else None,
        beats=None if speaks else UniMoeBeatsConfig.from_original(config["_beats_cfg"]),
        qformer=config.get("_qformer_config"),
    )


def unimoe_model(case: GoldenCase, experts: str | None = None, **text: Any) -> tuple[UniMoeForCausalLM, KeyMap]:
    """Our model with the golden weights in float32, fresh, and the map that its weights came through.

    Args:
        experts: which implementation of the experts.
        text: fields of the decoder's configuration to change.
    """
    config, state, key_map = _converted(case.path)
    fields = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    model = UniMoeForCausalLM(type(config)(**{**fields, "text_config": {**fields["text_config"], **text}}))
    model.load_state_dict(state)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model.eval(), key_map


@lru_cache(maxsize=4)
def _converted(path: Path) -> tuple[Any, dict[str, torch.Tensor], KeyMap]:
    case = GoldenCase(path, ledger=None)
    shapes = {name: tuple(tensor.shape) for name, tensor in case.weights.items()}
    variant = recognise(shapes, case.config)
    config = our_config(case.config, variant, encoders_of(case), shapes)
    key_map = KeyMap(rules_for(variant.audio, vision_prefix(expected_tensors(config)), variant.layout))
    weights = merge_pairs(case.weights, case.config) if variant.layout == "deepspeed" else case.weights
    return config, key_map.convert(weights), key_map


def merge_pairs(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The original's tensors with every low-rank pair inside an MLP merged into its weight in float32."""
    merged = dict(tensors)
    for weight in pairs_in(tensors):
        a, b = (merged.pop(f"{weight}_lora_{factor}.weight") for factor in "AB")
        name = f"{weight}.weight"
        merged[name] = add_low_rank(tensors[name], a, b, config["lora_alpha"] / config["lora_r"])
    return merged


@dataclass
class Batch:
    """An original batch as inputs of ours.

    Args:
        inputs: for `UniMoeForCausalLM.forward`.
        labels: [B, S].
        lengths: per row, up to where the original fills with embeddings of its padding token; beyond are zero vectors.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    lengths: list[int] = field(default_factory=list)


def original_batch(
    case: GoldenCase, model: UniMoeForCausalLM, prefix: str = "batch.", rows: list[int] | None = None, cut: int = 0
) -> Batch:
    """Rows of the case's batch; `cut` keeps only the first so many ids of every row (0: all of them)."""
    ids = case.input(f"{prefix}input_ids")
    rows = list(range(len(ids))) if rows is None else rows
    ids = ids[:, : cut or ids.shape[1]]
    # The original's collator calls padding what has its id; checkpoint cases have none.
    mask = case.input(f"{prefix}attention_mask") if case.has(f"{prefix}attention_mask") else None
    mask = mask[:, : ids.shape[1]] if mask is not None else ids != 0 if prefix else None
    labels = case.input(f"{prefix}labels") if case.has(f"{prefix}labels") else torch.full_like(ids, -100)
    samples: list[dict[str, list[int]]] = []
    media: dict[str, list[torch.Tensor]] = {}
    lengths = []
    for row in rows:
        runs = _runs(case, model, prefix, row, ids[row].tolist(), media)
        kept = int(mask[row].sum()) if mask is not None else ids.shape[1]
        learned = [label != -100 for label in labels[row].tolist()]
        sample = expand(ids[row].tolist()[:kept], learned[:kept], KINDS, runs, f"row {row}")
        answers = sample.pop("assistant_masks")
        # The labels that are stored, which need not be the ids: only their places are ours.
        stored = (
            label
            for token, label in zip(ids[row].tolist()[:kept], labels[row].tolist(), strict=False)
            if label != -100 and token not in KINDS
        )
        sample["labels"] = [next(stored) if answer else -100 for answer in answers]
        samples.append(sample)
        lengths.append(len(sample["input_ids"]) + ids.shape[1] - kept)
    batch = {name: torch.tensor(values) for name, values in pad(samples, 0, "right", None, max(lengths)).items()}
    batch.pop("mm_token_type_ids")
    inputs = batch | {name: torch.cat(values) for name, values in media.items()}
    return Batch(inputs, inputs.pop("labels"), lengths)


def _runs(
    case: GoldenCase,
    model: UniMoeForCausalLM,
    prefix: str,
    row: int,
    ids: list[int],
    media: dict[str, list[torch.Tensor]],
) -> dict[str, list[list[Run]]]:
    """What every placeholder of a row becomes; the row's media are added to `media`."""
    config = model.config
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    patches += config.vision_feature_select_strategy == "full"
    runs: dict[str, list[list[Run]]] = {kind: [] for kind in KINDS.values()}
    for kind, token, placeholder in (
        ("image", config.image_token_id, IMAGE),
        ("video", config.video_token_id, VIDEO),
    ):
        if placeholder in ids and bool(case.input(f"{prefix}{kind}_mask")[row]):
            name = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
            media.setdefault(name, []).append(of_row(case.input(f"{prefix}{kind}s"), row, kind))
            count = len(media[name][-1])
            runs[kind].append([(token, count * patches, list(KINDS.values()).index(kind) + 1)])
    for windows, features in _clips(case, prefix, row, ids.count(AUDIO)):
        for name, value in features.items():
            media.setdefault(name, []).append(value)
        speaks = config.speech_connector is not None
        connector = config.speech_connector if speaks else config.sound_connector
        token = config.audio_token_id if speaks else config.sound_token_id
        runs["audio"].append([(token, windows * connector.num_tokens, 3 if speaks else 4)])
    return runs


def of_row(stored: torch.Tensor, row: int, kind: str) -> torch.Tensor:
    """A row's images or video, with a dimension that counts them; all of a row's images stand for one placeholder."""
    several = kind == "image" and stored.dim() == 5
    return stored[row] if several else stored[row : row + 1]


def _clips(
    case: GoldenCase, prefix: str, row: int, placeholders: int
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Windows and features of a row's clips, as many as it has placeholders; equal marks belong to one clip."""
    if not placeholders:
        return
    marks, features = case.input(f"{prefix}features_mask")[row], case.input(f"{prefix}input_features")[row]
    for clip in range(1, placeholders + 1):
        own = marks == clip
        if audio_kind_of_features(features) == "whisper":
            yield int(own.sum()), {"speech_features": features[own]}
        else:
            padding = case.input(f"{prefix}padding_masks")[row][own].flatten(0, 1)
            yield int(own.sum()), {"audio_features": features[own].flatten(0, 1), "audio_padding_mask": padding}


def audio_kind_of_features(features: torch.Tensor) -> AudioKind:
    """Log-mel windows are [P, mels, frames], filter banks [P, 1, frames, mels]."""
    return "whisper" if features.dim() == 3 else "beats"


def greedy(
    model: UniMoeForCausalLM, inputs: dict[str, torch.Tensor], new_tokens: int, use_cache: bool
) -> torch.Tensor:
    """The next `new_tokens` ids [B, new_tokens]; nothing stops generation."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, use_cache=use_cache, pad_token_id=0, bos_token_id=1
    )
    return model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def check_text(case: GoldenCase, **options: Any) -> None:
    model, _ = unimoe_model(case)
    case.check("text.logits", model(input_ids=case.input("text.input_ids")).logits, **options)


@torch.no_grad()
def check_greedy(case: GoldenCase) -> None:
    for name in case.names("gen.*.output_ids*"):
        run, _, suffix = name.rpartition(".")
        if not case.has(f"{run}.input_ids") and not case.has("batch.labels"):
            continue  # nothing says where the prompt ends
        row, length = prompt_of(case, run)
        expected = case.input(name)
        for use_cache in (True,) if suffix.endswith("_use_cache") else (False, True):
            model, _ = unimoe_model(case)
            batch = original_batch(case, model, rows=[row], cut=length)
            case.check(name, greedy(model, batch.inputs, expected.shape[1], use_cache))


@torch.no_grad()
def check_whole_model(
    case: GoldenCase,
    name: str,
    model: UniMoeForCausalLM,
    check_router: Callable[[str, dict[str, Any]], None],
    **after_blocks: Any,
) -> None:
    """Run the case's batch and compare what went into the decoder, every layer, logits and loss.

    Args:
        name: what the golden tensors of this run begin with.
        check_router: compares what the gate of a layer saw and decided: (the layer's name, its record).
        after_blocks: how to compare what comes after a whole block, see `GoldenCase.check`.
    """
    batch = original_batch(case, model)
    decoder = model.model.language_model
    embeddings = zero_beyond(model, batch.lengths)
    blocks = {i: (record(decoder.layers[i].mlp.gate), record(decoder.layers[i].mlp)) for i in sparse_layers(model)}
    outer = [record(layer) for layer in decoder.layers]
    labels = batch.labels if case.has("batch.labels") else None
    output = model(**batch.inputs, labels=labels, output_router_logits=True)

    case.check_if_present("merged.inputs_embeds", embeddings[0])
    case.check_if_present("merged.attention_mask", batch.inputs["attention_mask"].bool())
    if labels is not None:
        case.check_if_present("merged.labels", labels)
    for (layer, (router, block)), logits in zip(blocks.items(), output.router_logits, strict=True):
        check_router(f"{name}.layer{layer}", router)
        case.check_if_present(f"{name}.layer{layer}.router_logits", logits)
        case.check_if_present(f"{name}.layer{layer}.moe_in", block["input"], **after_blocks)
        case.check_if_present(f"{name}.layer{layer}.moe_out", block["output"], **after_blocks)
    for layer, states in enumerate(outer):
        case.check_if_present(f"{name}.layer{layer}.hidden_out", states["output"], **after_blocks)
    case.check_if_present(f"{name}.logits", output.logits, **after_blocks)
    if labels is not None:
        case.check_if_present(f"{name}.loss", output.loss)


def batch_gradients(case: GoldenCase, model: UniMoeForCausalLM) -> Callable[[Place], torch.Tensor]:
    """The gradients of the case's batch: a function that gives the part of them that belongs to an original tensor."""
    batch = original_batch(case, model)
    zero_beyond(model, batch.lengths)
    model(**batch.inputs, labels=batch.labels).loss.backward()

    def gradient_of(place: Place) -> torch.Tensor:
        gradient = model.get_parameter(place.target).grad
        assert gradient is not None, f"{place.target} got no gradient"
        return take(gradient, place)

    return gradient_of


def prompt_of(case: GoldenCase, run: str) -> tuple[int, int]:
    """The row of the batch that a run continues, and how many of its ids the prompt is.

    The stored prompt says so; without one, the run is named after its media, and its row's answer starts at the labels.
    """
    rows = case.input("batch.input_ids")
    if case.has(f"{run}.input_ids"):
        prompt = case.input(f"{run}.input_ids")[0]
        return next(i for i, ids in enumerate(rows) if torch.equal(ids[: len(prompt)], prompt)), len(prompt)
    wanted = {placeholder for placeholder, kind in KINDS.items() if kind in run.replace("speech", "audio")}
    row = next(i for i, ids in enumerate(rows.tolist()) if set(ids) & set(KINDS) == wanted)
    return row, int((case.input("batch.labels")[row] != -100).int().argmax())


def sparse_layers(model: UniMoeForCausalLM) -> list[int]:
    return sorted(model.config.text_config.sparse_layers)


def record(module: torch.nn.Module) -> dict[str, Any]:
    """A dict that receives the first input and the output of the last call of `module`."""
    seen: dict[str, Any] = {}
    module.register_forward_hook(lambda _, args, output: seen.update(input=args[0], output=output))
    return seen

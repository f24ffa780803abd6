"""Composition: a dense language model, encoders and connectors become one dense model of ours, tensor by tensor.

`plan_composition` opens the parts, reads headers and configurations only, and says of every tensor what it will be made
of. `run_composition` writes into a hidden folder that becomes the target when all of it reads back as it was written.
Connectors that no part brings are drawn; stage 1 of a recipe trains them, and `unimoe convert upcycle` makes the model
sparse.
"""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...processing.processing_unimoe import UniMoeProcessor
from ..checkpoints.checkpoint_reader import dtype_name, quantisation_notes
from ..checkpoints.checkpoint_writer import DEFAULT_SHARD_BYTES, OutputTensor
from ..checkpoints.file_digests import file_digests
from ..checkpoints.finished_folder import finished_folder
from ..checkpoints.key_rules import Shape
from ..checkpoints.our_folder import expected_tensors, in_model_order
from ..checkpoints.parameters import count_parameters, total_and_active
from ..checkpoints.read_back import write_and_read_back
from ..dense.prepared_tokenizers import placeholder_ids
from ..dense.sources import open_source
from ..publishing.hub import complete_bundle, save_config
from ..publishing.model_card import model_card, receipt_section
from ..publishing.saved_receipt import RECEIPT_FILE, TensorRecord
from .composed_part import ComposedPart, Made
from .composed_processor import (
    Chat,
    audio_features,
    build_composed_processor,
    composed_generation,
    own_processor,
    prepare_chat,
)
from .composition import ComposeOptions, Ingredients, OpenedParts, composed_config, open_parts
from .composition_receipt import CompositionReceipt, PartRecord
from .image_projector import CONNECTOR as PROJECTOR
from .language_part import grown_config, grown_rows, language_part, word_scale
from .new_connectors import CONNECTORS, NewConnectors
from .sound_part import CONNECTOR as SOUND_CONNECTOR
from .sound_part import open_qformer
from .speech_part import CONNECTOR as SPEECH_CONNECTOR
from .speech_part import add_prompt_queries, add_query_decoder
from .vision_part import picture_processor_of

_NEW = "new: "


@dataclass(frozen=True)
class CompositionPlan:
    """What will be written. `made_of` says of every output what its pieces are."""

    parts: tuple[ComposedPart, ...]
    config: UniMoeConfig
    options: ComposeOptions
    processor: UniMoeProcessor
    chat: Chat
    generation: GenerationConfig
    outputs: tuple[OutputTensor, ...]
    made_of: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.config.dtype)

    @property
    def parameters_new(self) -> int:
        """Parameters of connectors that no part brings."""
        names = {name for name, pieces in self.made_of.items() if pieces[0].startswith(_NEW)}
        return sum(output.num_bytes // output.dtype.itemsize for output in self.outputs if output.name in names)

    @property
    def features(self) -> dict[str, int]:
        """Placeholders of a picture and a video, and of an audio window in either branch."""
        counts = {name: getattr(self.processor, f"{name}_tokens") for name in ("image", "video", "speech", "sound")}
        return {name: count for name, count in counts.items() if count}

    def lines(self) -> list[str]:
        """The plan for a reader."""
        lines = []
        for part in self.parts:
            lines.append(f"{part.role:<16} {part.name}: {part.facts}; licence: {stated_licence(part)}")
        for name in CONNECTORS:
            connector = getattr(self.config, name)
            if connector is not None:
                lines.append(f"{name.replace('_', ' '):<16} {self._told(name)}")
        counts = ", ".join(f"{count} per {_PER[name]}" for name, count in self.features.items())
        size = sum(output.num_bytes for output in self.outputs)
        total = total_and_active(count_parameters(self.config)).total
        return [
            *lines,
            f"{'features':<16} {counts or 'none: text only'}",
            f"{'chat template':<16} {self.chat.name}, tokenization {self.processor.tokenization}",
            f"{'parameters':<16} {total:,}, {self.parameters_new:,} of them new (seed {self.options.seed})",
            f"{'writes':<16} {size / 1e6:,.1f} MB, {self.dtype_name}",
            *(f"{'note':<16} {note}" for note in self.notes),
        ]

    def _told(self, name: str) -> str:
        """What a connector is and where its weights come from."""
        config = getattr(self.config, name)
        kind = f"mlp of {config.depth} layers" if config.type == "mlp" else config.type.replace("_", " ")
        sources = [part.role for part in self.parts if any(key.startswith(f"model.{name}.") for key in part.tensors)]
        new = any(p[0].startswith(_NEW) for key, p in self.made_of.items() if key.startswith(f"model.{name}."))
        origin = " and ".join([f"from the {role}" for role in sources] + ["new"] * new)
        return f"{kind}, {config.input_size} -> {config.output_size}: {origin}"


_PER = {"image": "picture", "video": "video", "speech": "window of speech", "sound": "window of sound"}


def plan_composition(ingredients: Ingredients, options: ComposeOptions | None = None) -> CompositionPlan:
    """Open the parts and describe what is made of them; only headers are read.

    Raises:
        ConversionError: a part is not there, damaged, not what it should be, or does not fit the others.
        ConfigurationError: the connectors are impossible.
    """
    options = options or ComposeOptions()
    source = open_source(ingredients.language_model)
    chat = prepare_chat(source, options.chat_template)
    opened = open_parts(source, ingredients, options)
    rows = grown_rows(source.config.text_config, len(chat.tokenizer) - 1)
    text = grown_config(source.config.text_config, rows)
    config = composed_config(opened, text, placeholder_ids(chat.tokenizer), options)
    config.dtype = options.dtype or source.dtype
    expected = expected_tensors(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    parts = _parts(opened, config, shapes, ingredients, options, rows)
    made = {name: one for part in parts for name, one in part.tensors.items()}
    _check_projector(made, shapes)
    new = NewConnectors(config, options.seed, partial(word_scale, source))
    begins = tuple(f"model.{name}." for name in CONNECTORS)
    made |= {n: new.made(n, shape) for n, shape in shapes.items() if n not in made and n.startswith(begins)}
    outputs = [_output(name, made[name], tensor, config.dtype) for name, tensor in expected.items() if name in made]
    outputs += [_output(name, one, None, config.dtype) for name, one in made.items() if name not in expected]
    pictures = None
    if config.vision_config is not None:
        image_size = options.image_size
        pictures = opened.vision.pictures if opened.vision else picture_processor_of(source.folder, image_size)
    own = own_processor(source)
    aspect = options.image_aspect_ratio or (own.image_aspect_ratio if own is not None else "square")
    audio = audio_features(config, opened.audio_settings(own, options.window_seconds))
    return CompositionPlan(
        parts=tuple(parts),
        config=config,
        options=options,
        processor=build_composed_processor(config, chat, pictures, audio, aspect),
        chat=chat,
        generation=composed_generation(source, config, chat),
        outputs=in_model_order(outputs, config),
        made_of={name: one.made_of for name, one in made.items()},
        notes=tuple(_notes(opened, config, rows)),
    )


def run_composition(
    plan: CompositionPlan, out: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, progress: bool = True
) -> CompositionReceipt:
    """Write the dense model as a complete Hugging Face folder; every tensor is read back and compared.

    Raises:
        ConversionError: `out` is not empty, a part is damaged, or the disk returns something else than was written. Then
            nothing is left behind.
    """
    with finished_folder(out) as folder:
        parts = _records(plan, progress)
        written = write_and_read_back(folder, plan.outputs, max_shard_bytes=max_shard_bytes, progress=progress)
        total = total_and_active(count_parameters(plan.config))
        receipt = CompositionReceipt(
            out=out.name,
            seed=plan.options.seed,
            dtype=plan.dtype_name,
            parameters=total.total,
            parameters_active=total.active,
            parameters_new=plan.parameters_new,
            features=plan.features,
            parts=parts,
            targets={o.name: TensorRecord.of(o, plan.made_of[o.name], written.digests[o.name]) for o in plan.outputs},
            notes=list(plan.notes),
            **written.facts,
        )
        plan.processor.save_pretrained(folder)
        plan.generation.save_pretrained(folder)
        save_config(plan.config, folder)
        _copy_licences(plan.parts, folder)
        receipt.save(folder / RECEIPT_FILE)
        complete_bundle(folder, _card(plan, out.name, receipt))
    return receipt


def stated_licence(part: ComposedPart) -> str:
    """What a part says of its licence, for a reader."""
    licence = part.licence
    named = licence.get("license_name") or licence.get("license")
    link = licence.get("license_link")
    return "not stated" if named is None else f"{named} ({link})" if link else named


def _parts(
    opened: OpenedParts,
    config: UniMoeConfig,
    shapes: dict[str, Shape],
    ingredients: Ingredients,
    options: ComposeOptions,
    rows: int,
) -> list[ComposedPart]:
    """All parts with their tensors; later ones do not hold what earlier ones do."""
    parts = [language_part(opened.source, rows, opened.replaced, options.seed)]
    if opened.vision is not None:
        parts.append(opened.vision.part)
    if opened.projector is not None:
        parts.append(opened.projector)
    if opened.speech is not None:
        if config.speech_connector.type == "query_decoder":
            add_query_decoder(opened.speech, _below(SPEECH_CONNECTOR, shapes))
            if options.speech_queries == "prompt":
                add_prompt_queries(opened.speech, config.speech_connector.num_tokens)
        parts.append(opened.speech.part)
    if opened.sound is not None:
        opened.sound.add_tensors(shapes)
        parts.append(opened.sound.part)
    if ingredients.qformer_weights is not None:
        parts.append(open_qformer(ingredients.qformer_weights, config, _below(SOUND_CONNECTOR, shapes)))
    return parts


def _below(prefix: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _check_projector(made: dict[str, Made], shapes: dict[str, Shape]) -> None:
    for name, one in made.items():
        if name.startswith(PROJECTOR) and one.shape != shapes.get(name, one.shape):
            raise ConversionError(
                f"The image projector's {one.made_of[0]} has shape {list(one.shape)}, but this vision tower and language "
                f"model need {list(shapes[name])}. Give the one that was trained between them, or --image-projector new."
            )


def _output(name: str, made: Made, expected: torch.Tensor | None, dtype: torch.dtype) -> OutputTensor:
    counts = expected is not None and not expected.dtype.is_floating_point
    return OutputTensor(name, expected.dtype if counts and expected is not None else dtype, made.shape, made.pieces)


def _notes(opened: OpenedParts, config: UniMoeConfig, rows: int) -> list[str]:
    grown = rows - opened.source.config.text_config.vocab_size
    notes = [f"{grown} rows more in the embedding table, near the mean of the others"] if grown else []
    notes += quantisation_notes(opened.source.checkpoint, "language model")
    if opened.unused_projector:
        notes.append("the language model's image projector is left out, because no --vision-tower goes before it")
    if config.audio_config is None and config.sound_connector is not None:
        notes.append("sounds go through the speech tower")
    return notes


def _records(plan: CompositionPlan, progress: bool) -> list[PartRecord]:
    digests = file_digests((file for part in plan.parts for file in part.files), progress)
    return [
        PartRecord(
            role=part.role,
            name=part.public_name,
            facts=part.facts,
            licence=part.licence,
            files={file.name: digests[file.resolve()] for file in part.files},
            consumed=part.stored,
            dropped=part.dropped,
        )
        for part in plan.parts
    ]


def _copy_licences(parts: tuple[ComposedPart, ...], folder: Path) -> None:
    """The licence files of all parts; those of the language model keep their names."""
    for number, part in enumerate(parts):
        if not part.path.is_dir():
            continue
        for path in sorted([*part.path.glob("LICENSE*"), *part.path.glob("NOTICE*")]):
            ending = "" if number == 0 else "-" + part.role.replace(" ", "-").lower()
            shutil.copyfile(path, folder / f"{path.stem}{ending}{path.suffix}")


def _card(plan: CompositionPlan, name: str, receipt: CompositionReceipt) -> str:
    rows = [f"| {part.role} | {_linked(part)} | {part.facts} | {stated_licence(part)} |" for part in plan.parts]
    table = "\n".join(["| part | from | what | licence |", "|---|---|---|---|", *rows])
    licences = {tuple(sorted(part.licence.items())) for part in plan.parts}
    told = "Its connectors are new where no part brings them: train them before use. The terms of all parts hold."
    return model_card(
        name,
        plan.config,
        count_parameters(plan.config),
        license=dict(next(iter(licences))) if len(licences) == 1 else None,
        base_models=list(dict.fromkeys(part.name for part in plan.parts if part.is_hub_id)) or None,
        sections={
            "Parts": f"{told}\n\n{table}",
            "Composition receipt": receipt_section(receipt.lines()),
        },
    )


def _linked(part: ComposedPart) -> str:
    return f"[{part.name}](https://huggingface.co/{part.name})" if part.is_hub_id else f"`{part.public_name}`"


__all__ = ["ComposeOptions", "CompositionPlan", "Ingredients", "plan_composition", "run_composition", "stated_licence"]

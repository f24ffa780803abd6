"""What a composition is asked for: the parts by name, the choices, the opened parts, and the configuration they make."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..checkpoints.checkpoint_reader import Checkpoint
from ..dense.sources import Source
from .composed_part import ComposedPart
from .image_projector import CONNECTOR as PROJECTOR
from .image_projector import open_projector, projector_sizes, projector_tensors
from .sound_part import CONNECTOR as SOUND_CONNECTOR
from .sound_part import TOWER as SOUND_TOWER
from .sound_part import SoundTower, open_beats, qformer_fields
from .speech_part import CONNECTOR as SPEECH_CONNECTOR
from .speech_part import TOWER as SPEECH_TOWER
from .speech_part import SpeechTower, open_speech_tower, query_decoder_fields
from .vision_part import TOWER as VISION_TOWER
from .vision_part import VisionTower, open_vision_tower, states_fields

NEW_PROJECTOR = "new"
# What a dense model of ours, or a LLaVA, may bring beside its decoder.
_BRANCH_FIELDS = (
    "vision_config",
    "speech_config",
    "audio_config",
    "image_connector",
    "video_connector",
    "speech_connector",
    "sound_connector",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "vision_token_grid",
    "vision_scales",
    "video_pooling",
    "route_run_end_as_text",
)


@dataclass(frozen=True)
class Ingredients:
    """The parts, as the user names them: folders or Hub ids unless said otherwise.

    Args:
        language_model: a LLaMA-family decoder, alone, inside a LLaVA-like model, or inside a dense model of ours; what
            such a model has beside the decoder stays, unless another part takes its place.
        vision_tower: any vision encoder that transformers has.
        image_projector: a file with a trained image connector, or "new" for a new one where the language model has one.
        speech_tower: a Whisper.
        beats: a BEATs file (.pt).
        qformer_config: JSON of `Blip2QFormerConfig` fields.
        qformer_weights: a trained Q-Former; also a file.
    """

    language_model: str
    vision_tower: str | None = None
    image_projector: str | None = None
    speech_tower: str | None = None
    beats: Path | None = None
    qformer_config: Path | None = None
    qformer_weights: str | None = None


@dataclass(frozen=True)
class ComposeOptions:
    """The choices.

    Args:
        speech_connector, speech_tokens: kind, and embeddings per audio window.
        speech_queries: queries of a query decoder start as zeros (Uni-MoE), or the first of them as Whisper's own prompt.
        sound_connector, sound_tokens: the same for sounds. A kind without BEATs reads the speech tower; None takes the
            Q-Former where there is BEATs, and no sound branch otherwise.
        projector_depth: linear layers of new "mlp" connectors.
        output_norm: new connectors end with an RMSNorm that starts at the scale of word embeddings.
        vision_feature_layer: index into the vision tower's hidden states; None: the last but one (LLaVA), of a
            convolutional net the last.
        vision_scales: S2, see `UniMoeConfig`; None: one.
        vision_token_grid: pool a picture to so many positions squared.
        image_size: stretch pictures to squares of so many pixels.
        image_aspect_ratio: "square" or "pad", see `UniMoeProcessor`; None: "square".
        separate_video_connector: videos have a connector of their own.
        video_frames, video_pooling: see `UniMoeConfig`.
        window_seconds: length of an audio window; None: Whisper's 30.
        chat_template: see `prepare_chat`.
        seed: of everything that is drawn.
        dtype: of all floating point tensors; None: the language model's.
    """

    speech_connector: Literal["query_decoder", "mlp"] = "query_decoder"
    speech_tokens: int = 50
    speech_queries: Literal["zeros", "prompt"] = "zeros"
    sound_connector: Literal["qformer", "mlp"] | None = None
    sound_tokens: int = 50
    projector_depth: int = 2
    output_norm: bool = False
    vision_feature_layer: int | None = None
    vision_scales: list[int] | None = None
    vision_token_grid: int | None = None
    image_size: int | None = None
    image_aspect_ratio: Literal["square", "pad"] | None = None
    separate_video_connector: bool = False
    video_frames: int = 8
    video_pooling: Literal["mean", "none"] | None = None
    window_seconds: int | None = None
    chat_template: str | None = None
    seed: int = 0
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class OpenedParts:
    """The parts beside the language model, opened, and beginnings of our names that they take from it.

    `unused_projector`: the language model holds a projector, and there is no tower before it.
    """

    source: Source
    vision: VisionTower | None
    projector: ComposedPart | None
    speech: SpeechTower | None
    sound: SoundTower | None
    qformer: dict[str, Any]
    replaced: tuple[str, ...]
    unused_projector: bool = False

    def audio_settings(self, processor: Any, window_seconds: int | None) -> dict[str, Any]:
        """Settings of the feature extractor: of the new speech tower, or of the processor of a dense model of ours.

        Raises:
            ConversionError: another window is wanted than that of a speech tower that stays.
        """
        if self.speech is not None:
            return self.speech.features
        old = getattr(processor, "feature_extractor", None)
        names = ("feature_size", "sampling_rate", "window_seconds", "n_fft", "hop_length")
        settings = {"window_seconds": 30.0} if old is None else {name: getattr(old, name) for name in names}
        if window_seconds is None:
            return settings
        if self.source.config.speech_config is not None and window_seconds != settings["window_seconds"]:
            raise ConversionError(
                f"--window-seconds is {window_seconds}, but the language model's speech tower stays, and its windows are of "
                f"{settings['window_seconds']:g} s. Leave it out, or give the --speech-tower anew."
            )
        return {**settings, "window_seconds": float(window_seconds)}


def open_parts(source: Source, ingredients: Ingredients, options: ComposeOptions) -> OpenedParts:
    """Open everything beside the language model.

    Raises:
        ConversionError: a part cannot be read, or a choice lacks its part.
    """
    replaced: list[str] = []
    vision = speech = sound = None
    _require_parts(source, ingredients, options)
    if ingredients.vision_tower is not None:
        vision = open_vision_tower(
            ingredients.vision_tower, options.vision_feature_layer, options.image_size, options.vision_scales
        )
        replaced += [VISION_TOWER, PROJECTOR, "model.video_connector."]
    projector, unused = _projector(source, ingredients, sees=vision is not None)
    if projector is not None or ingredients.image_projector == NEW_PROJECTOR:
        replaced.append(PROJECTOR)
    if ingredients.speech_tower is not None:
        speech = open_speech_tower(ingredients.speech_tower, options.window_seconds)
        replaced += [SPEECH_TOWER, SPEECH_CONNECTOR]
    if ingredients.beats is not None:
        sound = open_beats(ingredients.beats)
        replaced.append(SOUND_TOWER)
    width = _sound_width(source, speech, sound, options)
    if width is not None:
        replaced.append(SOUND_CONNECTOR)
    qformer: dict[str, Any] = {}
    if width is not None and options.sound_connector != "mlp":
        qformer = qformer_fields(ingredients.qformer_config, width)
    elif ingredients.qformer_config is not None or ingredients.qformer_weights is not None:
        raise ConversionError("There is no Q-Former to configure: add --beats FILE.pt or --sound-connector qformer.")
    return OpenedParts(source, vision, projector, speech, sound, qformer, tuple(replaced), unused)


def composed_config(
    opened: OpenedParts, text: UniMoeTextConfig, placeholder_ids: dict[str, int], options: ComposeOptions
) -> UniMoeConfig:
    """The configuration of the whole."""
    hidden, old = text.hidden_size, opened.source.config
    fields: dict[str, Any] = {name: getattr(old, name) for name in _BRANCH_FIELDS}

    def connector(input_size: int, kind: str = "mlp", **more: Any) -> dict[str, Any]:
        shared = {"type": kind, "input_size": input_size, "output_size": hidden, "output_norm": options.output_norm}
        return {**shared, "depth": options.projector_depth, **more}

    if opened.vision is not None:
        width = opened.vision.states.width * len(options.vision_scales or [1])
        fields |= {**states_fields(opened.vision), "vision_scales": options.vision_scales, "vision_token_grid": None}
        fields |= {"image_connector": connector(width), "video_connector": None}
        if options.separate_video_connector:
            fields["video_connector"] = connector(width)
    if opened.projector is not None:
        depth, width = projector_sizes(opened.projector.tensors)
        _require_width(opened.projector, width, fields)
        fields["image_connector"] = connector(width, depth=depth, output_norm=False)
    elif PROJECTOR in opened.replaced and opened.vision is None:
        fields["image_connector"] = connector(old.image_connector.input_size)
    if opened.speech is not None:
        fields |= {
            "speech_config": opened.speech.config,
            "speech_connector": _speech(opened.speech, options, connector),
        }
    if opened.sound is not None:
        fields["audio_config"] = opened.sound.config
    if SOUND_CONNECTOR in opened.replaced:
        tower = fields["audio_config"]
        width = fields["speech_config"].d_model if tower is None else tower.hidden_size
        kind = options.sound_connector or "qformer"
        inner = {"qformer_config": opened.qformer} if kind == "qformer" else {}
        fields["sound_connector"] = connector(width, kind, num_tokens=options.sound_tokens, **inner)
    if options.vision_token_grid is not None:
        fields["vision_token_grid"] = options.vision_token_grid
    if options.vision_feature_layer is not None:
        fields["vision_feature_layer"] = options.vision_feature_layer
    fields["video_pooling"] = options.video_pooling or fields["video_pooling"]
    fields |= {f"{name}_token_id": number for name, number in placeholder_ids.items()}
    return UniMoeConfig(text_config=text, **fields, video_num_frames=options.video_frames)


def _require_parts(source: Source, ingredients: Ingredients, options: ComposeOptions) -> None:
    """Refuse choices about pictures or audio that nothing takes."""
    sees = ingredients.vision_tower is not None or source.config.vision_config is not None
    hears = any(part is not None for part in (ingredients.speech_tower, ingredients.beats)) or any(
        config is not None for config in (source.config.speech_config, source.config.audio_config)
    )
    for name, flag, takes, towers in (
        ("vision_feature_layer", "vision-feature-layer", sees, "--vision-tower"),
        ("vision_scales", "scales", ingredients.vision_tower is not None, "--vision-tower"),
        ("vision_token_grid", "image-grid", sees, "--vision-tower"),
        ("image_size", "image-size", sees, "--vision-tower"),
        ("video_pooling", "video-pooling", sees, "--vision-tower"),
        ("window_seconds", "window-seconds", hears, "--speech-tower or --beats"),
    ):
        if getattr(options, name) is not None and not takes:
            raise ConversionError(f"--{flag} is {getattr(options, name)}, but no part takes it: add {towers}.")


def _speech(tower: SpeechTower, options: ComposeOptions, connector: Any) -> dict[str, Any]:
    width, tokens = tower.config.d_model, options.speech_tokens
    if options.speech_connector == "mlp":
        return connector(width, num_tokens=tokens)
    return connector(width, "query_decoder", num_tokens=tokens, decoder_config=query_decoder_fields(tower))


def _projector(source: Source, ingredients: Ingredients, sees: bool) -> tuple[ComposedPart | None, bool]:
    """A trained projector: that of the file, or of a language model in LLaVA's own layout; and whether it goes unused."""
    given = ingredients.image_projector
    sees = sees or source.config.image_connector is not None
    if given not in (None, NEW_PROJECTOR):
        if not sees:
            raise ConversionError("--image-projector needs the tower that goes before it: add --vision-tower.")
        return open_projector(Path(str(given)).expanduser()), False
    if given == NEW_PROJECTOR and not sees:
        raise ConversionError("--image-projector new needs a vision tower: add --vision-tower.")
    if source.kind != "multimodal" or source.config.image_connector is not None or given == NEW_PROJECTOR:
        return None, False
    raw = Checkpoint(source.folder)
    tensors = projector_tensors(raw, {n: info.shape for n, info in raw.tensors.items() if "mm_projector" in n})
    if not tensors or not sees:
        return None, bool(tensors)
    depth, width = projector_sizes(tensors)
    for made in tensors.values():
        source.dropped.pop(made.made_of[0], None)
    facts = f"mlp of {depth} layers, from {width}; inside the language model"
    return ComposedPart("image projector", source.name, source.folder, facts, tuple(raw.files), tensors), False


def _require_width(projector: ComposedPart, width: int, fields: dict[str, Any]) -> None:
    wanted = fields["image_connector"]
    wanted = wanted["input_size"] if isinstance(wanted, dict) else wanted.input_size
    if width != wanted:
        raise ConversionError(
            f"The image projector of {projector.public_name} takes states of width {width}, but the vision tower's are "
            f"{wanted} wide. Give the tower that it was trained behind, or --image-projector new."
        )


def _sound_width(
    source: Source, speech: SpeechTower | None, sound: SoundTower | None, options: ComposeOptions
) -> int | None:
    """Width of the states that a new sound connector reads; None where none is wanted."""
    if sound is not None:
        return sound.config.hidden_size
    shares = source.config.sound_connector is not None and source.config.audio_config is None
    if options.sound_connector is None:
        if shares and speech is not None:
            raise ConversionError(
                "The language model's sound connector reads the speech tower that is to be replaced: choose a new one with "
                "--sound-connector."
            )
        return None
    tower = source.config.audio_config or (speech.config if speech is not None else source.config.speech_config)
    if tower is None:
        raise ConversionError("--sound-connector needs a tower: add --beats FILE.pt, or --speech-tower to share it.")
    return int(tower.d_model if tower.model_type == "whisper" else tower.hidden_size)


__all__ = ["NEW_PROJECTOR", "ComposeOptions", "Ingredients", "OpenedParts", "composed_config", "open_parts"]

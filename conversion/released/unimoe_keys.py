"""Tensor names of the released Uni-MoE models, and what each becomes in ours; see `key_rules.py`."""

from typing import Literal

from ..checkpoints.key_rules import Rule
from ..checkpoints.llava_keys import LANGUAGE, LLAMA_DECODER, PROJECTOR_RULES, expert_rules, vision_rules
from ..dense.beats_file import beats_rules

AudioKind = Literal["whisper", "beats"]
# How experts lie in the decoder: as modules of the model's own, or in DeepSpeed's (the 8-expert variant).
Layout = Literal["plain", "deepspeed"]

AUDIO_TOWER = "model.audio_tower.audio_tower."
ALIGNER = "model.mm_audio_aligner."
# Below `model.layers.N.mlp.`: the router, and what comes before an expert's number.
GATES: dict[Layout, str] = {"plain": "gate", "deepspeed": "deepspeed_moe.gate.wg"}
EXPERTS: dict[Layout, str] = {"plain": "experts", "deepspeed": "deepspeed_moe.experts.deepspeed_experts"}


def _sparse_layer(layout: Layout) -> tuple[Rule, ...]:
    """Rules of a sparse layer's router and experts."""
    router = Rule(f"model.layers.{{layer}}.mlp.{GATES[layout]}.weight", LANGUAGE + "layers.{layer}.mlp.gate.weight")
    return (router, *expert_rules(EXPERTS[layout]))


_OTHER_EXPERTS = "router and experts of the 4-expert model, in whose place the 8-expert model has its own"
_SPARSE_LAYERS: dict[Layout, tuple[Rule, ...]] = {
    "plain": _sparse_layer("plain"),
    "deepspeed": (
        *_sparse_layer("deepspeed"),
        Rule("model.layers.{layer}.mlp.gate.weight", None, reason=_OTHER_EXPERTS),
        Rule("model.layers.{layer}.mlp.experts.{rest}", None, reason=_OTHER_EXPERTS),
    ),
}

_WHISPER = (
    Rule("model.query_tokens", "model.speech_connector.query_tokens"),
    Rule(
        ALIGNER + "decoder.audio_decoder.embed_tokens.weight",
        None,
        reason="word embeddings of the query decoder, which reads queries and never words",
    ),
    Rule(ALIGNER + "decoder.audio_decoder.{rest}", "model.speech_connector.decoder.{rest}"),
    Rule(ALIGNER + "projector.{parameter}", "model.speech_connector.projector.{parameter}"),
    Rule(AUDIO_TOWER + "{rest}", "model.speech_tower.{rest}"),
    Rule("model.audio_tower.encoder.{rest}", None, reason="a copy of Whisper that the original builds and never runs"),
    Rule("model.audio_tower.decoder.{rest}", None, reason="a copy of Whisper that the original builds and never runs"),
)

_BEATS = (
    Rule(ALIGNER + "query_tokens", "model.sound_connector.query_tokens"),
    Rule(ALIGNER + "qformer.qformer.{rest}", "model.sound_connector.qformer.{rest}"),
    Rule(ALIGNER + "projector.{parameter}", "model.sound_connector.projector.{parameter}"),
    *beats_rules(AUDIO_TOWER),
)


def rules_for(audio: AudioKind, vision_prefix: str, layout: Layout = "plain") -> tuple[Rule, ...]:
    """The rules of the variants with one audio side.

    Args:
        vision_prefix: what the vision tower's tensors start with in ours, see `llava_keys.vision_prefix`.
    """
    audio_rules = _WHISPER if audio == "whisper" else _BEATS
    return (*LLAMA_DECODER, *_SPARSE_LAYERS[layout], *PROJECTOR_RULES, *vision_rules(vision_prefix), *audio_rules)

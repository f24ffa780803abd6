"""The text of a model card: metadata that the Hub reads, what is inside, how to load it, and the numbers."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..checkpoints.parameters import ParameterCount, total_and_active

_TEXT_EXAMPLE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "PATH_OR_HUB_ID"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```"""
_MEDIA_EXAMPLE = """\
```python
from transformers import AutoModelForCausalLM, AutoProcessor

folder = "PATH_OR_HUB_ID"
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
messages = [{"role": "user", "content": [%s, {"type": "text", "text": "QUESTION"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```"""

_PERCEPTION = """\
The mixers read what other vision models see in an image, as "aux" of its item: a text, and a picture of the segments. Which
models is not recorded here; without aux, the model answers from the picture alone."""


def modalities_of(config: UniMoeConfig) -> list[str]:
    """What the model takes, in the order image, video, speech, sound, text."""
    return [name for name, connector in config.connectors.items() if connector is not None] + ["text"]


def model_card(
    name: str,
    config: UniMoeConfig,
    parameters: Mapping[str, ParameterCount],
    *,
    license: str | Mapping[str, str] | None = None,
    base_models: list[str] | None = None,
    sections: Mapping[str, str] | None = None,
    use: str | None = None,
) -> str:
    """A card in Markdown.

    Args:
        name: the title.
        license: licence id of the Hub, or the fields `license`, `license_name` and `license_link`; "other" when None.
        base_models: Hub ids of the models that this one was made from.
        use: text in place of the example of how to load the model and ask it.
        sections: heading -> Markdown text, put at the end: results, recipe, receipt, attribution.
    """
    modalities = modalities_of(config)
    parts = [
        _metadata(modalities, license, base_models or []),
        f"# {name}",
        f"A {_kind(config)} that takes {_listed(modalities)} and writes text, made with unimoe.",
        "## Use\n\n" + (use or _example(modalities)),
        "## Parameters\n\n" + parameter_table(parameters),
        *(f"## {heading}\n\n{text.strip()}" for heading, text in _sections(config, sections or {}).items()),
    ]
    return "\n\n".join(parts) + "\n"


def receipt_section(receipt: Iterable[str]) -> str:
    """The lines of a receipt as Markdown, to be read as they are."""
    return "\n".join(["```", *receipt, "```"])


def parameter_table(parameters: Mapping[str, ParameterCount]) -> str:
    """Parameters per role as a Markdown table."""
    rows = ["| part | parameters | active per token |", "|---|---:|---:|"]
    rows += [f"| {role} | {count.total:,} | {count.active:,} |" for role, count in parameters.items()]
    everything = total_and_active(dict(parameters))
    return "\n".join([*rows, f"| **all** | **{everything.total:,}** | **{everything.active:,}** |"])


def _sections(config: UniMoeConfig, given: Mapping[str, str]) -> Mapping[str, str]:
    if config.text_config.mixer_config is None:
        return given
    return {"Perception": _PERCEPTION, **given}


def _metadata(modalities: list[str], license: str | Mapping[str, str] | None, base_models: list[str]) -> str:
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": _pipeline_tag(modalities),
        "license": "other",
        **({"license": license} if isinstance(license, str) else license or {}),
        "tags": ["unimoe", "mixture-of-experts", "custom_code"],
    }
    if base_models:
        fields["base_model"] = base_models
    # JSON values are YAML values, and quoting them keeps a strange name from becoming more metadata.
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"])


def _pipeline_tag(modalities: list[str]) -> str:
    if {"speech", "sound"} & set(modalities):
        return "any-to-any"
    return "image-text-to-text" if "image" in modalities else "text-generation"


def _kind(config: UniMoeConfig) -> str:
    text = config.text_config
    if not text.sparse_layers:
        return "dense model"
    return (
        f"Mixture-of-Experts model ({_experts(text)}, in {len(text.sparse_layers)} of {text.num_hidden_layers} layers)"
    )


def _experts(text: UniMoeTextConfig) -> str:
    """E.g. "4 experts, 2 per token" or "8 experts, at most 7 per token, 1 null expert, 2 shared experts"."""
    words = [
        f"{text.num_experts} experts",
        f"{'at most ' * bool(text.router_top_p)}{text.max_choices_per_token} per token",
    ]
    for count, kind in ((text.num_null_experts, "null"), (text.num_shared_experts, "shared")):
        if count:
            words.append(f"{count} {kind} expert{'s' * (count > 1)}")
    return ", ".join(words)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _example(modalities: list[str]) -> str:
    kinds = {"image": "image", "speech": "audio", "sound": "audio"}
    medium = next((kinds[modality] for modality in modalities if modality in kinds), None)
    return _TEXT_EXAMPLE if medium is None else _MEDIA_EXAMPLE % f'{{"type": "{medium}", "path": "FILE"}}'

"""Chat templates: ChatML, Uni-MoE's, the five of Bunny, which MoIIE uses, and MoAI's.

Answers stand between `{% generation %}` and `{% endgeneration %}`, so that labels follow from the template alone. Media
stand in a message's content; what follows one in the text is its `after`, else what the template says.
"""

from collections.abc import Mapping
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from .media_policy_unimoe import OptionError
from .moai_prompts_unimoe import MOAI_CHAT_TEMPLATES

_CONTENT_MACRO = """\
{%- macro show(content, after_media) -%}
{%- if content is string -%}{{- content -}}{%- else -%}{%- for item in content -%}
{%- if item['type'] == 'text' -%}{{- item['text'] -}}
{%- elif item['type'] in ('image', 'video', 'audio') -%}
{{- '<' + item['type'] + '>' + (item['after'] if item['after'] is defined else after_media) -}}
{%- endif -%}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""

DEFAULT_CHAT_TEMPLATE = (
    _CONTENT_MACRO
    + """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- show(message['content'], '') + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- show(message['content'], '') + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)
"""ChatML: `<|im_start|>role\\n...<|im_end|>\\n`, media where they stand in the content."""

_BEGIN = "{%- if bos_token is defined and bos_token -%}{{- bos_token -}}{%- endif -%}\n"

_TWO_SEPARATORS = """\
{%- if messages[0]['role'] == 'system' -%}{{- show(messages[0]['content'], '\\n') -}}
{%- else -%}{{- "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
detailed, and polite answers to the user's questions." -}}
{%- endif -%}
{{- 'SEPARATOR' -}}
{%- for message in messages -%}
{%- if message['role'] in ('user', 'assistant') and not message['content'] -%}
{{- 'USER:' if message['role'] == 'user' else 'ASSISTANT:' -}}
{%- elif message['role'] == 'user' -%}{{- 'USER: ' + show(message['content'], '\\n') + 'SEPARATOR' -}}
{%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT:' -}}
{%- generation -%}{{- ' ' + show(message['content'], '\\n') + 'END_OF_ANSWER' -}}{%- endgeneration -%}
{%- elif not loop.first -%}{{- raise_exception('a system message must come first; other roles are user, assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_CAPTION = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' and message['content'] is not string -%}
{%- for item in message['content'] if item['type'] != 'text' -%}{{- '<' + item['type'] + '>' -}}{%- endfor -%}
{%- elif message['role'] == 'assistant' and message['content'] -%}
{%- generation -%}{{- show(message['content'], '') + '\\n' -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""


def _two_separators(separator: str, end_of_answer: str, begins_with_bos: bool = True) -> str:
    turns = _TWO_SEPARATORS.replace("SEPARATOR", separator).replace("END_OF_ANSWER", end_of_answer)
    return _CONTENT_MACRO + _BEGIN * begins_with_bos + turns


VICUNA_CHAT_TEMPLATE = _two_separators(" ", "</s>")
"""Uni-MoE's prompt (template "v1" of its code): system text, `USER: ... ASSISTANT: answer</s>`, media before a newline.

As in its code an empty message is an open one: its role and a colon, nothing after them.
"""

BUNNY_SEPARATORS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "bunny": (" ", "<|endoftext|>"),
        "phi3": (" ", "<|endoftext|>"),
        "minicpm": (" ", "</s>"),
        "llama": ("", "<|end_of_text|>"),
    }
)
"""Of Bunny's templates, by version: what ends a turn of the user, and what ends an answer."""

BUNNY_VERSIONS = (*BUNNY_SEPARATORS, "plain")


def bunny_chat_template(version: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Bunny's chat template for a tokenizer, which decides whether prompts begin with BOS.

    Args:
        version: "bunny", "phi3", "minicpm" or "llama": as `VICUNA_CHAT_TEMPLATE`, with separators of their own.
            "plain": media, caption, newline, for captions in stage 1; the user's words are left out.

    Raises:
        OptionError: the version is none of these.
    """
    begins = begins_with_bos(tokenizer)
    if version == "plain":
        return _CONTENT_MACRO + _BEGIN * begins + _CAPTION
    if version not in BUNNY_SEPARATORS:
        raise OptionError(f"Bunny has no template {version!r}; use one of {BUNNY_VERSIONS}.")
    return _two_separators(*BUNNY_SEPARATORS[version], begins)


def bunny_chat_templates(version: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What a model that is to be trained carries: the template as "default", and "plain", which a stage 1 asks for by name.

    Raises:
        OptionError: see `bunny_chat_template`.
    """
    names = {"default": version, "plain": "plain"}
    return {name: bunny_chat_template(of, tokenizer) for name, of in names.items()}


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a BOS before every text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer.encode("")[:1] == [bos]


__all__ = [
    "BUNNY_SEPARATORS",
    "BUNNY_VERSIONS",
    "DEFAULT_CHAT_TEMPLATE",
    "MOAI_CHAT_TEMPLATES",
    "VICUNA_CHAT_TEMPLATE",
    "begins_with_bos",
    "bunny_chat_template",
    "bunny_chat_templates",
]

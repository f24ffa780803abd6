"""MoAI's prompts: InternLM-XComposer2's turns for benchmarks and for training, and the demo's own form."""

_MACROS = """\
{%- macro pictures(content) -%}{%- if content is not string -%}
{%- for item in content if item['type'] != 'text' -%}{{- '<' + item['type'] + '>' -}}{%- endfor -%}
{%- endif -%}{%- endmacro -%}
{%- macro words(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}
{%- for item in content if item['type'] == 'text' -%}{{- item['text'] -}}{%- endfor -%}
{%- endif -%}{%- endmacro -%}
{%- if bos_token is defined and bos_token -%}{{- bos_token -}}{%- endif -%}
{%- set system = messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if system else messages -%}
{%- set shown = pictures(turns[0]['content']) if turns else '' -%}
{%- set opening = words(messages[0]['content']) if system else OPENING if shown else '' -%}
{{- opening + (' ' if opening and shown else '') + shown -}}
"""

# What opens a conversation about an image; images of the first message stand behind it, not in the message.
OPENING = "AI assistant should give helpful and detailed answers to user after fully understanding an image."

_TURNS = """\
{%- for message in turns -%}
{%- set seen = '' if loop.first else pictures(message['content']) -%}
{%- if message['role'] == 'user' -%}
{{- (' ' if loop.first and (opening or shown) else '') + '[UNUSED_TOKEN_146]user\\n' + seen -}}
{{- words(message['content']) + '[UNUSED_TOKEN_145]\\n' -}}
{%- elif message['role'] == 'assistant' -%}{{- '[UNUSED_TOKEN_146]assistant\\n' -}}
{%- generation -%}{{- words(message['content']) + '[UNUSED_TOKEN_145]' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}{{- raise_exception('a system message must come first; other roles are user, assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[UNUSED_TOKEN_146]assistant\\n' -}}{%- endif -%}
"""

_DEMO = """\
{%- for message in turns -%}
{%- set seen = '' if loop.first else pictures(message['content']) -%}
{%- if message['role'] == 'user' -%}{{- ' USER: ' + seen + words(message['content']) -}}
{%- elif message['role'] == 'assistant' -%}{{- ' ASSISTANT:' -}}
{%- generation -%}{{- ' ' + words(message['content']) + '[UNUSED_TOKEN_145]' -}}{%- endgeneration -%}
{%- else -%}{{- raise_exception('a system message must come first; other roles are user, assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""

_BEGIN = _MACROS.replace("OPENING", f"'{OPENING}'")
MOAI_CHAT_TEMPLATES = {"default": _BEGIN + _TURNS, "demo": _BEGIN + _DEMO}
"""By name: "default", with which benchmarks were run, and "demo"."""

__all__ = ["MOAI_CHAT_TEMPLATES", "OPENING"]

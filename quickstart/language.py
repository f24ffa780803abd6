"""The compact decoder of the quickstart and its tokenizer.

A 135 M-parameter model cannot be taught to answer in a few CPU minutes, so the default decoder is small, and stage 0
teaches it the English of the corpus.
"""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..processing.chat_unimoe import CHAT_TOKENS, MEDIA_TOKENS
from ..starter_corpus.corpus import load_samples

PAD, BOS = "<|pad|>", "<|endoftext|>"
START_OF_TURN, END_OF_TURN = CHAT_TOKENS
# ChatML, except that an answer starts with a space on its role's line: a word is then the same token in an answer as in
# the middle of a sentence, so that a small model can answer by copying.
COMPACT_CHAT_TEMPLATE = """\
{%- macro show(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}{%- for item in content -%}
{{- item['text'] if item['type'] == 'text' else '<' + item['type'] + '>' -}}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant' -}}
{%- generation -%}{{- ' ' + show(message['content']) + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- '<|im_start|>' + message['role'] + ' ' + show(message['content']) + '<|im_end|>' -}}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' -}}{%- endif -%}
"""


def compact_decoder() -> tuple[UniMoeForCausalLM, PreTrainedTokenizerFast]:
    """A freshly initialised decoder of about 4 M parameters and a tokenizer of the corpus's words."""
    tokenizer = train_tokenizer(_corpus_texts())
    model = UniMoeForCausalLM(UniMoeConfig(text_config=compact_text_config(tokenizer)))
    start_as_copier(model)
    return model, tokenizer


@torch.no_grad()
def start_as_copier(model: UniMoeForCausalLM) -> None:
    """Let attention start by passing on what it looks at: the output projection undoes the value projection.

    With tied embeddings a head then raises the words that it looks at, so the decoder only has to learn where to look.
    Without it, whether it learns within a few hundred steps to answer by copying is a matter of luck. After Trockman &
    Kolter, "Mimetic initialization of self-attention layers" (arXiv 2305.09828), with the sign of a copy.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)


def _corpus_texts() -> Iterable[str]:
    for sample in [*load_samples("stage0"), *load_samples("train")]:
        if "text" in sample:
            yield sample["text"]
        for message in sample.get("messages", []):
            yield from (item["text"] for item in message["content"] if item["type"] == "text")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the given texts; its length is a multiple of 8 for fast matrix products."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, START_OF_TURN, END_OF_TURN, *MEDIA_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(-tokenizer.get_vocab_size() % 8)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=END_OF_TURN, padding_side="left"
    )


def compact_text_config(tokenizer: PreTrainedTokenizerFast) -> UniMoeTextConfig:
    """A dense decoder of about 4 M parameters."""
    return UniMoeTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.04,
        tie_word_embeddings=True,
        num_experts=0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )

"""The dense model that MoIIE's recipes start from: a language model, a SigLIP tower and a new connector in one folder."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, SiglipVisionModel
from transformers.initialization import no_init_weights

from ..errors import ConversionError
from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..processing.chat_templates_unimoe import BUNNY_SEPARATORS
from ..processing.chat_unimoe import IMAGE_TOKEN
from .bunny_processor import build_bunny_processor, prepare_bunny_tokenizer
from .hub import save_bundle
from .llama_family import dense_from


def write_bunny_start(
    language: str,
    tower: str,
    template: str,
    out: Path,
    *,
    scales: list[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> UniMoeForCausalLM:
    """Assemble the model, write it with its processor, and return it.

    Args:
        language: folder or Hub id of a LLaMA-family model with its tokenizer.
        tower: folder or Hub id of a SigLIP model.
        template: of Bunny, "phi3" or "llama"; it must fit the tokenizer's end of text.
        scales: of S2, e.g. [1, 2, 3]; None looks at pictures in one scale.
        seed: of the connector.

    Raises:
        ConversionError: `out` is not empty, the language model is of another family, or its tokenizer does not know the
            token that ends an answer.
    """
    if out.exists() and any(out.iterdir()):
        raise ConversionError(f"{out} is not empty: name another folder.")
    tokenizer = AutoTokenizer.from_pretrained(language)
    end = BUNNY_SEPARATORS[template][1]
    if end not in tokenizer.get_vocab():
        raise ConversionError(
            f"The tokenizer of {language} has no {end}, with which the template {template!r} ends answers."
        )
    prepare_bunny_tokenizer(tokenizer, template)
    decoder = dense_from(AutoModelForCausalLM.from_pretrained(language, dtype=dtype))
    if len(tokenizer) > decoder.config.text_config.vocab_size:
        decoder.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    vision = SiglipVisionModel.from_pretrained(tower, dtype=dtype)
    model = _joined(decoder, vision, tokenizer, scales, seed)
    processor = build_bunny_processor(model.config, tokenizer, template, for_training=True)
    save_bundle(model, processor, out)
    return model


def _joined(
    decoder: UniMoeForCausalLM,
    vision: SiglipVisionModel,
    tokenizer: PreTrainedTokenizerBase,
    scales: list[int] | None,
    seed: int,
) -> UniMoeForCausalLM:
    text, width = decoder.config.text_config, vision.config.hidden_size
    text.pad_token_id, text.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = UniMoeConfig(
        text_config=text,
        vision_config=vision.config,
        image_connector={
            "type": "mlp",
            "depth": 2,
            "input_size": width * len(scales or [1]),
            "output_size": text.hidden_size,
        },
        image_token_id=int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),  # type: ignore[arg-type]
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",  # SigLIP has no class token to drop
        vision_scales=scales,
    )
    with no_init_weights():  # what follows replaces everything but the connector
        model = UniMoeForCausalLM(config)
    model.model.language_model, model.lm_head = decoder.model.language_model, decoder.lm_head
    model.model.vision_tower.load_state_dict(vision.state_dict(), assign=True)
    torch.manual_seed(seed)
    for module in model.model.image_connector.modules():
        model._init_weights(module)
    model.to(next(decoder.parameters()).dtype)  # type: ignore[arg-type]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.suppress_tokens = [config.image_token_id]
    return model.eval()

"""Runs a source model and its conversion on the same prompts, one after the other, so that only one is in memory."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerBase

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.configuration_unimoe_text import MODALITIES
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ...progress_bars import transformers_bars
from ..checkpoints.parameters import count_parameters, total_and_active
from ..dense.picture_processor import image_features
from ..dense.sources import Source, load_dense
from ..dense.tokenizer_files import tokenizer_if_readable
from .receipt import Comparison, Continuation

_TEXTS = (
    "The capital of France is",
    "Plants turn light into sugar. In the leaves of a tree, water and",
    "def fibonacci(n):\n    if n < 2:\n        return",
)
_RANDOM_LENGTH = 48
# The FFN of a decoder layer, in transformers' classes and ours; towers call theirs otherwise.
_FFN_MODULE = re.compile(r"(?:^|model\.)layers\.(\d+)\.mlp$")
_NEW_TOKENS = 24
_CONTINUED_PROMPTS = 2
# Weights, and as much again for what loading and running them takes.
_BYTES_PER_PARAMETER = 4 * 1.25


@dataclass(frozen=True)
class _Prompt:
    """Inputs of one forward pass, and the text that they came from ("" for random ones).

    `never`: tokens that its continuation must not hold, because classes differ in what they make of them: without their
    medium, placeholders have no meaning.
    """

    inputs: dict[str, torch.Tensor]
    text: str = ""
    never: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Outcome:
    logits: list[torch.Tensor]
    continuations: list[torch.Tensor]


def compare_models(
    source: Source,
    config: UniMoeConfig,
    folder: Path,
    dtype: torch.dtype | None,
    expected_ffn_deviation: float = 0.0,
) -> Comparison | str:
    """Compare the model in `folder` with its source, or say why that cannot be done here.

    Both run in float32 on the weights as they were written: where `dtype` rounds them, the source's are rounded too,
    so that a difference is one of the conversion. Prompts are texts if the source has a tokenizer, random tokens, and
    for models with towers random embeddings of every modality.

    Args:
        expected_ffn_deviation: by how much of its output's size a sparse layer's FFN is expected to differ. What that
            makes of the logits is found by disturbing the dense model's FFNs as much.

    Raises:
        ConversionError: the tokenizer of `folder` is not the source's.
    """
    needed = total_and_active(count_parameters(config)).total * _BYTES_PER_PARAMETER
    available = psutil.virtual_memory().available
    if needed > available:
        return f"running it takes about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"
    tokenizer = tokenizer_if_readable(source.folder)
    prompts = _prompts(source, config, tokenizer)
    _check_tokenizer(tokenizer, folder)
    rounding = expected_gap = None
    with transformers_bars(shown=False):
        expected = _run(lambda: _load_source(source, dtype), prompts)
        if dtype is not None and dtype.itemsize < source.dtype.itemsize:
            rounding = _difference(_run(lambda: _load_source(source, None), prompts, continued=0), expected)
        if expected_ffn_deviation:
            layers = config.text_config.sparse_layers
            disturbed = _run(lambda: _disturbed(source, dtype, layers, expected_ffn_deviation), prompts, continued=0)
            expected_gap = _difference(disturbed, expected)
        converted = UniMoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
        each_expert = _each_expert_difference(converted.eval(), prompts[0], expected.logits[0])
        result = _run(lambda: converted, prompts)
    return Comparison(
        reference=_reference(source),
        prompts=len(prompts),
        positions=sum(logits.shape[1] for logits in result.logits),
        max_abs_logit_difference=_difference(expected, result),
        each_expert_difference=each_expert,
        max_abs_logit=max(float(logits.abs().max()) for logits in expected.logits),
        continuations=[
            _continuation(prompt, one, other, tokenizer)
            for prompt, one, other in zip(prompts, expected.continuations, result.continuations, strict=False)
        ],
        rounding_difference=rounding,
        expected_difference=expected_gap,
    )


def _reference(source: Source) -> str:
    """What the sparse model is compared with, for the receipt."""
    return "the source as our dense model" if source.kind == "internlm2" else "the source"


def _load_source(source: Source, dtype: torch.dtype | None) -> PreTrainedModel:
    if source.kind == "internlm2":
        model: PreTrainedModel = load_dense(source)
    else:
        model_class: Any = {"unimoe": UniMoeForCausalLM, "multimodal": AutoModelForImageTextToText}.get(
            source.kind, AutoModelForCausalLM
        )
        model = model_class.from_pretrained(source.folder, dtype=torch.float32, trust_remote_code=False)
    if dtype is not None and dtype != torch.float32:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
    return model


def _disturbed(source: Source, dtype: torch.dtype | None, layers: list[int], deviation: float) -> PreTrainedModel:
    """The source with noise on the output of some layers' FFNs, `deviation` times as large as the output itself."""
    model, generator = _load_source(source, dtype), torch.Generator().manual_seed(0)

    def disturb(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        size = output.square().mean(-1, keepdim=True).sqrt()
        return output + deviation * size * torch.randn(output.shape, generator=generator)

    for name, module in model.named_modules():
        match = _FFN_MODULE.search(name)
        if match and int(match[1]) in layers:
            module.register_forward_hook(disturb)
    return model


@torch.no_grad()
def _run(load: Callable[[], PreTrainedModel], prompts: list[_Prompt], continued: int = _CONTINUED_PROMPTS) -> _Outcome:
    model = load().eval()
    logits = [model(**prompt.inputs, use_cache=False).logits for prompt in prompts]
    continuable = [prompt for prompt in prompts if "input_ids" in prompt.inputs][:continued]
    continuations = [
        model.generate(
            **prompt.inputs,
            # Else ids that happen to be that of padding are masked, and dynamic routers give such tokens no experts.
            attention_mask=torch.ones_like(prompt.inputs["input_ids"]),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            **({"suppress_tokens": list(prompt.never)} if prompt.never else {}),
        )[0, prompt.inputs["input_ids"].shape[1] :]
        for prompt in continuable
    ]
    return _Outcome(logits, continuations)


@torch.no_grad()
def _each_expert_difference(model: UniMoeForCausalLM, prompt: _Prompt, expected: torch.Tensor) -> float:
    """Largest difference from the expected logits when k experts at a time do all the work, with equal weights."""
    text = model.config.text_config
    # In order, so that k neighbours are whole copies where experts are parts of them.
    groups = [sorted(group.experts) for group in text.router_groups]
    k = min(text.num_experts_per_tok, *map(len, groups))  # null experts count as choices, and compute nothing
    routers = [model.model.language_model.layers[layer].mlp.gate for layer in text.sparse_layers]
    differences = []
    for first in range(0, max(map(len, groups)), k):
        chosen_GK = torch.tensor([[experts[(first + i) % len(experts)] for i in range(k)] for experts in groups])
        handles = [router.register_forward_hook(_always(chosen_GK, text.num_shared_experts)) for router in routers]
        logits = model(**prompt.inputs, use_cache=False).logits
        differences.append((logits - expected).abs().max())
        for handle in handles:
            handle.remove()
    return float(torch.stack(differences).max())


def _always(chosen_GK: torch.Tensor, num_shared: int) -> Callable[[torch.nn.Module, tuple, tuple], tuple]:
    """A router's forward hook that sends the tokens of group g to the experts `chosen_GK[g]`, and to shared ones."""

    def route(_router: torch.nn.Module, inputs: tuple, outputs: tuple) -> tuple:
        logits_TR, weights_TK, index_TK = outputs
        group_T = inputs[1] if len(inputs) > 1 else None
        chosen_TK = chosen_GK[:1].expand(len(index_TK), -1) if group_T is None else chosen_GK[group_T]
        shared_TF = index_TK[:, index_TK.shape[1] - num_shared :]
        index_TK = torch.cat((chosen_TK, shared_TF), dim=-1)
        return logits_TR, weights_TK.new_full(index_TK.shape, 1 / index_TK.shape[1]), index_TK

    return route


def _difference(one: _Outcome, other: _Outcome) -> float:
    gaps = [(a - b).abs().max() for a, b in zip(one.logits, other.logits, strict=True)]
    return float(torch.stack(gaps).max())


def _continuation(
    prompt: _Prompt, expected: torch.Tensor, result: torch.Tensor, tokenizer: PreTrainedTokenizerBase | None
) -> Continuation:
    text = tokenizer.decode(result) if tokenizer is not None else " ".join(map(str, result.tolist()))
    return Continuation(prompt.text or "random tokens", len(result), torch.equal(expected, result), str(text))


def _prompts(source: Source, config: UniMoeConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[_Prompt]:
    generator = torch.Generator().manual_seed(0)
    text = config.text_config
    prompts = []
    if tokenizer is not None:
        encoded = [(one, torch.tensor([tokenizer.encode(one)])) for one in _TEXTS]
        prompts += [_Prompt({"input_ids": ids}, one) for one, ids in encoded if ids.max() < text.vocab_size]
    plain = torch.ones(text.vocab_size, dtype=torch.bool)
    placeholders = [i for i in config.placeholder_ids.values() if i is not None and i < text.vocab_size]
    plain[[*placeholders, *(i for i in source.special_ids if i < text.vocab_size)]] = False
    length = min(_RANDOM_LENGTH, text.max_position_embeddings - _NEW_TOKENS)
    choice = torch.randint(int(plain.sum()), (1, max(length, 1)), generator=generator)
    ids = plain.nonzero()[:, 0][choice]
    prompts.append(_Prompt({"input_ids": ids}))
    if source.kind == "multimodal":
        prompts = [dataclasses.replace(prompt, never=source.special_ids) for prompt in prompts]
    if source.kind == "multimodal" and config.image_connector is not None:
        prompts.append(_picture_prompt(config, ids, generator))
    elif placeholders:
        embeddings = torch.randn(1, max(length, 1), text.hidden_size, generator=generator) * text.initializer_range
        modality_ids = torch.arange(embeddings.shape[1])[None] % len(MODALITIES)
        prompts.append(_Prompt({"inputs_embeds": embeddings, "mm_token_type_ids": modality_ids}))
    return prompts


def _picture_prompt(config: UniMoeConfig, ids: torch.Tensor, generator: torch.Generator) -> _Prompt:
    """A random picture among random tokens, as both classes take it."""
    vision = config.vision_config
    pixels = torch.randn(1, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
    places = torch.full((1, image_features(config)), config.image_token_id)
    return _Prompt(
        {"input_ids": torch.cat((ids[:, :4], places, ids[:, 4:8]), dim=1), "pixel_values": pixels},
        never=(config.image_token_id,),
    )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    if tokenizer is None:
        return
    copy = tokenizer_if_readable(folder)
    if copy is None or any(copy.encode(text) != tokenizer.encode(text) for text in _TEXTS):
        raise ConversionError(
            "The tokenizer does not read back the same in the new folder; its class was taken from the source's model "
            "type. Save it in the source folder with AutoTokenizer...save_pretrained, then convert again."
        )

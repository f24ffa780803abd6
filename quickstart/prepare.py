"""Everything before the multimodal stages: parts, the dense model, tower states, language, the upcycling receipt."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..conversion.upcycling.sparsity import Sparsity
from ..conversion.upcycling.upcycle import upcycle_model
from ..errors import ConversionError
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..processing.processing_unimoe import UniMoeProcessor
from ..starter_corpus.corpus import compose_image, load_samples
from ..trainers.caches.encoder_cache import EncoderCache
from .assemble import assemble_dense, connector_start_scale
from .parts import Part, resolve_part
from .run import Quickstart
from .stages import EXPERTS, EXPERTS_PER_TOKEN, IMAGE_VARIANTS, sparse_layers

UPCYCLING_TOLERANCE = 1e-5


def find_parts(run: Quickstart) -> list[Part]:
    """The parts that the run needs, each from the first source that works."""
    wanted = {"vision-tower": run.vision_tower, "speech-tower": run.speech_tower}
    if run.language_model is not None:
        wanted = {"language-model": run.language_model, **wanted}
    parts = []
    for role, source in wanted.items():
        part = resolve_part(role, None if source == "default" else source)
        run.say(f"{role}: {part.name} ({part.licence}) from {part.source}")
        run.say(f"  sha256 {part.digest}" + (f"; {part.note}" if part.note else ""))
        parts.append(part)
    return parts


def assemble_start(run: Quickstart, parts: list[Part]) -> tuple[UniMoeForCausalLM, UniMoeProcessor]:
    """The dense model before any training; from disk if an earlier attempt made it."""
    folder = run.work / "start"
    if not folder.is_dir():
        by_role = {part.role: part.folder for part in parts}
        assemble_dense(
            folder, by_role.get("language-model"), by_role["vision-tower"], by_role["speech-tower"], run.seed
        )
    model = UniMoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decoder_size = count_parameters(model.model.language_model)
    run.say(f"Dense model: {count_parameters(model):,} parameters, {decoder_size:,} of them in the decoder")
    return model, UniMoeProcessor.from_pretrained(folder)


def encode_media(
    run: Quickstart, model: UniMoeForCausalLM, processor: UniMoeProcessor, heldout: list[dict[str, Any]]
) -> tuple[EncoderCache, EncoderCache]:
    """States of the frozen towers for training and held-out media; training pictures in several compositions.

    The towers run in bfloat16, three times as fast on CPUs that have matrix units for it.
    """
    for tower in model.model.towers():
        tower.to(torch.bfloat16)
    if any(isinstance(module, torch.nn.Conv2d) for module in model.model.vision_tower.modules()):
        model.model.vision_tower.to(memory_format=torch.channels_last)
    folder = run.work / "tower_states"
    pictures: dict[str, Any] = {"variants": {"image": IMAGE_VARIANTS}, "augment": {"image": compose_image}}
    train_cache = EncoderCache(folder, model, processor, dtype="float16", batch_size=32, **pictures)
    test_cache = EncoderCache(folder, model, processor, dtype="float16", batch_size=32)
    run.say("The frozen towers look at and listen to the whole corpus once")
    train_cache.build(run.training_samples())
    test_cache.build(heldout)
    return train_cache, test_cache


def prepare_dense(run: Quickstart, taught: Path, processor: UniMoeProcessor) -> Path:
    """The model that the multimodal stages start from: connectors speak at the volume of words; upcycling is proved."""
    folder = run.work / "dense"
    if not folder.is_dir():
        model = UniMoeForCausalLM.from_pretrained(taught, dtype=torch.float32).eval()
        connector_start_scale(model)
        receipt = prove_upcycling(model, processor)
        (run.work / "upcycling.json").write_text(json.dumps(receipt, indent=1), encoding="utf-8")
        save_whole(model, processor, folder)
    receipt = json.loads((run.work / "upcycling.json").read_text(encoding="utf-8"))
    run.say(
        f"Upcycling receipt: decoder {receipt['dense_parameters']:,} -> {receipt['sparse_parameters']:,} parameters in "
        f"{receipt['experts']} experts, max |logit difference| {receipt['max_abs_logit_difference']:.1e} on "
        f"{receipt['prompts']} prompts (allowed {UPCYCLING_TOLERANCE:.0e})"
    )
    return folder


@torch.no_grad()
def prove_upcycling(dense: UniMoeForCausalLM, processor: UniMoeProcessor) -> dict[str, Any]:
    """Dense to sparse must change no answer: compare every logit on held-out questions.

    The router starts at zero, so that equal experts are averaged with equal weights: uneven ones would round, on logits
    as large as SmolLM2's by more than the bound.

    Raises:
        ConversionError: a logit differs by more than 1e-5.
    """
    sparse = upcycle_model(
        dense,
        Sparsity(
            num_experts=len(EXPERTS),
            num_experts_per_tok=EXPERTS_PER_TOKEN,
            sparse_layers=sparse_layers(dense.config.text_config.num_hidden_layers),
            router_init="zeros",
        ),
    ).eval()
    questions = [sample["messages"] for sample in load_samples("heldout", "text")[::8]]
    batch = processor.apply_chat_template(questions, tokenize=True, return_dict=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    gap = (dense(**inputs).logits - sparse(**inputs).logits)[inputs["attention_mask"].bool()].abs().max().item()
    if not gap <= UPCYCLING_TOLERANCE:
        raise ConversionError(
            f"The sparse model's logits differ from the dense one's by {gap:.2e}; at most {UPCYCLING_TOLERANCE:.0e} is "
            "allowed in float32. This is a bug in the upcycling: please report it with the model's config.json."
        )
    return {
        "max_abs_logit_difference": gap,
        "prompts": len(questions),
        "experts": len(EXPERTS),
        "dense_parameters": count_parameters(dense.model.language_model),
        "sparse_parameters": count_parameters(sparse.model.language_model),
    }


def save_whole(model: UniMoeForCausalLM, processor: UniMoeProcessor, folder: Path) -> None:
    """Save model and processor so that the folder appears only when all of it is written."""
    unfinished = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    unfinished.rename(folder)


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

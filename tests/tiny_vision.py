"""Tiny random vision models of transformers, saved as folders: what adapters load in tests."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMES = ("cat", "dog", "stop sign")
_WORDS = ("<pad>", "a", "cat", "dog", "stop", "sign", ".", "[CLS]", "[SEP]", "[UNK]", "start", "end")
_SIDE = 32


def save_mask2former(folder: Path) -> None:
    """Five classes of its own names."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    backbone = SwinConfig(
        image_size=_SIDE,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        id2label={0: "sky-other-merged", 1: "person", 2: "tree-merged", 3: "car", 4: "grass-merged"},
    )
    model = Mask2FormerForUniversalSegmentation(config)
    # Random queries agree that there is nothing; these do not.
    torch.nn.init.normal_(model.class_predictor.weight, std=1.0)
    torch.nn.init.constant_(model.class_predictor.bias[-1:], -9.0)
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": _SIDE, "width": _SIDE}).save_pretrained(folder)


def save_detr(folder: Path) -> None:
    """A closed vocabulary: cat and dog."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    config = DetrConfig(
        backbone_config=ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
        ),
        d_model=16,
        num_queries=4,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        id2label={0: "cat", 1: "dog"},
    )
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessorPil(size={"shortest_edge": _SIDE, "longest_edge": 2 * _SIDE}).save_pretrained(folder)


def save_owlv2(folder: Path) -> None:
    """An open vocabulary of the OWL family."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(_WORDS), "pad_token_id": 0, "bos_token_id": 10, "eos_token_id": 11}
    config = Owlv2Config(
        text_config={**sizes, **words, "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": _SIDE, "patch_size": 8},
        projection_dim=16,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    images = Owlv2ImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
    Owlv2Processor(image_processor=images, tokenizer=_tokenizer(model_max_length=8)).save_pretrained(folder)


def save_grounding_dino(folder: Path) -> None:
    """An open vocabulary that is read as one prompt."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, GroundingDinoProcessor, SwinConfig
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=_SIDE,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config={
            "model_type": "bert",
            "vocab_size": len(_WORDS),
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=4,
        num_feature_levels=3,
        encoder_n_points=2,
        decoder_n_points=2,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": _SIDE, "longest_edge": 2 * _SIDE})
    tokenizer = _tokenizer(cls_token="[CLS]", sep_token="[SEP]")
    GroundingDinoProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)


def _tokenizer(**options: object) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="<pad>", **options)

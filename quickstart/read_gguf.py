"""GGUF language models, read by transformers' own loader and written as a plain Hugging Face folder."""

from pathlib import Path


def convert_smollm2(unpacked: Path, target: Path) -> None:
    """Write the one `.gguf` file in `unpacked` to `target` as a float32 `LlamaForCausalLM` folder with tokenizer.

    Float32 because the 4-bit values times their float16 scales are not representable in 16 bits.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (path,) = unpacked.glob("*.gguf")
    # Without dequantize=True the weights stay packed: saving them raises, and every forward unpacks them again.
    model = AutoModelForCausalLM.from_pretrained(
        unpacked, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=path.name)
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _split_digits(tokenizer) -> None:
    """SmolLM2 reads every digit as a token of its own; the GGUF loader's generic byte-level splitting forgets that."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )

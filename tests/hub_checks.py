"""What a saved folder does in the hands of transformers alone; run once with unimoe installed and once without it.

This module must not import unimoe. `python hub_checks.py FOLDERS OUT` hides it, checks every folder as remote code and
saves what it saw in OUT; the test does the same in a process that has unimoe and compares.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
EXPERTS = ("eager", "batched_mm", "grouped_mm")
QUESTION = {"type": "text", "text": "What is in the picture?"}


def picture() -> Any:
    import PIL.Image

    return PIL.Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3))


def clip() -> np.ndarray:
    return np.sin(np.arange(8000, dtype=np.float32) / 10) / 3


def chat(*media: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*media, QUESTION]}]


class HideUnimoe:
    """Makes `import unimoe` fail, editable installation or not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "unimoe":
            raise ModuleNotFoundError("No module named 'unimoe'", name="unimoe")


def check_folder(folder: Path, **trust: bool) -> dict[str, Any]:
    """Everything that must not depend on where the code came from."""
    import transformers

    inputs = torch.load(folder.parent / f"{folder.name}.inputs")
    seen: dict[str, Any] = {"config": type(transformers.AutoConfig.from_pretrained(folder, **trust)).__name__}
    for name in AUTO_CLASSES:
        model = getattr(transformers, name).from_pretrained(folder, **trust).eval()
        seen[name] = {"class": type(model).__name__, "attention": model.config.text_config._attn_implementation}
        with torch.no_grad(), experts_that_run(model) as seen[name]["experts"]:
            output = model(**inputs)
        seen[name]["output"] = output[0]
    for implementation in EXPERTS:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, experts_implementation=implementation, **trust
        ).eval()
        with torch.no_grad(), experts_that_run(model) as ran:
            seen[implementation] = {"output": model(**inputs).logits, "experts": ran}
    seen["generated"] = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return seen


def check_processor(folder: Path, **trust: bool) -> dict[str, Any]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, **trust)
    messages = chat({"type": "image", "image": picture()}, {"type": "audio", "audio": clip()})
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    return {"class": type(processor).__name__, **inputs}


def check_pipelines(folder: Path, **trust: bool) -> dict[str, str]:
    """New text of every pipeline, greedy."""
    from packaging.version import Version
    from transformers import __version__, pipeline

    image, audio = {"type": "image", "image": picture()}, {"type": "audio", "audio": clip()}
    options: dict[str, Any] = {"max_new_tokens": 4, "return_full_text": False}
    writer = pipeline("text-generation", model=str(folder), **trust)
    seer = pipeline("image-text-to-text", model=str(folder), **trust)
    outputs = {
        "text-generation": writer("What is", do_sample=False, **options),
        "text-generation chat": writer([{"role": "user", "content": "What?"}], do_sample=False, **options),
        "image-text-to-text": seer(text=chat(image), **options),
        "image-text-to-text prompt": seer(images=picture(), text="<image>What is it?", **options),
    }
    if Version(__version__) >= Version("5.23"):  # 5.17 wants torchvision and librosa for it
        anything = pipeline("any-to-any", model=str(folder), **trust)
        outputs |= {
            "any-to-any text": anything(text=chat(), **options),
            "any-to-any audio": anything(text=chat(audio), **options),
            "any-to-any audio prompt": anything(text="<audio>What is it?", audio=[clip()], **options),
            "any-to-any image": anything(text=chat(image), **options),
        }
    return {name: output[0]["generated_text"] for name, output in outputs.items()}


def check_saved_again(folder: Path, again: Path, **trust: bool) -> dict[str, Any]:
    """Output of the model after a further round of saving and loading, and the files of that round."""
    from transformers import AutoModelForCausalLM, AutoProcessor

    AutoModelForCausalLM.from_pretrained(folder, **trust).save_pretrained(again)
    AutoProcessor.from_pretrained(folder, **trust).save_pretrained(again)
    inputs = torch.load(folder.parent / f"{folder.name}.inputs")
    with torch.no_grad():
        output = AutoModelForCausalLM.from_pretrained(again, **trust).eval()(**inputs).logits
    return {
        "output": output,
        "processor": check_processor(again, **trust),
        "files": sorted(p.name for p in again.iterdir()),
    }


@contextmanager
def experts_that_run(model: torch.nn.Module) -> Iterator[set[str]]:
    """Names of the implementations that the experts' forward passes in the block really went through."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ran: set[str] = set()
    functions = dict(ALL_EXPERTS_FUNCTIONS._global_mapping)
    inside: list[str] = []

    def noting(name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            inside.append(name)
            return functions[name](*args, **kwargs)

        return run

    def after(*_: Any) -> None:
        ran.add(inside.pop() if inside else "eager")

    experts = [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]
    handles = [module.register_forward_hook(after) for module in experts]
    ALL_EXPERTS_FUNCTIONS._global_mapping.update({name: noting(name) for name in functions})
    try:
        yield ran
    finally:
        ALL_EXPERTS_FUNCTIONS._global_mapping.update(functions)
        for handle in handles:
            handle.remove()


def main(folders: Path, out: Path) -> None:
    sys.meta_path.insert(0, HideUnimoe())
    trust = {"trust_remote_code": True}
    seen: dict[str, Any] = {}
    for inputs in sorted(folders.glob("*.inputs")):
        seen[inputs.stem] = check_folder(folders / inputs.stem, **trust)
    full = folders / "everything"
    seen["processor"] = check_processor(full, **trust)
    seen["saved processor"] = check_processor(folders / "saved", **trust)
    seen["pipelines"] = check_pipelines(full, **trust)
    seen["again"] = check_saved_again(full, folders / "again", **trust)
    seen["modules"] = sorted(name for name in sys.modules if name.split(".")[0] == "unimoe")
    torch.save(seen, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""`import unimoe` is light, and whoever uses transformers' Auto classes afterwards finds our classes there."""

import subprocess
import sys

import pytest

import unimoe

CHECK = "import sys; loaded = [m for m in {names!r} if m in sys.modules]; print(loaded)"


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_torch_nor_transformers() -> None:
    heavy = ["torch", "transformers", "numpy", "datasets", "deepspeed", "peft", "accelerate", "av", "soundfile", "PIL"]
    assert run("import unimoe\n" + CHECK.format(names=heavy)) == "[]"


def test_public_names_are_listed_and_the_package_runs() -> None:
    assert {"UniMoeForCausalLM", "UniMoeProcessor", "UniMoeError", "__version__"} <= set(dir(unimoe))
    done = subprocess.run([sys.executable, "-m", "unimoe", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"unimoe {unimoe.__version__}\n"


def test_models_load_no_optional_package() -> None:
    """What the extras install is imported by whoever needs it, not by the model.

    soundfile and soxr are not in the list: transformers' own Whisper imports them where they are installed.
    """
    optional = ["datasets", "deepspeed", "peft", "av", "matplotlib", "gguf", "h5py", "flash_attn", "torchvision"]
    assert run("from unimoe import UniMoeForCausalLM, UniMoeConfig\n" + CHECK.format(names=optional)) == "[]"


# Each imports the Auto machinery in another order; several of these import it half-way through themselves.
FIRST_IMPORTS = [
    "import transformers.models.auto.modeling_auto",
    "import transformers.training_args",
    "from unimoe import UniMoeBeatsConfig",
    "import importlib.util; importlib.util.find_spec('transformers.models.auto.configuration_auto')",
]
# One process imports torch and becomes one child per first import, which saves the tests half a minute.
AUTO_CLASSES_SCRIPT = """
import os, sys, traceback
import torch, numpy
import unimoe
assert "transformers" not in sys.modules

def check():
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers import AutoModelForMultimodalLM
    names = {"unimoe": "UniMoeModel", "unimoe_text": "UniMoeTextModel", "unimoe_beats": "UniMoeBeatsModel"}
    for model_type, name in names.items():
        config_class = type(AutoConfig.for_model(model_type))
        assert config_class is getattr(unimoe, config_class.__name__)
        assert AutoModel._model_mapping[config_class].__name__ == name
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert auto._model_mapping[unimoe.UniMoeConfig].__name__ == "UniMoeForCausalLM"

for first in sys.stdin.read().splitlines():
    child = os.fork()
    if child == 0:
        try:
            exec(first)
            check()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        print(first, flush=True)
"""


def test_auto_classes_know_ours_whatever_is_imported_first() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AUTO_CLASSES_SCRIPT],
        input="\n".join(FIRST_IMPORTS),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == FIRST_IMPORTS, done.stderr


@pytest.mark.parametrize("name", unimoe.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(unimoe, name) is not None


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="NoSuchThing"):
        unimoe.NoSuchThing  # noqa: B018


def test_there_is_one_copy_of_the_package() -> None:
    """pytest must not import the repository's root under the folder's name: its classes would be others."""
    copies = {name for name, module in list(sys.modules.items()) if "register_when_used" in vars(module)}
    assert copies <= {"unimoe", "unimoe.registration"}


def test_lazy_classes_are_the_classes() -> None:
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    assert AutoModel._model_mapping[unimoe.UniMoeConfig].resolve() is unimoe.UniMoeModel
    assert AutoModel._model_mapping[unimoe.UniMoeTextConfig].resolve() is unimoe.UniMoeTextModel
    assert AutoModel._model_mapping[unimoe.UniMoeBeatsConfig].resolve() is unimoe.UniMoeBeatsModel
    assert AutoModelForCausalLM._model_mapping[unimoe.UniMoeConfig].resolve() is unimoe.UniMoeForCausalLM
    assert PROCESSOR_MAPPING[unimoe.UniMoeConfig].resolve() is unimoe.UniMoeProcessor

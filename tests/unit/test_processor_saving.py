"""A processor is saved as one configuration file, and loads again, as remote code too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_media
import torch
from tiny_chat import a_clip, a_video, an_image, chat, user

from unimoe.conversion.publishing.hub import code_files
from unimoe.processing.media_policy_unimoe import PlaceholderError
from unimoe.processing.processing_unimoe import UniMoeProcessor


@pytest.fixture(scope="module")
def processor() -> UniMoeProcessor:
    return tiny_media.processor()


@pytest.mark.parametrize("modalities", ["", "image", "video", "speech", "sound", "image speech"])
def test_any_subset_of_modalities_saves_and_loads(modalities: str, tmp_path: Path) -> None:
    made = tiny_media.processor(modalities)
    made.save_pretrained(tmp_path)
    again = UniMoeProcessor.from_pretrained(tmp_path)
    assert again.get_attributes() == made.get_attributes()
    assert again.to_dict() == made.to_dict()
    items = {"image": an_image(), "video": a_video(), "speech": a_clip(), "sound": a_clip()}
    given = [*[item for name, item in items.items() if name in modalities][:2], "What?"]
    first, second = (chat(p, [user(*given)]) for p in (made, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, item in items.items():
        if name not in modalities and not (
            name in ("speech", "sound") and {"speech", "sound"} & set(modalities.split())
        ):
            with pytest.raises(PlaceholderError, match="takes no"):
                chat(made, [user(item)])


def test_saved_as_one_configuration_file(processor: UniMoeProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    expected = {"processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    code = {path.name for path in code_files() if path.parent.name == "processing"}
    assert {path.name for path in tmp_path.iterdir()} == expected | code
    assert "auto_map" not in processor.to_dict()
    assert "auto_map" not in processor.image_processor.to_dict()


REMOTE = """
import sys
sys.modules["unimoe"] = None  # importing it now fails, as where it is not installed
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
import numpy as np
assert type(processor).__module__.startswith("transformers_modules"), type(processor)
messages = [{"role": "user", "content": [
    {"type": "image", "image": np.zeros((9, 9, 3), np.uint8)},
    {"type": "video", "video": np.zeros((3, 9, 9, 3), np.uint8)},
    {"type": "audio", "audio": np.ones(100, np.float32) / 2},
    {"type": "text", "text": "<image>"}]}]
output = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
print(*(f"{name}={tuple(value.shape)}" for name, value in sorted(output.items())), sep=" ")
processor.save_pretrained(sys.argv[2])
AutoProcessor.from_pretrained(sys.argv[2], trust_remote_code=True)
"""


def test_loads_as_remote_code_where_unimoe_is_absent(tmp_path: Path) -> None:
    processor = tiny_media.processor()

    class Exported(UniMoeProcessor):
        """Registered for export without marking the class that other tests use."""

    Exported.__name__, Exported.__module__ = UniMoeProcessor.__name__, UniMoeProcessor.__module__
    Exported.register_for_auto_class()
    exported = Exported(
        **{name: getattr(processor, name) for name in processor.get_attributes()},
        image_tokens=4,
        video_tokens=5,
        speech_tokens=3,
        sound_tokens=2,
    )
    exported.save_pretrained(tmp_path / "model")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "model"), str(tmp_path / "again")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "pixel_values=(1, 3, 16, 16) pixel_values_videos=(1, 2, 3, 16, 16) speech_features=(1, 80, 100)" in done.stdout
    )

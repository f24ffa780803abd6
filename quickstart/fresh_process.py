"""The proof that a folder stands on its own: it answers in a process in which `unimoe` cannot be imported."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import ConversionError
from .evaluate import MAX_ANSWER_TOKENS

_SCRIPT = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "unimoe":
            raise ImportError("unimoe is hidden from this process")

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

folder, max_new_tokens, questions = sys.argv[1], int(sys.argv[2]), json.loads(sys.stdin.read())
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
answers = []
for messages in questions:
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answers.append(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
print(json.dumps(answers))
"""


def answer_in_fresh_process(folder: Path, examples: list[dict[str, Any]]) -> list[str]:
    """Answers of the saved model to each example's `messages`, from raw media files through the folder's own code.

    Raises:
        ConversionError: the folder does not load or answer; the message holds the last line of the other process.
    """
    questions = [example["messages"][:-1] for example in examples]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(folder.resolve()), str(MAX_ANSWER_TOKENS)],
            input=json.dumps(questions),
            capture_output=True,
            text=True,
            cwd=elsewhere,
            check=False,
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConversionError(f"{folder} does not answer in a process without unimoe: {last}")
    return json.loads(done.stdout.splitlines()[-1])

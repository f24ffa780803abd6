"""Gate rows that need the dense model to read texts: which texts, and when it is run."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ...progress_bars import transformers_bars
from ..checkpoints.parameters import count_parameters, total_and_active
from ..dense.sources import Source, load_dense
from ..dense.tokenizer_files import tokenizer_if_readable
from .router_init import DATA_INITS, data_router_rows, ffn_inputs, initial_router_rows
from .sparsity import Sparsity

_LONGEST = 512  # tokens of one text that are read
_BYTES_PER_PARAMETER = 4 * 1.25  # float32, and what running takes
# Read where the user gives no texts for clusters: different subjects and kinds of text.
_TEXTS = (
    "The river rises in the mountains and reaches the sea after nine hundred kilometres.",
    "In 1815 the powers of Europe met in Vienna to redraw the map of the continent.",
    "A cell divides in two after it has copied its chromosomes.",
    "Water boils at a lower temperature on a high mountain because the air presses less on it.",
    "If 3x + 5 = 20, then 3x = 15 and x = 5.",
    "Let n be an even number. Then n = 2k for some integer k, and n squared is 4 times k squared.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "for (int i = 0; i < n; i++) {\n    total += prices[i] * counts[i];\n}\n",
    "SELECT name, COUNT(*) FROM orders GROUP BY name HAVING COUNT(*) > 3;",
    '{"id": 17, "name": "lamp", "tags": ["home", "light"], "price": 24.9}',
    "Question: How many legs does a spider have? Answer: A spider has eight legs.",
    "User: Could you shorten this letter for me?\nAssistant: Of course. Which parts matter most to you?",
    "Dear Ms Keller, thank you for your letter of 3 May. We will send the missing parts this week.",
    "She closed the door, listened for a moment, and smiled. Nobody had followed her.",
    "The leaves fall, / the lamp burns low, / and nobody comes / along the road.",
    "Cut the onions, fry them gently in butter for ten minutes, then add the rice and stir.",
    "The court finds that the contract was void, because one party had been misled about its object.",
    "Take one tablet in the morning and one at night, and see a doctor if the pain does not ease.",
    "The home team scored twice in the last five minutes and won the cup for the third time.",
    "Shares fell by four percent after the company lowered its forecast for the year.",
    "Le train pour Lyon part à huit heures et arrive avant midi.",
    "Der Hund schläft unter dem Tisch, und draußen regnet es seit Stunden.",
    "El mercado abre temprano y las calles huelen a pan recién hecho.",
    "今天天气很好 我们一起去公园散步吧。",
)


@dataclass(frozen=True)
class Prompts:
    """Texts, and for the router initialisation "prompts" the copy of the dense FFN that each was given for."""

    texts: tuple[str, ...]
    owners: tuple[int, ...] | None = None


class RouterRows:
    """The gate rows of every sparse layer. Where they need hidden states the model is run when they are first asked for.

    Raises:
        ConversionError: the texts do not fit the way, or the source has no tokenizer to read them with.
    """

    def __init__(
        self, source: Source, config: UniMoeTextConfig, sparsity: Sparsity, prompts: str | Path | None = None
    ) -> None:
        self._source, self._config, self._sparsity = source, config, sparsity
        self._rows: dict[int, torch.Tensor] = {}
        self._prompts: Prompts | None = None
        if sparsity.router_init in DATA_INITS:
            self._prompts = read_prompts(prompts, sparsity)
            tokenizer = tokenizer_if_readable(source.folder)
            if tokenizer is None:
                raise ConversionError(
                    f"--router-init {sparsity.router_init} reads texts, but {source.name} has no tokenizer that can be "
                    "loaded here. Add its files to the folder, or use another way."
                )
            self._encode: Callable[[str], list[int]] = tokenizer.encode
        elif prompts is not None:
            raise ConversionError(f"--router-init {sparsity.router_init} reads no prompts: leave them out.")

    def of(self, layer: int) -> torch.Tensor:
        """Gate rows [R, H] of a layer, float32."""
        if self._prompts is None:
            return initial_router_rows(self._config, self._sparsity, layer)
        self.prepare()
        return self._rows[layer]

    def prepare(self, progress: bool = False) -> None:
        """Read the texts now, if there are any and it has not been done."""
        if self._prompts is None or self._rows:
            return
        needed = total_and_active(count_parameters(self._source.config)).total * _BYTES_PER_PARAMETER
        if needed > psutil.virtual_memory().available:
            raise ConversionError(
                f"--router-init {self._sparsity.router_init} runs the dense model, which takes about "
                f"{needed / 1e9:.1f} GB of memory; {psutil.virtual_memory().available / 1e9:.1f} GB are free. "
                "Use normal or zeros here."
            )
        with transformers_bars(shown=False):
            model = load_dense(self._source)
        texts = [self._ids(text) for text in self._prompts.texts]
        shown = tqdm(texts, desc="Reading prompts", unit="text", disable=not progress)
        states = ffn_inputs(model, self._sparsity.sparse_layers, shown)
        self._rows = data_router_rows(states, self._prompts.owners, self._config, self._sparsity)

    def _ids(self, text: str) -> torch.Tensor:
        ids = torch.tensor([self._encode(text)[:_LONGEST]], dtype=torch.long)
        if ids.shape[1] < 2 or int(ids.max()) >= self._config.vocab_size:
            raise ConversionError(
                f"The tokenizer makes nothing that can be read of the prompt {text[:60]!r}: change it."
            )
        return ids


def read_prompts(path: str | Path | None, sparsity: Sparsity) -> Prompts:
    """The texts of a file, or those at hand for "cluster".

    A file of prompts is a JSON object {"0": ["text", ...], "1": [...], ...} with texts for every expert (with virtual
    groups, for every copy of the dense FFN); one for clusters may also be plain text with a prompt per line.

    Raises:
        ConversionError: the file cannot be read, or lacks an expert.
    """
    by_expert = sparsity.router_init == "prompts"
    if path is None:
        if by_expert:
            raise ConversionError('--router-init prompts needs --prompts FILE: {"0": ["text", ...], "1": [...], ...}.')
        return Prompts(_TEXTS)
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"--prompts {str(path)!r} cannot be read ({error}).") from error
    if not by_expert and not content.lstrip().startswith("{"):
        texts = tuple(line for line in content.splitlines() if line.strip())
        if not texts:
            raise ConversionError(f"--prompts {str(path)!r} is empty: write one text per line.")
        return Prompts(texts)
    try:
        groups: Any = json.loads(content)
    except json.JSONDecodeError as error:
        raise ConversionError(f"--prompts {str(path)!r} is not JSON ({error}).") from error
    wanted = [str(index) for index in range(sparsity.num_copies)]
    if not isinstance(groups, dict) or (by_expert and sorted(groups) != sorted(wanted)):
        raise ConversionError(
            f"--prompts {str(path)!r} must be an object with the keys {', '.join(wanted)}, no others."
        )
    for name, texts_of in groups.items():
        if not isinstance(texts_of, list) or not texts_of or not all(isinstance(text, str) for text in texts_of):
            raise ConversionError(f"--prompts {str(path)!r}: {name!r} needs a list of texts.")
    texts = tuple(text for key in sorted(groups) for text in groups[key])
    owners = tuple(int(key) for key in sorted(groups) for _ in groups[key]) if by_expert else None
    return Prompts(texts, owners)


__all__ = ["Prompts", "RouterRows", "read_prompts"]

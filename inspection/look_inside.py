"""A whole inspection: weights, data, another model to compare with; and the page and figures that it leaves."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..conversion.checkpoints.expert_names import numbered
from ..conversion.checkpoints.our_folder import read_our_config
from ..conversion.dense.sources import resolve_model_folder
from ..errors import ConfigurationError, UniMoeError
from ..modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..trainers.data.conversations import ConversationDataset
from ..trainers.saving.checkpoints import write_durably
from .expert_weights import expert_distances
from .favourites import favourite_words
from .findings import change_findings, usage_findings, weight_findings
from .model_description import describe_model
from .model_page import write_model_page
from .usage import Usage, chosen_samples, measure_usage
from .weight_changes import shared_tensors, unmatched_text, weight_changes

FACTS_FILE = "inspect.json"


@dataclass(frozen=True)
class Request:
    """What to look at.

    Args:
        model, compare: folders or Hub ids; `compare` is the earlier one.
        data: data files; without any only weights are looked at.
        limit, batch_size: see `measure_usage`.
        device: None takes cuda if there is one.
        quantize: run with weights in "int8" or "int4"; distances and changes are still those of the folder's weights.
        progress: show progress bars.
    """

    model: str
    data: list[str]
    media_root: str | None = None
    compare: str | None = None
    limit: int | None = None
    batch_size: int = 8
    device: str | None = None
    quantize: str | None = None
    progress: bool = True


def look_inside(request: Request, out: str | Path) -> tuple[dict[str, Any], Path]:
    """Inspect; returns the figures and the page, both of which are in `out` then.

    Raises:
        ConversionError, CheckpointError: a model is not there, damaged, or not one of ours.
        ConfigurationError: the model has no experts to look at.
        DataError: the data are missing or unreadable.
    """
    out = Path(out)
    folder = resolve_model_folder(request.model)
    config = read_our_config(folder).text_config
    if request.data and not config.sparse_layers:
        raise ConfigurationError(
            f"{request.model} has no sparse layers, so data cannot show what its experts do. Upcycle it first, or leave "
            "--data out to compare weights."
        )
    dataset = ConversationDataset(request.data, request.media_root, max_missing=1.0) if request.data else None
    _make_folder(out)
    description = describe_model(request.model)
    load = description.router_load
    facts: dict[str, Any] = {
        "model": request.model,
        "data": list(request.data),
        "layers": sorted(config.sparse_layers),
        "experts": numbered(config.num_experts, load.experts if load else []),
        **weight_findings(expert_distances(folder, config)),
    }
    usage = None
    if dataset is not None:
        usage, tokenizer = _use(request, request.model, dataset)
        facts |= usage_findings(config, usage, favourite_words(usage, tokenizer))
    if request.compare is not None:
        facts |= _comparison(request, folder, config, dataset, usage)
    write_durably(out / FACTS_FILE, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return facts, write_model_page(out, facts, usage.passages if usage else ())


def _comparison(
    request: Request,
    folder: Path,
    config: UniMoeTextConfig,
    dataset: ConversationDataset | None,
    usage: Usage | None,
) -> dict[str, Any]:
    other = resolve_model_folder(str(request.compare))
    other_config = read_our_config(other).text_config
    with _bar("Comparing weights", shared_tensors(other, folder), request.progress) as step:
        changes = weight_changes(other, folder, lambda: step(1))
    facts: dict[str, Any] = {
        "compared_with": request.compare,
        "weights": {**changes.to_dict(), "unmatched": unmatched_text(changes)},
    }
    if dataset is None or usage is None:
        return facts
    same = (other_config.sparse_layers, other_config.num_experts) == (config.sparse_layers, config.num_experts)
    if not same:
        facts["weights"]["unmatched"].append(
            "the two have other sparse layers or numbers of experts, so their loads are not compared"
        )
        return facts
    before, _ = _use(request, str(request.compare), dataset)
    return facts | change_findings(config, before, usage)


def _use(request: Request, name: str, dataset: ConversationDataset) -> tuple[Usage, Any]:
    """Run the data through a model, which is gone afterwards."""
    from ..model_opener import open_model

    processor, model = open_model(name, request.device, request.quantize)
    total = len(chosen_samples(dataset.samples, request.limit))
    with _bar(f"Running {Path(name).name}", total, request.progress) as step:
        usage = measure_usage(model, processor, dataset, request.batch_size, request.limit, step)
    return usage, processor.tokenizer


@contextmanager
def _bar(title: str, total: int, shown: bool) -> Iterator[Callable[[int], Any]]:
    with tqdm(total=total, desc=title, disable=not shown) as bar:
        yield bar.update


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UniMoeError(f"The folder {out} cannot be made ({error.strerror}): choose another --out.") from error

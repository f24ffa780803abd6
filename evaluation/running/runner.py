"""A run: tasks, a model, a folder of results; any number of processes, and any number of attempts."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, DataError
from ..tasks.item import Item
from ..tasks.task import Task
from .answerers import fingerprint, open_answerer, require_kinds
from .batches import BatchAnswerer
from .predictions import PredictionStore
from .requests import Request, make_requests, spread

SETTINGS_FILE = "run.json"
PREDICTIONS = "predictions"


@dataclass(frozen=True)
class Options:
    """Who is asked, and how.

    Args:
        model: folder or Hub id.
        prompts: whose wording and answer lengths: "unimoe", "moiie" or "moai".
        limit: about so many items of each task, evenly spread.
        max_new_tokens: longest answer, in place of each task's.
        likeliest_letter: where there are options, do not generate, see `BatchAnswerer`.
        quantize: hold the weights in "int8" or "int4".
    """

    model: str
    prompts: str = "unimoe"
    limit: int | None = None
    max_new_tokens: int | None = None
    likeliest_letter: bool = False
    quantize: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """What makes the predictions of a run; `--resume` goes on only with the same."""

    model_fingerprint: str
    items: dict[str, str]  # task -> digest of its prompts

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")


@dataclass
class PlannedTask:
    """A task of a run: its items, what is asked, and how much of it is done."""

    task: Task
    items: list[Item]
    requests: list[Request]
    done: set[Any]

    @property
    def missing(self) -> int:
        """Items that lack media."""
        return sum(bool(request.missing) for request in self.requests)

    @property
    def waiting(self) -> list[Request]:
        """What is left to ask."""
        return [request for request in self.requests if request.id not in self.done]


def plan_run(tasks: Sequence[Task], data: Path, out: Path, options: Options) -> list[PlannedTask]:
    """Read the official files and earlier predictions; no model is loaded.

    Raises:
        DataError: files are missing or unreadable, ids are not unique, or not a single item of a task has its media.
    """
    planned = []
    for task in tasks:
        items = spread(task.items(data), options.limit)
        if len({item.id for item in items}) != len(items):
            raise DataError(f"{task.name}: several questions have the same id; check the official files.")
        requests = make_requests(task, items, data, options.prompts)
        if not items or all(request.missing for request in requests):
            example = next((request.missing[0] for request in requests if request.missing), "nothing")
            where = f"{data / task.name / 'images'} or {data / 'images'}"
            raise DataError(
                f"{task.name}: none of {len(items)} items has its media, e.g. {example}; put them in {where}. "
                f"{task.media_source}".strip()
            )
        done = {
            key
            for key, record in PredictionStore(out / PREDICTIONS, task.name).read().items()
            if "error" not in record
        }
        planned.append(PlannedTask(task, items, requests, done))
    return planned


def settings_of(planned: Sequence[PlannedTask], options: Options) -> Settings:
    """The settings of a planned run."""
    digests = {}
    for plan in planned:
        digest = hashlib.sha256()
        for request in plan.requests:
            digest.update(json.dumps([request.id, request.text], ensure_ascii=False).encode("utf-8", "surrogatepass"))
        digests[plan.task.name] = digest.hexdigest()[:16]
    return Settings(**asdict(options), model_fingerprint=fingerprint(options.model), items=digests)


def check_settings(settings: Settings, out: Path, resume: bool) -> Settings:
    """What to save: the settings, with the tasks of an earlier attempt that this one does not ask for.

    Raises:
        CheckpointError: there is an earlier run that is not to be resumed, or that was another one.
    """
    file = out / SETTINGS_FILE
    if not file.is_file():
        return settings
    if not resume:
        raise CheckpointError(f"{out} holds a run already: add --resume to go on with it, or give another --out.")
    try:
        earlier = {"quantize": None, **json.loads(file.read_text(encoding="utf-8"))}
        changed = [
            f"{name} was {earlier[name]!r} and is {getattr(settings, name)!r}"
            for name in ("model_fingerprint", "prompts", "limit", "max_new_tokens", "likeliest_letter", "quantize")
            if earlier[name] != getattr(settings, name)
        ]
        changed += [
            f"the questions of {t} changed" for t, d in settings.items.items() if earlier["items"].get(t, d) != d
        ]
        items = {**earlier["items"], **settings.items}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): give another --out.") from error
    if changed:
        raise CheckpointError(f"{out} holds another run ({'; '.join(changed)}): give another --out.")
    return replace(settings, items=items)


class Processes:
    """The processes that share a run: of `accelerate launch` or torchrun, else this one."""

    def __init__(self, device: str | None = None) -> None:
        from accelerate import PartialState

        # One process may be done hours before another.
        self._state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
        self.device = self._state.device if device in (None, "cpu") or self.count > 1 else device

    @property
    def rank(self) -> int:
        return self._state.process_index

    @property
    def count(self) -> int:
        return self._state.num_processes

    def wait(self) -> None:
        """Until all processes are here."""
        self._state.wait_for_everyone()


def answer_all(
    planned: Sequence[PlannedTask],
    options: Options,
    out: Path,
    processes: Processes,
    batch_size: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Ask everything that is not answered yet, each process its share.

    Args:
        batch_size: items at a time; None finds it.
        progress: called with the number of items that have just been answered by this process.

    Raises:
        ConversionError, CheckpointError: the model cannot be loaded.
        DataError: it lacks a sense that a task needs.
    """
    processes.wait()  # all have planned before the first of them writes, so that all share out the same items
    if any(plan.waiting for plan in planned):
        answerer = open_answerer(options.model, processes.device, options.quantize)
        for plan in planned:
            require_kinds(answerer, plan.task.name, plan.waiting)
        batches = BatchAnswerer(answerer, batch_size, "cuda" in str(processes.device), options.likeliest_letter)
        for plan in planned:
            store = PredictionStore(out / PREDICTIONS, plan.task.name)

            def keep(predictions: list[Any], store: PredictionStore = store) -> None:
                store.append(predictions, processes.rank)
                progress(len(predictions))

            share = sorted(plan.waiting, key=lambda request: len(request.text))[processes.rank :: processes.count]
            batches.run(share, options.max_new_tokens or plan.task.longest_answer(options.prompts), keep)
    processes.wait()

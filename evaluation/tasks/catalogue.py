"""All tasks by name."""

from collections.abc import Iterable
from difflib import get_close_matches

from ...errors import DataError
from .catalogue_letters import LETTER_TASKS
from .catalogue_short_answers import SHORT_ANSWER_TASKS
from .catalogue_sound_video import SOUND_AND_VIDEO_TASKS
from .prompts import SYSTEMS
from .starter import STARTER_TASKS
from .task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (*STARTER_TASKS, *SHORT_ANSWER_TASKS, *LETTER_TASKS, *SOUND_AND_VIDEO_TASKS)
}
# Names that stand for several tasks.
GROUPS: dict[str, tuple[str, ...]] = {
    "starter": tuple(task.name for task in STARTER_TASKS),
    **{system: tuple(name for name, task in TASKS.items() if system in task.systems) for system in SYSTEMS},
}


def find_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks of these names and groups, each once, in order.

    Raises:
        DataError: a name is unknown.
    """
    chosen: dict[str, Task] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS:
            likely = get_close_matches(name, [*TASKS, *GROUPS], 1)
            hint = f" Did you mean {likely[0]}?" if likely else ""
            raise DataError(f"There is no task {name!r}.{hint} `unimoe evaluate --list` shows all of them.")
        chosen |= {one: TASKS[one] for one in GROUPS.get(name, (name,))}
    return list(chosen.values())

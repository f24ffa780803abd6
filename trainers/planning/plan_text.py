"""A run's plan as text for people."""

from ..recipe.recipe import Recipe
from ..steps.trainable import format_trainable_table
from .memory_plan import KINDS, MemoryPlan
from .plan_data import DataSetHeader, GroupEstimate
from .run_plan import RunPlan, StagePlan

_SHOWN_FAULTS = 2
# Python, PyTorch and transformers without a model: measured 0.4 to 0.5 GB on Linux, CPU build.
_LIBRARIES = 0.5e9
_HOW_TO_MEASURE = """\
  for the time: start the training, stop it with Ctrl-C when a stage has shown a loss, and ask for the plan again: it
    reckons from these steps (for a trial, with another --out, the same both times); or give --tokens-per-second N"""


def format_plan(recipe: Recipe, plan: RunPlan) -> str:
    """The whole plan; of stages whose model is not there yet only what the recipe says."""
    lines = [f"From {recipe.model} to {recipe.out}, seed {recipe.seed}:"]
    lines += [f"  {_header(header)}" for header in plan.headers.values() if header is not None]
    lines += ["  data of the Hub are not looked at for a plan"] if None in plan.headers.values() else []
    known = {stage.row.name: stage for stage in plan.stages}
    for row in plan.rows:
        limit = "" if row.seconds is None else f", at most {row.seconds:.0f} s"
        lines.append(f"  {row.name}: {row.what}; {row.steps} steps of {row.batch_size} samples{limit}")
        if row.name in known:
            lines += [f"    {line}" for line in _stage(known[row.name], plan)]
    lines += [f"  not there yet: {file}" for file in plan.missing]
    if any(stage.seconds is None for stage in plan.stages):
        lines.append(_HOW_TO_MEASURE)
    return "\n".join(lines)


def format_size(size: float) -> str:
    """Bytes in the unit that fits: powers of 1000, as memory plans add them up."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.0f} TB"


def format_duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _header(header: DataSetHeader) -> str:
    about = "" if header.exact else "about "
    count = "an unknown number of" if header.count is None else f"{about}{header.count:,.0f}"
    weight = "" if header.entry.weight is None else f", weight {header.entry.weight:g}"
    streamed = ", streamed" if header.entry.streaming else ""
    return f"{header.entry.name}: {count} samples{weight}{streamed}"


def _stage(stage: StagePlan, plan: RunPlan) -> list[str]:
    lines = format_trainable_table(stage.model.table).splitlines()
    if stage.model.name != stage.row.name:
        lines.insert(0, f"of its runs {stage.model.name} trains most:")
    for group in stage.groups:
        lines.append(_group(group))
        lines += [f"  left out: {fault}" for fault in group.faults[:_SHOWN_FAULTS]]
    if stage.batches is None:
        return [*lines, "tokens, memory and time: unknown, because no sample was there to look at"]
    batches = stage.batches
    passes = "" if batches.passes is None else f", {batches.passes:.2g} passes over its data"
    lines.append(
        f"tokens: about {batches.tokens_per_step:,.0f} a step, {batches.tokens_per_step * stage.row.steps:,.0f} in all{passes}"
    )
    lines += _memory(batches.memory, f"{batches.rows} rows of {batches.row_length} tokens ({batches.group})", plan)
    if stage.seconds is None:
        return [*lines, "time: unknown, because no speed was measured"]
    return [*lines, f"time: about {format_duration(stage.seconds)} ({stage.speed})"]


def _group(group: GroupEstimate) -> str:
    media = "".join(f", {count:.2g} {kind}" for kind, count in group.media.items())
    return (
        f"{group.names[0]}: {group.share:.1%} of the samples, {group.tokens:.0f} tokens each, {group.longest} at most"
        f"{media} (of {group.looked_at} looked at{'; clips count one window each' if 'audio' in group.media else ''})"
    )


def _memory(memory: MemoryPlan, shape: str, plan: RunPlan) -> list[str]:
    parts = ", ".join(f"{kind} {format_size(memory.bytes_of[kind])}" for kind in KINDS if memory.bytes_of[kind])
    degrees = plan.degrees
    ranks = (
        ""
        if degrees.ranks == 1
        else (
            f" on each of {degrees.ranks} ranks (data {degrees.data}, expert {degrees.expert}, tensor {degrees.tensor}, "
            f"zero {degrees.zero})"
        )
    )
    return [
        f"memory{ranks}: about {format_size(memory.total)}, beside {format_size(_LIBRARIES)} of libraries, at {shape}",
        f"  {parts}",
    ]

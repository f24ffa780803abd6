"""`unimoe evaluate`: scores of a model on benchmarks, with intervals; comparisons of two such runs."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UniMoeError
from ..model_folder import require_model
from ._argument_types import add_quantize

if TYPE_CHECKING:
    from ..evaluation.running.runner import PlannedTask

_DESCRIPTION = """\
Ask a model every question of benchmarks and score the answers as the benchmarks' own scorers do. Works on models of ours
and, for text, on any causal language model. Files and media of benchmarks are not downloaded: put them into DATA/TASK
or DATA (pictures into DATA/TASK/images or DATA/images); the message about a missing one says where it comes from."""
_EPILOG = """\
examples:
  unimoe evaluate quickstart-out/model --tasks starter --out eval
  unimoe evaluate MODEL --tasks textvqa,pope --data benchmarks --out eval --limit 100
  unimoe evaluate MODEL --tasks moiie --data benchmarks --out eval --resume
  accelerate launch -m unimoe evaluate MODEL --tasks gqa --data benchmarks --out eval
  unimoe evaluate MODEL --tasks mmvet --data benchmarks --out eval --judge http://127.0.0.1:8000/v1 --judge-model NAME
  unimoe evaluate --compare eval-before eval-after
  unimoe evaluate --list

results in OUT: report.html, report.md, results.json, predictions/, scores/, submissions/ (for servers), plots/"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="score a model on benchmarks, compare two runs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--tasks", metavar="A,B", help="names of tasks or of groups, see --list")
    parser.add_argument(
        "--data", metavar="DIR", default=".", help="where official files and media are (default: here)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the results")
    parser.add_argument("--limit", type=int, metavar="N", help="about N items of each task, evenly spread")
    parser.add_argument("--batch-size", default="auto", metavar="N", help="items at a time (default: auto)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: each task's, of the system in --prompts)",
    )
    parser.add_argument(
        "--likeliest-letter",
        action="store_true",
        help="where there are options, take the likeliest letter, do not generate (for models that write no letters)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    parser.add_argument(
        "--prompts",
        choices=("unimoe", "moiie", "moai"),
        default="unimoe",
        help="whose wording and answer lengths (default: unimoe)",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add_quantize(parser)
    parser.add_argument("--judge", metavar="URL", help="OpenAI-compatible endpoint that grades free answers")
    parser.add_argument("--judge-model", metavar="NAME", help="the judge's model name")
    parser.add_argument(
        "--judge-key-env", metavar="VAR", default="OPENAI_API_KEY", help="environment variable with the judge's key"
    )
    parser.add_argument("--plan", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--list", action="store_true", help="list the tasks and stop")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="compare the results in two folders and stop")


def run(args: argparse.Namespace) -> int:
    """Evaluate, compare, or list."""
    if args.list:
        print(_task_list())
        return 0
    if args.compare:
        return _compare(*map(Path, args.compare))
    return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    from ..evaluation.tasks.catalogue import find_tasks

    batch_size = _check(args)
    tasks = find_tasks(filter(None, args.tasks.split(",")))
    if not args.plan:
        require_model(args.model, others=True)
    from ..evaluation.reporting.report import write_report
    from ..evaluation.results import score_run
    from ..evaluation.running import runner

    data, out = Path(args.data).expanduser(), Path(args.out).expanduser()
    options = runner.Options(
        args.model, args.prompts, args.limit, args.max_new_tokens, args.likeliest_letter, args.quantize
    )
    planned = runner.plan_run(tasks, data, out, options)
    settings = runner.check_settings(runner.settings_of(planned, options), out, args.resume)
    processes = runner.Processes(args.device)
    is_main = processes.rank == 0
    if is_main:
        _print_plan(planned, args, processes)
    if args.plan:
        return 0
    ask = _judge(args)
    if is_main:
        settings.save(out)
    with _Bar(sum(len(plan.waiting) for plan in planned), processes.count, is_main) as bar:
        runner.answer_all(planned, options, out, processes, batch_size, bar)
    if is_main:
        results = score_run(planned, out, ask)
        pages = write_report(results, args.model, out)
        _print_results(results, pages)
        _print_failures(planned, out)
    return 0


def _check(args: argparse.Namespace) -> int | None:
    """The batch size, None for auto. Raises UniMoeError for what cannot be done."""
    for name in ("model", "tasks", "out"):
        if not getattr(args, name):
            option = name.upper() if name == "model" else f"--{name}"
            raise UniMoeError(f"{option} is missing; `unimoe evaluate --help` shows examples.")
    for name in ("limit", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UniMoeError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if args.judge and not args.judge_model:
        raise UniMoeError("--judge needs --judge-model, the name of the model that is to grade.")
    if args.batch_size == "auto":
        return None
    if not args.batch_size.isdecimal() or int(args.batch_size) < 1:
        raise UniMoeError(f"--batch-size is {args.batch_size!r}; it must be auto or a number from 1.")
    return int(args.batch_size)


def _judge(args: argparse.Namespace) -> Callable[[str], str] | None:
    from ..evaluation.judge import Endpoint

    if not args.judge:
        return None
    return Endpoint(args.judge, args.judge_model, os.environ.get(args.judge_key_env, "")).ask


def _print_plan(planned: "list[PlannedTask]", args: argparse.Namespace, processes: Any) -> None:
    from ..evaluation.reporting.table import text_table

    several = f", {processes.count} processes" if processes.count > 1 else ""
    print(f"{args.model} on {processes.device}{several}, prompts of {args.prompts}, results in {args.out}")
    rows = [["task", "split", "items", "done", "media missing", "longest answer", "scored by"]]
    for plan in planned:
        task = plan.task
        answer = f"{args.max_new_tokens or task.longest_answer(args.prompts)} tokens"
        judged = task.scored_by if task.scored_by != "judge" or args.judge else "judge (none given with --judge)"
        numbers = [len(plan.items), len(plan.items) - len(plan.waiting), plan.missing]
        rows.append([task.name, task.split, *map(str, numbers), answer, judged])
    print(text_table(rows), flush=True)
    for plan in planned:
        if plan.missing:
            example = next(request.missing[0] for request in plan.requests if request.missing)
            print(f"{plan.task.name}: {plan.missing} items lack media, e.g. {example}. {plan.task.media_source}")


def _print_results(results: list[Any], pages: list[Path]) -> None:
    from ..evaluation.noise.modality_bias import modality_bias
    from ..evaluation.reporting.report import bias_sentence
    from ..evaluation.reporting.table import HEADER, few_items_note, table_rows, text_table

    print(f"\n{text_table([HEADER, *table_rows(results)])}")
    if few := few_items_note(results):
        print(f"\n{few}")
    bias = modality_bias(results)
    if bias is not None:
        print(f"\n{bias_sentence(bias)}")
    print(f"\nReport: {pages[1]}")


def _print_failures(planned: "list[PlannedTask]", out: Path) -> None:
    """Of each task the first item that could not be answered, beside those that lack media, which the plan named."""
    from ..evaluation.running.predictions import PredictionStore
    from ..evaluation.running.runner import PREDICTIONS

    for plan in planned:
        answers = PredictionStore(out / PREDICTIONS, plan.task.name).read()
        failed = {
            request.id: answers[request.id]["error"]
            for request in plan.requests
            if not request.missing and "error" in answers.get(request.id, {})
        }
        for key, error in list(failed.items())[:1]:
            print(f"{plan.task.name}: {len(failed)} items could not be answered, e.g. {key}: {error}")


def _compare(first: Path, second: Path) -> int:
    from ..evaluation.compare_runs import compare_runs, comparison_rows
    from ..evaluation.reporting.table import text_table

    comparisons = compare_runs(first, second)
    print(f"{second} against {first}, on the items that both answered (paired bootstrap):")
    print(text_table(comparison_rows(comparisons)))
    if len(comparisons) > 1:
        print(f"Of {len(comparisons)} tasks, one in twenty differs beyond noise by chance alone.")
    return 0


def _task_list() -> str:
    from ..evaluation.reporting.table import text_table
    from ..evaluation.tasks.catalogue import GROUPS, TASKS

    rows = [["task", "benchmark", "modality", "split", "scored by", "official files"]]
    for task in TASKS.values():
        files = ", ".join(names[0] for names in task.files.values()) or "in the package"
        rows.append([task.name, task.title, task.modality, task.split, task.scored_by, files])
    groups = "\n".join(f"{name}: {', '.join(members)}" for name, members in GROUPS.items())
    return f"{text_table(rows)}\n\ngroups:\n{groups}"


class _Bar:
    """A progress bar over the items of all processes, moved by the first of them."""

    def __init__(self, total: int, processes: int, shown: bool) -> None:
        from tqdm import tqdm

        self._processes, self._left = processes, total
        self._bar = tqdm(total=total, unit="item", disable=not shown or not total, smoothing=0.1)

    def __call__(self, count: int) -> None:
        step = min(count * self._processes, self._left)
        self._left -= step
        self._bar.update(step)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

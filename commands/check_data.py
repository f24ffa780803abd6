"""`unimoe check-data FILE`: every record and medium of a data file, before a training run finds out."""

import argparse
from typing import TYPE_CHECKING, Any

from ._argument_types import positive
from ._beforehand import require_file

if TYPE_CHECKING:
    from ..trainers.data.check_data import DataReport, Finding

EXIT_PROBLEMS = 1

_DESCRIPTION = """\
Read every record of a data file and decode every image, video and audio clip that it names. For each kind of problem the
first case is shown, with the number of all; --all lists every case. The file is JSON lines or a JSON list, of
conversations in the form that `unimoe train` takes or in LLaVA's, which the data of Uni-MoE and MoIIE have
(conversations, image, video, voice)."""
_EPILOG = """\
examples:
  unimoe check-data train.jsonl                        media are relative to the file's folder
  unimoe check-data speech.json --media-root /data     for paths of the machine that the file was written on
  unimoe check-data train.jsonl --limit 100            a quick look at the start

exit code: 0 clean, 1 problems found, 2 the file cannot be read"""


def add_parser(subparsers: Any) -> None:
    """Add the command to `unimoe`."""
    parser = subparsers.add_parser(
        "check-data",
        help="find missing, unreadable and inconsistent training data",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="the data file")
    parser.add_argument("--media-root", metavar="DIR", help="folder that holds the media")
    parser.add_argument("--all", action="store_true", help="list every case, not only the first of each kind")
    parser.add_argument("--limit", metavar="N", type=positive, help="look at the first N records only")


def run(args: argparse.Namespace) -> int:
    """Check a file and print what was found; returns the exit code."""
    require_file("The data file", args.file)
    from ..trainers.data.check_data import check_data

    report = check_data(args.file, args.media_root, args.limit, keep_cases=args.all)
    for line in report_lines(args.file, report):
        print(_printable(line))
    return EXIT_PROBLEMS if report.problems else 0


def report_lines(file: str, report: "DataReport") -> list[str]:
    """The report for a reader."""
    form = " in LLaVA's form" if report.original else ""
    media = ", ".join(f"{count:,} {kind}" for kind, count in report.media.items())
    lines = [f"{file}: {report.records:,} records{form}; media: {media}"]
    lines += _cases(report) if report.cases else _kinds(report)
    total = sum(finding.count for finding in report.problems)
    lines.append(f"{total:,} problems." if total else "No problems.")
    if not report.cases and any(finding.count > 1 for finding in (*report.problems, *report.remarks)):
        lines[-1] += " --all lists all of them."
    return lines


def _kinds(report: "DataReport") -> list[str]:
    lines = []
    for finding in report.problems:
        name = f"{finding.what} {finding.fault}"
        lines.append(f"  {name:<20} {finding.count:>8,}   first: {_place(finding)}: {finding.detail}")
    for finding in report.remarks:
        lines.append(f"  note: {finding.what}: {finding.count:,} records, first: {_place(finding)}")
    return lines


def _cases(report: "DataReport") -> list[str]:
    texts = {
        "problem": "{place}: {case.what} {case.fault}: {case.detail}",
        "remark": "{place}: note: {case.what}",
    }
    return ["  " + texts[sort].format(place=_place(case), case=case) for sort, case in report.cases]


def _place(finding: "Finding") -> str:
    return f"record {finding.record}" + (f" (id {finding.id})" if finding.id else "")


def _printable(text: str) -> str:
    """Data may hold anything; a terminal must not act on it."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)

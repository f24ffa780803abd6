"""Official files about sounds and videos to items."""

from collections.abc import Mapping
from pathlib import Path

from .item import Item
from .records import read_records

Files = Mapping[str, Path]


def video_questions(files: Files) -> list[Item]:
    """Questions about clips with free answers: `question`, `answer` and `video_name`, `video_id` or `video`."""
    answers = {}
    if "answers" in files:
        answers = {record["question_id"]: record["answer"] for record in read_records(files["answers"])}
    items = []
    for number, record in enumerate(read_records(files["questions"])):
        key = record.get("question_id", record.get("id", number))
        clip = str(record.get("video_name", record.get("video", record.get("video_id"))))
        answer = record.get("answer", answers.get(key))
        name = clip if "." in clip else f"{clip}.mp4"
        items.append(Item(key, record["question"], answer, (("video", name),), cluster=clip, record=record))
    return items


def clotho_captions(files: Files) -> list[Item]:
    """Clotho: `file_name` and five captions."""
    return [
        Item(
            record["file_name"],
            "",
            [record[f"caption_{i}"] for i in range(1, 6)],
            (("audio", record["file_name"]),),
            record=record,
        )
        for record in read_records(files["questions"])
    ]


def clotho_aqa(files: Files) -> list[Item]:
    """ClothoAQA: three people's answers to each question, on lines of their own."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for record in read_records(files["questions"]):
        grouped.setdefault((record["file_name"], record["QuestionText"].strip()), []).append(record["answer"])
    return [
        Item(f"{file}#{number}", question, answers, (("audio", file),), cluster=file)
        for number, ((file, question), answers) in enumerate(grouped.items())
    ]


def transcripts(files: Files) -> list[Item]:
    """Recordings and what is said in them: `audio` and `text`."""
    return [
        Item(record.get("id", number), "", record["text"], (("audio", record["audio"]),), record=record)
        for number, record in enumerate(read_records(files["questions"]))
    ]

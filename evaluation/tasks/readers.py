"""Official files to items: one small function per form of file."""

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from .item import Item
from .records import read_json_value, read_records

Files = Mapping[str, Path]
Reader = Callable[[Files], list[Item]]

# Instructions that official question files already carry.
_INSTRUCTIONS = re.compile(
    r"\n(?:Answer the question using a single word or phrase\."
    r"|When the provided information is insufficient, respond with 'Unanswerable'\.)"
)
_OPTION_LINE = re.compile(r"^([A-H])\. ?(.*)$", re.MULTILINE)
_PLACEHOLDER = re.compile(r"<(?:image|audio|video)>\n?")
_MEDIA_KEYS = {"image": "image", "voice": "audio", "audio": "audio", "video": "video"}
_LETTERS = "ABCDEFGH"


def without_instruction(text: str) -> str:
    """A question of a prepared file without the instruction behind it."""
    return _INSTRUCTIONS.sub("", text).strip()


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """A question whose last lines are "A. ...", "B. ...": what stands before them, and the texts of the options."""
    lines = list(_OPTION_LINE.finditer(text))
    for start in range(len(lines) - 1, -1, -1):
        if lines[start][1] == "A":
            chosen = lines[start:]
            if [line[1] for line in chosen] == list(_LETTERS[: len(chosen)]):
                before = text[: chosen[0].start()].strip().removesuffix("Options:").strip()
                return before, tuple(line[2].strip() for line in chosen)
    return text, ()


def bunny_questions(gold: Callable[[Files], Mapping[Any, Any]] | None = None) -> Reader:
    """Prepared questions: `question_id`, `image`, `text` with the instruction, `category`; answers from elsewhere."""

    def read(files: Files) -> list[Item]:
        answers = gold(files) if gold else {}
        return [
            Item(
                record["question_id"],
                without_instruction(record["text"]),
                answers.get(record["question_id"]) if gold else None,
                (("image", record["image"]),),
                category=record.get("category", ""),
                cluster=record["image"],
                record=record,
                given=record["text"],
            )
            for record in read_records(files["questions"])
            if not gold or record["question_id"] in answers
        ]

    return read


def textvqa(files: Files) -> list[Item]:
    """Questions of the TextVQA file in its order; the prompt's file, in the same order, has OCR tokens or not."""
    official = read_records(files["gold"])
    prepared = read_records(files["questions"])
    if len(official) != len(prepared):
        raise DataError(
            f"{files['questions']} has {len(prepared)} questions and {files['gold']} {len(official)}: they are of "
            "different versions of TextVQA; fetch both of 0.5.1."
        )
    return [
        Item(
            gold["question_id"],
            without_instruction(asked["text"]),
            gold["answers"],
            (("image", asked["image"]),),
            cluster=gold["image_id"],
            record=asked,
            given=asked["text"],
        )
        for gold, asked in zip(official, prepared, strict=True)
    ]


def llava_records(answer: Callable[[Mapping[str, Any]], Any], options_in_question: bool = False) -> Reader:
    """Records in LLaVA's form, as of Uni-MoE's evaluation files: `conversations`, `image`, `voice`, `video`.

    Args:
        answer: record -> gold answer.
        options_in_question: whether the question's last lines are options.
    """

    def read(files: Files) -> list[Item]:
        return [
            _llava_item(record, answer(record), options_in_question) for record in read_records(files["questions"])
        ]

    return read


def _llava_item(record: Mapping[str, Any], answer: Any, options_in_question: bool) -> Item:
    given = _PLACEHOLDER.sub("", record["conversations"][0]["value"])
    question = without_instruction(given)
    options: tuple[str, ...] = ()
    if options_in_question:
        question, options = split_options(question)
    media = tuple(
        (kind, path) for key, kind in _MEDIA_KEYS.items() if record.get(key) for path in _as_list(record[key])
    )
    key = record.get("question_id", record.get("id"))
    category = record.get("category", "")
    return Item(
        key,
        question,
        answer,
        media,
        options=options,
        category=category[0] if isinstance(category, list) else str(category),
        cluster=str(media[0][1]) if media else "",
        record=record,
        given=given,
    )


def scienceqa(which: str) -> Reader:
    """ScienceQA's test questions: "image", "text", or "all"."""

    def read(files: Files) -> list[Item]:
        def answer(record: Mapping[str, Any]) -> str:
            return record["conversations"][1]["value"].strip()

        items = llava_records(answer, options_in_question=True)(files)
        return [item for item in items if which == "all" or bool(item.media) == (which == "image")]

    return read


def pope(files: Files) -> list[Item]:
    """POPE's questions; labels are joined by place within a category, as the original does."""
    labels = {}
    for category in ("adversarial", "popular", "random"):
        labels[category] = [record["label"] for record in read_records(files[category])]
    items = []
    places = dict.fromkeys(labels, 0)
    for record in read_records(files["questions"]):
        category = record["category"]
        place = places[category]
        if place >= len(labels[category]):
            raise DataError(f"{files[category]} has {place} labels, fewer than there are {category} questions.")
        places[category] += 1
        item = Item(
            record["question_id"],
            without_instruction(record["text"]),
            labels[category][place],
            (("image", record["image"]),),
            category=category,
            cluster=record["image"],
            record=record,
        )
        items.append(item)
    return items


def mme(files: Files) -> list[Item]:
    """MME's questions with the answers of the official result files (one text file per category)."""
    from ..metrics.mme import INSTRUCTION, picture_of

    gold = {}
    for file in sorted(files["gold"].parent.glob("*.txt")):
        for line in filter(None, file.read_text(encoding="utf-8").split("\n")):
            name, question, answer = line.split("\t")[:3]
            gold[file.stem, name.partition(".")[0], question.replace(INSTRUCTION, "").strip()] = answer.strip()
    items = []
    for number, record in enumerate(read_records(files["questions"])):
        question = without_instruction(record["text"]).replace(INSTRUCTION, "").strip()
        key = (*picture_of(record["question_id"]), question)
        if key not in gold:
            raise DataError(f"{files['gold'].parent} has no answer to {question!r} about {record['question_id']}.")
        media = (("image", record["image"]),)
        picture = record["question_id"]  # ids are paths
        items.append(Item(f"{number}", question, gold[key], media, category=key[0], cluster=picture, record=record))
    return items


def gqa(files: Files) -> list[Item]:
    """GQA's testdev questions."""
    return [
        Item(
            key,
            record["question"],
            record["answer"],
            (("image", f"{record['imageId']}.jpg"),),
            category=record["types"]["structural"],
            cluster=record["imageId"],
            record=record,
        )
        for key, record in read_json_value(files["questions"]).items()
    ]


def documents(files: Files) -> list[Item]:
    """DocVQA's and InfographicVQA's official files."""
    return [
        Item(
            record["questionId"],
            record["question"],
            record.get("answers"),
            (("image", record.get("image") or record["image_local_name"]),),
            cluster=str(record.get("image") or record["image_local_name"]),
            record=record,
        )
        for record in read_records(files["questions"])
    ]


def seedbench(files: Files) -> list[Item]:
    """SEED-Bench's questions about images."""
    official = read_json_value(files["questions"])
    names = {number: name for name, number in official["question_type"].items()}
    return [
        Item(
            int(record["question_id"]) if str(record["question_id"]).isdecimal() else record["question_id"],
            record["question"],
            record["answer"],
            (("image", record["data_id"]),),
            options=tuple(record[f"choice_{letter}"] for letter in "abcd"),
            category=names[record["question_type_id"]],
            cluster=str(record["data_id"]),
            record=record,
        )
        for record in official["questions"]
        if record["data_type"] == "image"
    ]


def qbench(files: Files) -> list[Item]:
    """Q-Bench's LLVisionQA questions."""
    items = []
    for number, record in enumerate(read_records(files["questions"])):
        options = tuple(record["candidates"])
        media = (("image", record["img_path"]),)
        answer = _LETTERS[options.index(record["correct_ans"])]
        items.append(
            Item(number, record["question"], answer, media, options=options, cluster=record["img_path"], record=record)
        )
    return items


def hallusionbench(files: Files) -> list[Item]:
    """HallusionBench's questions that show an image."""
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    return [
        Item(
            "-".join(str(record[key]) for key in keys),
            record["question"],
            "Yes" if str(record["gt_answer"]) == "1" else "No",
            (("image", record["filename"]),),
            category=record["category"],
            cluster=str(record["filename"]),
            record=record,
        )
        for record in read_records(files["questions"])
        if str(record.get("visual_input", "1")) != "0" and record.get("filename")
    ]


def options_table(files: Files) -> list[Item]:
    """Tables with `question`, `options` and `answer` (letter, or index of the option), such as AI2D's."""
    items = []
    for number, record in enumerate(tables(files)):
        options = tuple(str(option) for option in record["options"])
        answer = str(record["answer"])
        letter = _LETTERS[int(answer)] if answer.isdigit() else answer
        key = record.get("question_id", number)
        media = (("image", picture_of(record["image"])),)
        cluster = _digest(media)
        items.append(Item(key, record["question"], letter, media, options=options, cluster=cluster, record=record))
    return items


def chartqa(files: Files) -> list[Item]:
    """ChartQA's test questions: `type`, `question`, `answer` and `image`, or the authors' `query`, `label`, `imgname`."""
    items = []
    for number, record in enumerate(tables(files)):
        answer = record.get("answer", record.get("label"))
        answer = answer[0] if isinstance(answer, list) else str(answer)
        kind = str(record.get("type", "human")).removesuffix("_test")
        media = (("image", picture_of(record["imgname"] if "imgname" in record else record["image"])),)
        question = record.get("question", record.get("query"))
        items.append(Item(number, question, answer, media, category=kind, cluster=_digest(media), record=record))
    return items


def mathvista(files: Files) -> list[Item]:
    """MathVista's testmini: `pid`, `query` and `image`, by key or in a table."""
    path = files["questions"]
    value = read_json_value(path) if path.suffix == ".json" else read_records(path)
    records = [{"pid": key, **record} for key, record in value.items()] if isinstance(value, dict) else value
    items = []
    for record in records:
        media = (("image", picture_of(record.get("decoded_image") or record["image"])),)
        category = str(record.get("question_type", ""))
        items.append(
            Item(str(record["pid"]), record["query"], record.get("answer"), media, category=category, record=record)
        )
    return items


def mmbench(files: Files) -> list[Item]:
    """MMBench's tables: `index`, `question`, `hint`, `A` to `D`, and pictures as base64."""
    items = []
    for record in read_records(files["questions"]):
        options = tuple(record[letter] for letter in "ABCD" if record.get(letter) not in (None, "", "nan"))
        hint = record.get("hint") or ""
        answer = record.get("answer") or None
        key = int(record["index"])
        try:
            picture = base64.b64decode(record["image"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{files['questions']}: the picture of question {key} is no base64.") from error
        hint = "" if hint == "nan" else hint
        kept = {name: value for name, value in record.items() if name != "image"}
        category = record.get("category") or ""
        media = (("image", picture),)
        items.append(
            Item(
                key,
                record["question"],
                answer,
                media,
                options=options,
                hint=hint,
                category=category,
                cluster=_digest(media),
                record=kept,
            )
        )
    return items


def mmvet(files: Files) -> list[Item]:
    """MM-Vet's questions; an answer has parts joined by <AND> and alternatives by <OR>."""
    return [
        Item(
            record["id"],
            record["text"],
            record["gt"],
            (("image", record["imagename"]),),
            category="+".join(record["capability"]),
            cluster=record["imagename"],
            record=record,
        )
        for record in read_records(files["questions"])
    ]


def tables(files: Files) -> list[dict[str, Any]]:
    """All the parts of a table that comes in several files."""
    first = files["questions"]
    match = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}.*)", first.name)
    parts = sorted(first.parent.glob(f"{match[1]}*{match[2]}")) if match else [first]
    return [record for part in parts for record in read_records(part)]


def picture_of(value: Any) -> str | bytes:
    """The picture in a record's field: a path, or bytes as tables on the Hub have them."""
    return value.get("bytes") or value["path"] if isinstance(value, Mapping) else value


def _digest(media: Sequence[tuple[str, str | bytes]]) -> str:
    """The same for the same picture."""
    import hashlib

    value = media[0][1]
    return value if isinstance(value, str) else hashlib.sha256(value).hexdigest()


def _as_list(value: Any) -> list[Any]:
    """A path, or a list of paths; for frames of a clip the list itself."""
    return value if isinstance(value, list) else [value]

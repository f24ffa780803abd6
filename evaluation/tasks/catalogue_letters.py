"""Benchmarks with options A, B, C, D: about pictures, spoken, or text alone."""

from collections.abc import Mapping
from typing import Any

from . import readers, scoring
from .baselines import one_of_options
from .mmmu_files import mmmu
from .prompts import AS_GIVEN, LETTER, LETTER_CHINESE, LETTER_ONE_LINE
from .task import Task

_FREE_TEXT = "MMMU's rule: (B), a B between blanks, or an option's text; the last one named"
_SPOKEN = "Uni-MoE's repository describes the set; a list of records in its form, with `voice` and `answer`."

_SCIENCEQA: dict[str, Any] = {
    "split": "test",
    "files": {"questions": ("scienceqa_bunny_test_CQM-A.json", "bunny_test_CQM-A.json", "llava_test_CQM-A.json")},
    "prompts": {"": LETTER},
    "score": scoring.scienceqa,
    "chance": one_of_options(),
    "max_new_tokens": 1024,
    "limits": {"moai": 128},
    "source": "MoIIE's or LLaVA's evaluation files have it.",
    "media_source": "Pictures: ScienceQA's test images.",
    "extraction": "B, B. followed by a blank, or: The answer is B.",
}


def _spoken(name: str, title: str, pictures: bool) -> Task:
    """Questions that are heard, in Uni-MoE's form: `voice`, perhaps `image`, and the letter as `answer`."""
    return Task(
        name=name,
        title=title,
        modality="speech",
        split="test",
        files={"questions": (f"{name}.json", f"{name}.jsonl", f"{title}.json")},
        read=readers.llava_records(_first_letter, options_in_question=True),
        prompts={"": AS_GIVEN},
        score=scoring.letters,
        systems=("unimoe",),
        source=_SPOKEN,
        media_source=f"Recordings{' and pictures' if pictures else ''}: those that the records name.",
        extraction=_FREE_TEXT,
        max_new_tokens=512,
    )


def _first_letter(record: Mapping[str, Any]) -> str:
    answer = record["answer"]
    return str(answer[0] if isinstance(answer, list) else answer).strip()


LETTER_TASKS = [
    Task(
        name="scienceqa",
        title="ScienceQA",
        modality="image",
        read=readers.scienceqa("all"),
        systems=("moiie",),
        **_SCIENCEQA,
    ),
    Task(
        name="scienceqa_image",
        title="ScienceQA, with pictures",
        modality="image",
        read=readers.scienceqa("image"),
        systems=("moiie", "moai"),
        **_SCIENCEQA,
    ),
    Task(
        name="scienceqa_text",
        title="ScienceQA, text only",
        modality="text",
        read=readers.scienceqa("text"),
        **_SCIENCEQA,
    ),
    Task(
        name="mmbench",
        title="MMBench 1.1",
        modality="image",
        split="dev",
        files={"questions": ("MMBench1.1.json",)},
        read=readers.llava_records(_first_letter, options_in_question=True),
        prompts={"": LETTER, "unimoe": AS_GIVEN},
        score=scoring.letters,
        chance=one_of_options(),
        systems=("unimoe",),
        max_new_tokens=512,
        source="Uni-MoE's data_sample has it.",
        media_source="Pictures: MMBench's, as numbered files.",
        extraction=_FREE_TEXT,
    ),
    *(
        Task(
            name=f"mmbench_{language}",
            title=f"MMBench-{language.upper()}",
            modality="image",
            split="dev or test",
            files={"questions": (f"mmbench_{suffix}*.tsv", f"MMBench_*{language.upper()}*.tsv")},
            read=readers.mmbench,
            prompts={"": template},
            scored_by="server",
            submission="mmbench",
            systems=("moiie", "moai"),
            source="MMBench's table with pictures inside, as its authors publish it.",
            extraction="the server's",
        )
        for language, suffix, template in (("en", "dev_20", LETTER), ("cn", "dev_cn", LETTER_CHINESE))
    ),
    Task(
        name="seed_image",
        title="SEED-Bench, images",
        modality="image",
        split="test",
        files={"questions": ("SEED-Bench.json",)},
        read=readers.seedbench,
        prompts={"": LETTER, "moai": LETTER_ONE_LINE},
        score=scoring.seedbench,
        chance=one_of_options(),
        systems=("unimoe", "moiie", "moai"),
        source="SEED-Bench's data set has it.",
        media_source="Pictures: SEED-Bench-image.",
        extraction="the whole text must be the letter",
    ),
    Task(
        name="qbench",
        title="Q-Bench",
        modality="image",
        split="dev",
        files={"questions": ("llvisionqa_dev.json",)},
        read=readers.qbench,
        prompts={"": LETTER},
        score=scoring.qbench,
        chance=one_of_options(),
        systems=("moai",),
        source="Q-Bench's repository has it.",
        media_source="Pictures: Q-Bench's images_llvisionqa.",
        extraction="the text's place in ABCD",
    ),
    Task(
        name="ai2d",
        title="AI2D",
        modality="image",
        split="test",
        files={"questions": ("ai2d*.jsonl", "test-*.parquet")},
        read=readers.options_table,
        prompts={"": LETTER},
        score=scoring.ai2d,
        chance=one_of_options(),
        systems=("moiie", "moai"),
        max_new_tokens=512,
        limits={"moai": 128},
        source="AI2D's test split, with question, options, answer and image.",
        media_source="Pictures: AI2D's images.",
        extraction="the first character behind the last marker such as: answer is",
    ),
    Task(
        name="mmmu",
        title="MMMU",
        modality="image",
        split="val",
        files={
            "questions": ("mmmu_val*.jsonl", "validation-*.parquet", "mmmu_val*.parquet"),
            "gold": ("mmmu_answer_dict_val.json", "answer_dict_val.json"),
        },
        read=mmmu,
        prompts={"": LETTER},
        score=scoring.mmmu,
        systems=("moiie",),
        source="MMMU's data set (the subjects' validation tables in one folder) and its answer_dict_val.json.",
        extraction=f"{_FREE_TEXT}; short answers are looked for behind key words",
    ),
    _spoken("mmbench_audio", "MMBench-Audio", pictures=True),
    _spoken("ehsl", "English-High-School-Listening", pictures=False),
    _spoken("race_audio", "RACE-Audio", pictures=False),
]

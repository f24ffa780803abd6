"""Benchmarks about sounds and videos."""

from . import scoring
from . import sound_video_readers as readers
from .prompts import CAPTION_SOUND, SHORT, TRANSCRIBE
from .statistics_of_sums import error_rate_statistic
from .task import Task

_CLOTHO = "The evaluation captions of Clotho, zenodo.org."
_JUDGED = "a judge compares the whole text with the gold answer"


def _clotho(name: str, title: str, file: str) -> Task:
    return Task(
        name=name,
        title=title,
        modality="sound",
        split="evaluation",
        files={"questions": (file, f"*/{file}")},
        read=readers.clotho_captions,
        prompts={"": CAPTION_SOUND},
        score=scoring.captions,
        systems=("unimoe",),
        max_new_tokens=512,
        source=_CLOTHO,
        media_source="Recordings: Clotho's evaluation folder.",
        extraction="the whole text",
    )


def _video(name: str, title: str, files: dict[str, tuple[str, ...]], source: str) -> Task:
    return Task(
        name=name,
        title=title,
        modality="video",
        split="test",
        files=files,
        read=readers.video_questions,
        prompts={"": SHORT},
        scored_by="judge",
        systems=("unimoe",),
        max_new_tokens=512,
        source=source,
        media_source="Clips: those that the records name.",
        extraction=_JUDGED,
    )


SOUND_AND_VIDEO_TASKS = [
    _clotho("clotho_v1", "Clotho v1", "clotho_captions_evaluation_v1.csv"),
    _clotho("clotho_v2", "Clotho v2", "clotho_captions_evaluation.csv"),
    Task(
        name="clotho_aqa",
        title="ClothoAQA",
        modality="sound",
        split="test",
        files={"questions": ("clotho_aqa_test.csv",)},
        read=readers.clotho_aqa,
        prompts={"": SHORT},
        score=scoring.majority,
        systems=("unimoe",),
        max_new_tokens=512,
        source="ClothoAQA, zenodo.org.",
        media_source="Recordings: ClothoAQA's audio_files.",
        extraction="the whole text, normalised, against most people's answer",
    ),
    _video("msvd_qa", "MSVD-QA", {"questions": ("msvd_qa*.json", "test_qa.json")}, "MSVD-QA's test_qa.json."),
    _video(
        "activitynet_qa",
        "ActivityNet-QA",
        {
            "questions": ("activitynet_qa*.json", "test_q.json"),
            "answers": ("activitynet_qa_answers*.json", "test_a.json"),
        },
        "ActivityNet-QA's test_q.json and test_a.json.",
    ),
    Task(
        name="transcripts",
        title="Transcripts",
        modality="speech",
        split="any",
        files={"questions": ("transcripts.jsonl", "transcripts.csv")},
        read=readers.transcripts,
        prompts={"": TRANSCRIBE},
        score=scoring.word_errors,
        statistic=error_rate_statistic(),
        lower_is_better=True,
        max_new_tokens=256,
        source="Records with `audio` and `text`.",
        media_source="Recordings: those that the records name.",
        extraction="the whole text, lower case, without punctuation",
    ),
]

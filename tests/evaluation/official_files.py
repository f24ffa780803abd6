"""Small stand-ins for the official files of every task, with two or more questions each, in the official form."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import tiny_media

OPTIONS = ["cat", "dog", "owl", "bee"]
PEOPLE = ["a red bus"] * 6 + ["bus"] * 4


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _bunny(texts: dict[Any, tuple[str, str, str]]) -> str:
    suffix = "\nAnswer the question using a single word or phrase."
    return _lines(
        [
            {"question_id": key, "image": image, "text": question + suffix, "category": category}
            for key, (image, question, category) in texts.items()
        ]
    )


def _llava(key: str, question: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": fields.pop("gpt", "")}]
    return {"id": key, "conversations": turns, **fields}


def _tsv() -> str:
    picture = base64.b64encode(tiny_media.encoded_picture()).decode()
    head = "index\tquestion\thint\tA\tB\tC\tD\tcategory\tl2-category\tsplit\timage\n"
    return head + "".join(
        f"{i}\tWhich?\t{h}\tcat\tdog\t{c}\t\tx\ty\tdev\t{picture}\n"
        for i, h, c in ((7, "", "owl"), (8, "A hint.", ""))
    )


def _gqa(key: str, answer: str, structural: str) -> dict[str, Any]:
    return {
        "question": "Is it a cat?",
        "imageId": f"n{key}",
        "answer": answer,
        "types": {"structural": structural, "semantic": "obj"},
        "semantic": [{"operation": "select", "argument": "cat (1)"}],
        "groups": {"global": None if answer == "no" else "animal"},
    }


_SPOKEN = [
    _llava(f"s{i}", "<audio>\nWhat is heard?\nA. cat\nB. dog", voice=[f"{i}.wav"], answer="AB"[i], image=[f"{i}.png"])
    for i in range(2)
]
_SCIENCE = [
    _llava("1", "<image>\nContext: none.\nWhich?\nA. cat\nB. dog", image="1/image.png", gpt="B"),
    _llava("2", "Which one?\nA. cat\nB. dog\nC. owl", gpt="C"),
    _llava("3", "Which?\nA. cat\nB. dog", gpt="A"),
]
_DOCUMENTS = {
    "dataset_name": "x",
    "data": [
        {"questionId": i, "question": "How much?", "image": f"documents/{i}.png", "answers": ["12", "12 $"]}
        for i in (1, 2)
    ],
}
_MME_QUESTIONS = {"Is it red?": "Yes", "Is it blue?": "No"}


def _mme_questions() -> str:
    suffix = "\nAnswer the question using a single word or phrase."
    return _lines(
        [
            {"question_id": f"{c}/{i}.jpg", "image": f"{c}/{i}.jpg", "text": q + suffix, "category": c}
            for c in ("existence", "count")
            for i in range(2)
            for q in _MME_QUESTIONS
        ]
    )


def _mme_gold() -> str:
    return "".join(
        f"{i}.txt\t{q} Please answer yes or no.\t{a}\n" for i in range(2) for q, a in _MME_QUESTIONS.items()
    )


def _clotho() -> str:
    head = "file_name," + ",".join(f"caption_{i}" for i in range(1, 6)) + "\n"
    return head + "".join(
        f"{n}.wav,{','.join(f'{w} {n} falls on a roof {i}' for i in range(5))}\n"
        for n, w in ((1, "rain"), (2, "hail"))
    )


_HALLUSION = [
    {"category": "VD", "subcategory": "chart", "visual_input": v, "set_id": "0", "figure_id": f, "question_id": q,
     "question": "Is it?", "gt_answer": a, "filename": name}
    for v, f, q, a, name in (("1", "0", "0", "1", "a.png"), ("1", "1", "0", "0", "b.png"), ("0", "0", "1", "1", None))
]  # fmt: skip
_SEED = {
    "question_type": {"Scene Understanding": 1, "Action Recognition": 10},
    "questions": [
        {"answer": a, "question_id": str(i), "question": "Which?", "data_type": kind, "data_id": f"{i}", "question_type_id": t,
         **{f"choice_{c}": o for c, o in zip("abcd", OPTIONS, strict=True)}}
        for i, a, kind, t in ((101, "B", "image", 1), (102, "D", "image", 1), (103, "A", "video", 10))
    ],
}  # fmt: skip
_CMMMU = [
    {"id": 1, "type": "选择", "question": '<img="q_1.jpg">哪一个?', "answer": "B", "category": "商业",
     **{f"option{i}": o for i, o in enumerate(OPTIONS, 1)}},
    {"id": 2, "type": "填空", "question": '<img="q_2.jpg">多少?', "answer": "12", "category": "科学",
     **{f"option{i}": "" for i in range(1, 5)}},
    {"id": 3, "type": "判断", "question": '<img="q_3.jpg">对吗?', "answer": "对", "category": "科学",
     **{f"option{i}": "" for i in range(1, 5)}},
]  # fmt: skip
_MMMU = [
    {"id": "validation_Art_1", "question": "Which is <image 1>?", "options": str(OPTIONS), "image_1": "a.png"},
    {"id": "validation_Math_2", "question": "How much is <image 1>?", "options": "[]", "image_1": {"path": "b.png"}},
]
_MMMU_GOLD = {
    "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "C"},
    "validation_Math_2": {"question_type": "short-answer", "ground_truth": ["12", "twelve"]},
}
_POPE = {1: ("a.jpg", "Is there a cat?", "adversarial"), 2: ("a.jpg", "Is there a dog?", "adversarial")}
_POPE |= {3: ("b.jpg", "Is there a cat?", "popular"), 4: ("b.jpg", "Is there a dog?", "random")}
_LABELS = {"adversarial": ("yes", "no"), "popular": ("yes",), "random": ("yes",)}

# Task -> file name -> content.
FILES: dict[str, dict[str, str]] = {
    "aokvqa": {
        "aokvqa.json": json.dumps(
            [{"question_id": f"q{i}", "image": f"/coco/{i}.jpg", "text": "What?\nAnswer the question using a single word or phrase.", "gt": PEOPLE} for i in range(2)]
        )
    },
    "okvqa": {
        "okvqa.json": json.dumps([{"question_id": 5, "image": "5.jpg", "text": "What?"}]),
        "mscoco_val2014_annotations.json": json.dumps({"annotations": [{"question_id": 5, "answers": [{"answer": a} for a in PEOPLE]}]}),
    },
    "vqav2": {"bunny_vqav2_mscoco_test-dev2015.jsonl": _bunny({1: ("1.jpg", "What?", "default"), 2: ("1.jpg", "Who?", "default")})},
    "vizwiz": {"vizwiz_bunny_test.jsonl": _bunny({0: ("V_0.jpg", "What?", "default")})},
    "textvqa": {
        "llava_textvqa_val.json": json.dumps([{"question_id": "ab", "image": "t/ab.jpg", "text": "What brand?\nAnswer the question using a single word or phrase."}]),
        "TextVQA_0.5.1_val.json": json.dumps({"data": [{"question": "what brand?", "question_id": 3, "image_id": "ab", "answers": PEOPLE}]}),
    },
    "gqa": {"testdev_balanced_questions.json": json.dumps({"1": _gqa("1", "yes", "verify"), "2": _gqa("2", "cat", "query")})},
    "pope": {
        "bunny_pope_test.jsonl": _bunny(_POPE),
        **{f"coco_pope_{name}.json": _lines([{"label": label} for label in labels]) for name, labels in _LABELS.items()},
    },
    "mme": {"bunny_mme.jsonl": _mme_questions(), "gold/existence.txt": _mme_gold(), "gold/count.txt": _mme_gold()},
    "hallusionbench": {"HallusionBench.json": json.dumps(_HALLUSION)},
    "chartqa": {
        "chartqa_test.jsonl": _lines([{"question": "How many?", "answer": a, "type": t, "image": "1.png"} for a, t in (("12", "human_test"), ("Red", "augmented_test"))])
    },
    "docvqa": {"val_v1.0.json": json.dumps(_DOCUMENTS)},
    "infographicvqa": {"infographicsVQA_val_v1.0_withQT.json": json.dumps(_DOCUMENTS)},
    "cmmmu": {"cmmmu-data-val-answer.jsonl": _lines(_CMMMU)},
    "mmvet": {"mm-vet.json": json.dumps([{"id": f"v1_{i}", "text": "What is x?", "gt": "-1<AND>-5", "capability": ["ocr", "math"], "imagename": f"v1_{i}.png"} for i in range(2)])},
    "mathvista": {"testmini.json": json.dumps({"1": {"query": "Hint: a number.\nQuestion: x?", "image": "images/1.jpg", "answer": "4", "question_type": "free_form"}})},
    "scienceqa": {"scienceqa_bunny_test_CQM-A.json": json.dumps(_SCIENCE)},
    "scienceqa_image": {"scienceqa_bunny_test_CQM-A.json": json.dumps(_SCIENCE)},
    "scienceqa_text": {"scienceqa_bunny_test_CQM-A.json": json.dumps(_SCIENCE)},
    "mmbench": {"MMBench1.1.json": json.dumps([_llava("m1", "<image>\nHint: h.\nWhich?\nOptions:\nA.cat\nB.dog\nAnswer the question using a single word or phrase.", image=["m/1.jpg"], answer=["B"], category=["x"])])},
    "mmbench_en": {"mmbench_dev_20230712.tsv": _tsv()},
    "mmbench_cn": {"mmbench_dev_cn_20231003.tsv": _tsv()},
    "seed_image": {"SEED-Bench.json": json.dumps(_SEED)},
    "qbench": {"llvisionqa_dev.json": json.dumps([{"img_path": f"{i}.jpg", "question": "Sharp?", "candidates": OPTIONS, "correct_ans": OPTIONS[i]} for i in (1, 2)])},
    "ai2d": {"ai2d_test.jsonl": _lines([{"question": "Which?", "options": OPTIONS, "answer": str(i), "image": f"{i}.png"} for i in (0, 3)])},
    "mmmu": {"mmmu_val.jsonl": _lines(_MMMU), "mmmu_answer_dict_val.json": json.dumps(_MMMU_GOLD)},
    "mmbench_audio": {"mmbench_audio.json": json.dumps(_SPOKEN)},
    "ehsl": {"ehsl.json": json.dumps(_SPOKEN)},
    "race_audio": {"race_audio.json": json.dumps(_SPOKEN)},
    "clotho_v1": {"clotho_captions_evaluation_v1.csv": _clotho()},
    "clotho_v2": {"clotho_captions_evaluation.csv": _clotho()},
    "clotho_aqa": {"clotho_aqa_test.csv": "file_name,QuestionText,answer,confidence\n" + "".join(f"1.wav,Is it rain?,{a},yes\n" for a in ("yes", "no", "yes"))},
    "msvd_qa": {"test_qa.json": json.dumps([{"id": 1, "question": "who sings?", "answer": "man", "video_name": "vid1.avi"}])},
    "activitynet_qa": {
        "test_q.json": json.dumps([{"question_id": "a_1", "question": "who runs", "video_name": "v_1"}]),
        "test_a.json": json.dumps([{"question_id": "a_1", "answer": "dog"}]),
    },
    "transcripts": {"transcripts.jsonl": _lines([{"audio": "1.wav", "text": "A blue bird sings."}, {"audio": "2.wav", "text": "It doesn't."}])},
}  # fmt: skip


def write_files(root: Path, task: str) -> Path:
    """Write the official files of a task below `root`, which is the data folder then."""
    for name, content in FILES[task].items():
        file = root / task / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    return root


def as_archive(file: Path) -> Path:
    """The same file as the only one of a .tar.gz, in its place."""
    archive = file.with_suffix("").with_suffix(".tar.gz")
    content = file.read_bytes()
    with tarfile.open(archive, "w:gz") as stream:
        member = tarfile.TarInfo(file.name)
        member.size = len(content)
        stream.addfile(member, io.BytesIO(content))
    file.unlink()
    return archive

"""Metrics without a scorer in the golden data, and corners that the golden data do not hold."""

import math
import sys
from subprocess import run

import pytest

from unimoe.errors import DataError
from unimoe.evaluation.metrics import cmmmu, hallusionbench, mme, mmmu, pope, speech_recognition
from unimoe.evaluation.metrics.ai2d import ai2d
from unimoe.evaluation.metrics.captioning import captioning, cider
from unimoe.evaluation.metrics.edit_distance import edit_distance
from unimoe.evaluation.metrics.exact_match import exact_match, majority_match
from unimoe.evaluation.metrics.key_phrases import answer_tails
from unimoe.evaluation.metrics.option_letters import option_letters
from unimoe.evaluation.metrics.qbench import qbench
from unimoe.evaluation.metrics.seedbench import seedbench


def test_cider_by_hand() -> None:
    """Two items with one reference each; every word is in one of them, so each has the weight log 2."""
    scores = cider(["a b", "c x"], [["a b"], ["c d"]])
    assert scores[0] == pytest.approx(10 * (1 + 1) / 4)  # unigrams and bigrams agree, longer ones do not exist
    # x is unknown: cosine of (c, x) with (c, d), both weights log 2 for c, d and for x too
    assert scores[1] == pytest.approx(10 * 0.5 / 4)


def test_cider_punishes_length_and_repetition() -> None:
    references = [["rain falls on the roof"], ["a dog barks in the yard"], ["birds sing"]]
    plain = cider(["rain falls on the roof", "", ""], references)[0]
    repeated = cider(["rain falls on the roof rain falls on the roof", "", ""], references)[0]
    assert plain == pytest.approx(10.0)
    assert repeated < plain * math.exp(-(5**2) / 72) + 1e-9


def test_captions_have_all_three_scores() -> None:
    references = {1: ["rain falls on a tin roof"] * 2, 2: ["A dog barks loudly outside."]}
    best = captioning({1: "Rain falls on a tin roof.", 2: "a dog barks loudly outside"}, references)
    assert best.score == pytest.approx(1000)
    assert best.per_category["ROUGE-L"] == pytest.approx(100)
    assert best.per_category["BLEU-4"] > 80
    assert captioning({1: "silence", 2: "nothing"}, references).score == 0


def test_word_errors() -> None:
    scores = speech_recognition.error_rates(
        {1: "The cat sat!", 2: "it dont rain", 3: "x"}, {1: "the cat sat", 2: "It doesn't rain now.", 3: ""}
    )
    assert scores.score == pytest.approx(100 * 2 / 7)
    assert [row["score"] for row in scores.per_sample] == [0.0, 50.0, None]
    assert scores.per_category["CER"] > 0


def test_edit_distance() -> None:
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("abc", "abc"), ("ab", "ba"))] == [
        3,
        3,
        0,
        2,
    ]


def test_exact_match_is_the_quickstarts_rule() -> None:
    scores = exact_match({1: " cat\n", 2: "Cat", 3: "a cat"}, {1: "cat", 2: "cat", 3: "cat"})
    assert [row["score"] for row in scores.per_sample] == [1, 0, 0]


def test_the_majority_decides() -> None:
    answers = {1: ["yes", "no", "Yes."], 2: ["two", "2", "three"]}
    assert majority_match({1: "Yes!", 2: "2"}, answers).score == 100.0
    assert majority_match({1: "no", 2: "three"}, answers).score == 0.0


def test_option_letters_in_free_text() -> None:
    gold = [{"question_id": i, "options": ("cat", "dog"), "answer": "B", "category": "x"} for i in range(5)]
    texts = {0: "B", 1: "(B)", 2: "The answer is B.", 3: "b", 4: "C"}
    assert [row["score"] for row in option_letters(gold, texts).per_sample] == [1, 1, 1, 0, 0]


def test_an_empty_answer_is_wrong_where_the_original_crashes() -> None:
    gold = [{"question_id": 1, "gt_answer": "Yes", "category": "VD"}]
    assert hallusionbench.hallusionbench(gold, [{"question_id": 1, "prediction": "  "}]).score == 0
    assert pope.yes_no_scores(["no"], ["no"])["F1 score"] == 0.0
    questions = [{"question_id": "1", "answer": "A", "data_type": "image", "question_type_id": 1}]
    assert seedbench(questions, {"x": 1}, [{"question_id": 1, "prediction": ""}]).score == 0


def test_an_item_without_a_prediction_is_wrong_and_an_empty_one_stands_for_a() -> None:
    gold = [{"question_id": 1, "candidates": ["cat", "dog"], "correct_ans": "cat", "gt_answer": "0"}]
    empty = [{"question_id": 1, "prediction": ""}]
    assert (qbench(gold, []).score, qbench(gold, empty).score) == (0, 100)
    assert qbench(gold, []).per_sample == [{"question_id": 1, "score": 0}]
    found = [ai2d(gold, texts).details["variants"]["find_in_ABCDE"] for texts in ([], empty)]
    assert found == [0, 100]


def test_only_digits_are_a_number_in_the_ids_of_seedbench() -> None:
    ids = ["105_7", "1057", " 12", "v1"]
    questions = [{"question_id": i, "answer": "A", "data_type": "image", "question_type_id": 1} for i in ids]
    predictions = [{"question_id": i, "prediction": text} for i, text in (("105_7", "A"), (1057, "B"), ("v1", "A"))]
    rows = seedbench(questions, {"x": 1}, predictions).per_sample
    assert [(row["question_id"], row["score"]) for row in rows] == [("105_7", 1), (1057, 0), (" 12", 0), ("v1", 1)]


def test_a_lost_line_shifts_the_pairs_of_mme() -> None:
    gold = {("count", str(i), f"{q} {mme.INSTRUCTION}"): a for i in range(2) for q, a in (("a?", "Yes"), ("b?", "No"))}
    texts = ["yes\tx", "no", "yes", "no"]
    questions = [(i, q) for i in range(2) for q in ("a?", "b?")]
    predictions = [
        {"question_id": f"count/{i}.jpg", "question": q, "prediction": text}
        for (i, q), text in zip(questions, texts, strict=True)
    ]
    assert mme.mme(gold, predictions).score == pytest.approx(100 + 50)  # pairs (b, a) and (b, -): one is whole
    with pytest.raises(DataError, match="no question"):
        mme.mme({}, predictions)


def test_an_empty_tail_does_not_stop_a_longer_one() -> None:
    assert answer_tails(["so the result is so "], ["so ", "is "]) == ["so"]
    assert answer_tails(["x = 3", "y = 4"], ["is "]) == ["4"]
    assert answer_tails(["it is ."], ["is "]) == []


def test_metrics_need_no_torch() -> None:
    script = (
        "import sys\nimport unimoe, unimoe.evaluation.metrics.gqa, unimoe.evaluation.metrics.mme\n"
        "from unimoe.evaluation.tasks import catalogue\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    done = run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rules_of_mmmu_that_few_answers_need() -> None:
    options = ["red cat", "dog"]
    assert mmmu.parse_letter("here it shows the red cat", options) == "A"
    assert mmmu.parse_letter("it shows the red cat", options) == mmmu.RANDOM  # five words are too few
    assert mmmu.parse_letter("B'.", options) == "B"
    assert mmmu.parse_letter("B.'", options) == mmmu.RANDOM  # full stops had their turn before apostrophes
    assert mmmu.parse_letter("(A) or (B), but I mean (A)", options) == "A"
    assert mmmu.parse_short_answer("It could be 3, so the answer is 1/64.") == ["1/64", 1.0, 64.0]
    assert mmmu.parse_short_answer("This is\nx = 1,234.567") == ["is", 1234.57, 1234.0, 234.57]


def test_mmmu_letters_count_items_without_prediction_apart() -> None:
    gold = [{"question_id": i, "options": ["red", "blue"], "answer": "A"} for i in range(4)]
    said = [{"question_id": i, "prediction": text} for i, text in enumerate(("(A)", "(B)", "?"))]
    scores = mmmu.mmmu_letters(gold, said)
    assert scores.score == 0.5
    assert scores.per_category == {"random": 1, "correct": 1, "missing": 1}


def test_rules_of_cmmmu_that_few_answers_need() -> None:
    item = {"id": 1, "type": "填空", "category": "科学", "answer": "答"}
    texts = {"abc答": 0, "ab答": 1, "答" + "字" * 20: 1, "答" + "字" * 21: 0}
    for text, right in texts.items():
        assert cmmmu.cmmmu_answers([item], {1: text}).per_sample[0]["score"] == right, text
    assert cmmmu.parse_true_false("这个说法正确") == "对"
    assert cmmmu.parse_true_false("这个说法是否正确") is None
    assert cmmmu.parse_true_false("不对") == "对"  # the original finds 对 in it
    assert cmmmu.parse_choice("A,B", ["", "", "", ""]) == "AB"
    assert cmmmu.parse_choice("RGB", ["", "", "", ""]) == "B"
    assert cmmmu.parse_choice("不知道", ["甲", "乙", "丙", "丁"]) is None

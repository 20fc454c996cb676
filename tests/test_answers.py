"""How right answers are: against SQuAD's definition written out, and what is particular to Japanese."""

from __future__ import annotations

import json
import os
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest

from hf_corrector.answers import contains_answer, exact_match, f1, normalize_answer
from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.evaluation.modules import module_path
from hf_corrector.evaluation.modules.exact_match_answers.exact_match_answers import ExactMatchAnswers
from hf_corrector.evaluation.modules.f1_answers.f1_answers import F1Answers

# --- SQuAD v1.1, from its definition ---


def squad_words(text: str) -> list[str]:
    """Lower case; delete punctuation; put a space for each article; split at white space."""
    for sign in string.punctuation:
        text = text.lower().replace(sign, "")
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall; each word of a reference is matched once."""
    left, same = squad_words(reference), 0
    for word in squad_words(prediction):
        if word in left:
            left.remove(word)
            same += 1
    if same == 0:
        return 0.0
    precision, recall = same / len(squad_words(prediction)), same / len(squad_words(reference))
    return 2 * precision * recall / (precision + recall)


def random_answers(seed: int, count: int) -> list[tuple[str, list[str]]]:
    draw = random.Random(seed)
    words = ["the", "The", "an", "a", "A.", "nearly", "$12", "oil", "crisis", "of", "1973", "U.S.", "x-ray", "\u2013"]

    def text() -> str:
        return "  ".join(draw.choices(words, k=draw.randint(0, 5)))

    return [(text(), [text() for _ in range(draw.randint(1, 3))]) for _ in range(count)]


def test_english_is_scored_as_squad_defines_it() -> None:
    answers = random_answers(0, 2000)
    for prediction, references in answers:
        assert normalize_answer(prediction) == " ".join(squad_words(prediction))
        right = max(float(squad_words(prediction) == squad_words(reference)) for reference in references)
        assert exact_match(prediction, references) == right
        expected = max(squad_f1(prediction, reference) for reference in references)
        assert f1(prediction, references) == pytest.approx(expected, abs=1e-15)
    assert 0.05 < sum(exact_match(*answer) for answer in answers) / 2000 < 0.5


@pytest.mark.parametrize(
    ("prediction", "references", "right", "score"),
    [
        ("The  October, 1973.", ["october 1973", "1973"], 1.0, 1.0),
        ("october of 1973", ["october 1973"], 0.0, 0.8),
        ("1973", ["october 1973", "1974"], 0.0, 2 / 3),
        ("theory", ["the ory"], 0.0, 0.0),
        ("U.S.", ["us"], 1.0, 1.0),
        ("the", ["a"], 1.0, 0.0),
        ("", ["x"], 0.0, 0.0),
        ("\uff21", ["A"], 0.0, 0.0),
    ],
)
def test_english_by_hand(prediction: str, references: list[str], right: float, score: float) -> None:
    assert exact_match(prediction, references) == right
    assert f1(prediction, references) == pytest.approx(score)


# --- Japanese ---


@pytest.mark.parametrize(
    ("prediction", "references", "right", "score"),
    [
        ("約１５メートル。", ["約15メートル"], 1.0, 1.0),
        ("「東大寺」", ["東大寺"], 1.0, 1.0),
        ("ｶﾅ ﾀﾞ", ["カナダ"], 1.0, 1.0),
        ("東大寺の大仏", ["東大寺"], 0.0, 2 * (3 / 6) * 1 / (3 / 6 + 1)),
        ("奈良", ["京都", "奈良県"], 0.0, 0.8),
        ("the X-ray", ["THE Xray"], 1.0, 1.0),
        ("スーパー", ["スパ"], 0.0, 2 * 0.5 * 1 / 1.5),
        ("摂氏−3℃", ["摂氏−3°C"], 1.0, 1.0),
        ("。", ["奈良"], 0.0, 0.0),
    ],
)
def test_japanese_by_hand(prediction: str, references: list[str], right: float, score: float) -> None:
    assert exact_match(prediction, references, language="ja") == right
    assert f1(prediction, references, language="ja") == pytest.approx(score)


# --- attribution ---


def test_a_passage_holds_an_answer_word_by_word() -> None:
    passage = "def read_all(f, n=1_000):\n    # The U.S. way, as in 1973-74.\n    return f.Read(n)"
    for answer in ("read_all", "the u.s.", "1973", "return f", "Def", "nothing"):
        assert contains_answer(passage, [answer]) == (answer != "nothing")
    for part in ("read_al", "eturn", "197", "all the", "", " ", "returnf"):
        assert not contains_answer(passage, [part])
    assert contains_answer(passage, ["nothing", "read_all"]) and not contains_answer("", ["x"])
    assert contains_answer("caf\u00e9", ["cafe\u0301"])


def test_a_japanese_passage_holds_an_answer_of_either_width() -> None:
    passage = "高さは約１５ メートル\uff08座高\uff09である。"
    assert contains_answer(passage, ["約15メートル"], language="ja")
    assert not contains_answer(passage, ["約16メートル", "。"], language="ja")
    assert not contains_answer(passage, ["約15メートル"])


# --- mistakes ---


def test_unknown_languages_and_missing_references_are_refused() -> None:
    for call in (exact_match, f1, contains_answer):
        with pytest.raises(ConfigurationError, match=r"expected one of .* got 'de'"):
            call("a", ["a"], language="de")
    with pytest.raises(ConfigurationError, match="at least one text"):
        f1("a", [])
    with pytest.raises(ConfigurationError, match=r"pass \[text\]"):
        exact_match("a", "a")


# --- as modules of the evaluate library ---


def test_modules_give_means_and_take_answers_one_by_one(tmp_path: Path) -> None:
    answers = random_answers(1, 50)
    predictions, references = [one for one, _ in answers], [many for _, many in answers]
    for kind, value in ((ExactMatchAnswers, exact_match), (F1Answers, f1)):
        found = kind(cache_dir=str(tmp_path)).compute(predictions=predictions, references=references)
        assert found == {kind.label: pytest.approx(sum(value(*one) for one in answers) / 50)}
        single = kind(cache_dir=str(tmp_path))
        for prediction, many in answers:
            single.add(prediction=prediction, reference=many)
        assert single.compute() == found
    japanese = F1Answers(cache_dir=str(tmp_path))
    assert japanese.compute(predictions=["奈良"], references=[["奈良県"]], language="ja") == {"f1": pytest.approx(0.8)}


def test_modules_refuse_what_would_give_a_wrong_number(tmp_path: Path) -> None:
    for predictions, references in (
        (["a"], ["a"]), (["a"], [[]]), ([["a"]], [["a"]]), (["a"], [["a"], ["b"]]), (["a"], [[1]]), ([], []),
    ):  # fmt: skip
        with pytest.raises(DataError):
            F1Answers(cache_dir=str(tmp_path)).compute(predictions=predictions, references=references)
    with pytest.raises(ConfigurationError):
        F1Answers(cache_dir=str(tmp_path)).compute(predictions=["a"], references=[["a"]], language="de")


LOAD_BOTH = """
import json, sys
import evaluate
scores = {}
for path in sys.argv[1:]:
    scores |= evaluate.load(path).compute(predictions=["The U.S.", "oil"], references=[["us"], ["oil crisis"]])
print(json.dumps(scores))
"""


def test_modules_load_by_path_without_network(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    folders = [module_path("exact_match_answers"), module_path("f1_answers")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_BOTH, *folders], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3) / 2)}

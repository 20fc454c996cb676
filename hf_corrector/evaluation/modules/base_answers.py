"""What the metrics of answers share: their inputs and the mean over questions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import datasets
import evaluate

from hf_corrector.answers import check_language
from hf_corrector.errors import DataError

INPUTS = """
Args:
    predictions: For each question the answer that was written.
    references: For each question the answers that are right, one or more texts.
    language: "en" normalises as the official script of SQuAD v1.1 and counts words, "ja" normalises Japanese and counts
        characters. Default "en".

Returns:
    The mean over questions, from 0 to 1 (SQuAD's script prints per cent).
"""

References: TypeAlias = Sequence[str]


class AnswerMetric(evaluate.Metric, ABC):  # type: ignore[misc]  # evaluate 0.4.6 has no types
    """Mean over questions of how right their answers are.

    Stays abstract, as ``evaluate.load`` takes the first concrete metric it finds in a module's namespace.
    """

    label = ""
    summary = ""

    @abstractmethod
    def value(self, prediction: str, references: References, *, language: str) -> float:
        """Return the value of one answer, 0 to 1."""

    def add(self, *, prediction: str, reference: References) -> None:
        """Add one question; see :meth:`add_batch`."""
        super().add(prediction=_text(prediction), reference=_texts(reference))

    def add_batch(self, *, predictions: Sequence[str], references: Sequence[References]) -> None:
        """Add questions: an answer and a list of right answers each."""
        if len(predictions) != len(references):
            raise DataError(
                "questions", expected=f"references for {len(predictions)} predictions", got=str(len(references)),
                cure="Pass both in the same order of questions.",
            )  # fmt: skip
        super().add_batch(
            predictions=[_text(one) for one in predictions], references=[_texts(one) for one in references]
        )

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Value("string"),
            "references": datasets.List(datasets.Value("string")),
        }
        return evaluate.MetricInfo(
            description=self.summary,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
            reference_urls=["https://rajpurkar.github.io/SQuAD-explorer/"],
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[References], language: str = "en"
    ) -> dict[str, float]:
        check_language(language)
        if not len(predictions):
            raise DataError("questions", expected="at least one", got="none", cure="Pass predictions and references.")
        values = [
            self.value(prediction, right, language=language)
            for prediction, right in zip(predictions, references, strict=True)
        ]
        return {self.label: sum(values) / len(values)}


def _text(value: str) -> str:
    if not isinstance(value, str):
        raise DataError("predictions", expected="texts", got=repr(value)[:80], cure="Pass one text per question.")
    return value


def _texts(value: References) -> list[str]:
    if isinstance(value, str) or not value or any(not isinstance(one, str) for one in value):
        raise DataError(
            "references", expected="a list of one or more texts per question", got=repr(value)[:80],
            cure="Pass [text] for a single one, and leave questions without answers out.",
        )  # fmt: skip
    return list(value)

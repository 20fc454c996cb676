"""F1 of answers for the ``evaluate`` library; this file can be loaded by its path."""

from __future__ import annotations

from hf_corrector.answers import f1
from hf_corrector.evaluation.modules.base_answers import AnswerMetric, References


class F1Answers(AnswerMetric):
    """Mean F1 between the words (in Japanese the characters) of answers and of the nearest right one."""

    label = "f1"
    summary = "Mean F1 of words, in Japanese of characters, with the best of the references, as SQuAD v1.1."

    def value(self, prediction: str, references: References, *, language: str) -> float:
        """Return the F1 of one answer."""
        return f1(prediction, references, language=language)

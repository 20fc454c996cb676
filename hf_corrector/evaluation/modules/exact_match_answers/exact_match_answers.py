"""Exact match of answers for the ``evaluate`` library; this file can be loaded by its path."""

from __future__ import annotations

from hf_corrector.answers import exact_match
from hf_corrector.evaluation.modules.base_answers import AnswerMetric, References


class ExactMatchAnswers(AnswerMetric):
    """Share of answers that are one of the right ones, but for case, punctuation, spaces and English articles."""

    label = "exact_match"
    summary = "Share of answers that equal one of the references after normalising, as SQuAD v1.1 or for Japanese."

    def value(self, prediction: str, references: References, *, language: str) -> float:
        """Return 1 for a right answer, else 0."""
        return exact_match(prediction, references, language=language)

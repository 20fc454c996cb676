"""How right a written answer is, given the answers people gave: exact match, F1, and whether a passage holds it.

``language`` says how answers are made comparable:

- ``"en"``: as the official evaluation script of SQuAD v1.1 does (Rajpurkar et al., arXiv 1606.05250), to the letter:
  lower case, ASCII punctuation deleted, the words a, an and the deleted, white space made single spaces; F1 counts
  words. Languages that put spaces between words are in good hands here, their articles aside.
- ``"ja"``: JaQuAD's published evaluation counts characters other than white space (So et al., arXiv 2202.01764, its
  notebook), and nothing else is normalised there. Here Unicode's NFKC comes first, so that full and half width are one,
  then lower case, and punctuation of both widths is deleted, as is usual for Japanese sets like SQuAD; figures can
  therefore be a little above those of the notebook.

Of several references the best counts, as in SQuAD.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from hf_corrector.errors import ConfigurationError

LANGUAGES = ("en", "ja")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_WORD_OR_SIGN = re.compile(r"[^\W_]+|[^\w\s]|_")


def check_language(language: str) -> None:
    """Refuse a language nothing is known of.

    Raises:
        ConfigurationError: If it is none of :data:`LANGUAGES`.
    """
    if language not in LANGUAGES:
        raise ConfigurationError(
            "language of answers", expected=f"one of {LANGUAGES}", got=repr(language),
            cure="Choose 'en' for languages with spaces between words, 'ja' for Japanese.",
        )  # fmt: skip


def normalize_answer(text: str, *, language: str = "en") -> str:
    """Return a text without what does not count in comparing answers, see above.

    Raises:
        ConfigurationError: If the language is unknown.
    """
    check_language(language)
    if language == "ja":
        folded = unicodedata.normalize("NFKC", text).lower()
        # Unicode's categories P are punctuation, Z separators, C controls; the mark of long vowels is a letter.
        letters = (letter for letter in folded if unicodedata.category(letter)[0] not in "PZC")
        return "".join(letter for letter in letters if letter not in _PUNCTUATION)
    kept = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(prediction: str, references: Sequence[str], *, language: str = "en") -> float:
    """Return 1 if an answer is one of the references after normalising both, else 0.

    Raises:
        ConfigurationError: If the language is unknown or there is no reference.
    """
    return _best(_equal, prediction, references, language)


def f1(prediction: str, references: Sequence[str], *, language: str = "en") -> float:
    """Return the highest F1 between an answer's units and those of a reference: words, in Japanese characters.

    Raises:
        ConfigurationError: If the language is unknown or there is no reference.
    """
    return _best(_overlap, prediction, references, language)


def contains_answer(passage: str, answers: Sequence[str], *, language: str = "en") -> bool:
    """Tell whether a passage holds one of some answers.

    English as DPR does (Karpukhin et al., arXiv 2004.04906): the answer's words and signs follow each other in the
    passage, whatever their case. Japanese: the normalised answer is a part of the normalised passage. An answer without
    words is in no passage.

    Raises:
        ConfigurationError: If the language is unknown.
    """
    check_language(language)
    if language == "ja":
        whole = normalize_answer(passage, language=language)
        return any(part and part in whole for part in (normalize_answer(one, language=language) for one in answers))
    words = _padded(passage)
    return any(part != " " and part in words for part in map(_padded, answers))


def _padded(text: str) -> str:
    """Return words and signs with a space on either side of each, so that no part of a word is found."""
    return " ".join(["", *_WORD_OR_SIGN.findall(unicodedata.normalize("NFC", text).lower()), ""]) or " "


def _best(
    compare: Callable[[Sequence[str], Sequence[str]], float], prediction: str, references: Sequence[str], language: str
) -> float:
    if not references or isinstance(references, str):
        raise ConfigurationError(
            "references of an answer", expected="a list of at least one text", got=repr(references),
            cure="Leave questions without answers out, and pass [text] for a single one.",
        )  # fmt: skip
    written = _units(prediction, language)
    return max(compare(written, _units(reference, language)) for reference in references)


def _units(text: str, language: str) -> Sequence[str]:
    normalized = normalize_answer(text, language=language)
    return list(normalized) if language == "ja" else normalized.split()


def _equal(prediction: Sequence[str], reference: Sequence[str]) -> float:
    return float(list(prediction) == list(reference))


def _overlap(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Return F1 of two bags; of two empty ones 0, as in SQuAD v1.1."""
    common = sum((Counter(prediction) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)

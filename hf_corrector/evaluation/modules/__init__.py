"""Metrics of rankings and of answers for the ``evaluate`` library, one folder each, which run offline.

Load one by path, or import its class::

    ndcg = evaluate.load(module_path("ndcg_at_k"))
    ndcg.compute(predictions=[["d2", "d1"]], references=[{"d1": 2, "d7": 1}], k=10)  # {"ndcg@10": ...}
    f1 = evaluate.load(module_path("f1_answers"))
    f1.compute(predictions=["Nara"], references=[["Nara", "Heijo-kyo"]])  # {"f1": 1.0}
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

ModuleName: TypeAlias = Literal[
    "success_at_k", "recall_at_k", "mrr_at_k", "ndcg_at_k", "exact_match_answers", "f1_answers"
]


def module_path(name: ModuleName) -> str:
    """Return the folder to pass to ``evaluate.load``."""
    return str(Path(__file__).parent / name)

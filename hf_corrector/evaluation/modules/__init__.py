"""Ranking metrics for the ``evaluate`` library, one folder each, which run offline.

Load one by path, or import its class::

    ndcg = evaluate.load(module_path("ndcg_at_k"))
    ndcg.compute(predictions=[["d2", "d1"]], references=[{"d1": 2, "d7": 1}], k=10)  # {"ndcg@10": ...}
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

ModuleName: TypeAlias = Literal["success_at_k", "recall_at_k", "mrr_at_k", "ndcg_at_k"]


def module_path(name: ModuleName) -> str:
    """Return the folder to pass to ``evaluate.load``."""
    return str(Path(__file__).parent / name)

"""Processes that choose different targets stop, each saying so, before anything is encoded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from process_helpers import outcomes_on_ranks
from rag_helpers import rag_of, rag_trainer
from test_training_logs import trained

from hf_corrector import _distributed
from hf_corrector.candidate_sampling import sample_candidates
from hf_corrector.errors import DistributedError
from hf_corrector.rag import passage_choice
from hf_corrector.training import target_choice


def train_with_other_draws_in_one(encoder: str, out: Path, kind: str) -> None:
    """Train with a second process that rounds differently, so to say: it draws each target's neighbour."""

    def moved(scan: Any, *args: Any, **kwargs: Any) -> Any:
        sampled = sample_candidates(scan, *args, **kwargs)
        ids = (sampled.candidates.ids + _distributed.rank()) % len(scan)
        return replace(sampled, candidates=replace(sampled.candidates, ids=ids))

    passage_choice.sample_candidates = target_choice.sample_candidates = moved
    if kind == "dual encoder":
        trained(encoder, out, max_steps=1)
    else:
        rag_trainer(rag_of(encoder), out, max_steps=1, passages=kind).train()


@pytest.mark.parametrize("kind", ["dual encoder", "top_k", "softmax"])
def test_processes_that_choose_differently_stop(tiny_encoder: str, tmp_path: Path, kind: str) -> None:
    outcomes = outcomes_on_ranks(train_with_other_draws_in_one, 2, tiny_encoder, tmp_path, kind, timeout=120)
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome.error, DistributedError), outcome
        assert f"rank {number} of 2" in str(outcome.error)
        assert "expected the same targets on every process; got 2 different choices" in str(outcome.error)

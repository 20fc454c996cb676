"""Measuring a run: quality of search while it trains, and what correction recovered when it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from hf_corrector._distributed import is_main, on_main
from hf_corrector.data.retrieval import column, positives_as_rows
from hf_corrector.data.tokens import TokenStore
from hf_corrector.encoding import encode_rows
from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.evaluation.staleness import Conditions, StalenessReport, measure_staleness
from hf_corrector.index.base import TargetVectors, TensorVectors
from hf_corrector.index.exact import ExactIndex
from hf_corrector.metrics import quality
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.training import checks
from hf_corrector.training.cache_arguments import CacheTrainingArguments
from hf_corrector.training.live_cache import LiveCache, compute_dtype_of, encode_options_of


@dataclass(frozen=True)
class RunJudge:
    """What a run is measured with.

    Every process calls these together; searches are the main one's.

    Attributes:
        model: The encoder.
        args: Arguments of the run.
        targets: All targets.
        tokens: The same, tokenised.
        cost: Takes the encoder's passes.
    """

    model: DualEncoderModel
    args: CacheTrainingArguments
    targets: Dataset
    tokens: TokenStore
    cost: dict[str, int]

    def encode_queries(self, split: Dataset, model: DualEncoderModel | None = None) -> torch.Tensor:
        """Encode a split's queries, ``(q, dim)`` float32."""
        texts = column(split, "query")
        self.cost["query_passes"] += len(texts)
        encoder, hidden = self.model if model is None else model, self.args.disable_tqdm or not is_main()
        with tqdm(total=len(texts), desc="encode queries", unit="text", disable=hidden, leave=False) as bar:
            return encoder.encode_tokens(
                encoder.tokenize(texts, "query"), "query", token_budget=self.args.token_budget,
                compute_dtype=compute_dtype_of(self.args), progress=bar,
            )  # fmt: skip

    def encode_fresh(self) -> TensorVectors:
        """Encode all targets with the current weights into memory."""
        self.cost["final_target_passes"] += len(self.targets)
        rows, hidden = np.arange(len(self.targets)), self.args.disable_tqdm or not is_main()
        with tqdm(total=len(rows), desc="encode fresh targets", unit="text", disable=hidden) as bar:
            return TensorVectors(
                encode_rows(self.model, self.tokens, rows, options=encode_options_of(self.args), bar=bar)
            )

    def search_quality(self, split: Dataset, live: LiveCache | None) -> dict[str, float]:
        """Search the targets as training sees them, all encoded where it needs no cache, and return mean metrics."""
        view: TargetVectors = self.encode_fresh() if live is None else live.corrected
        queries = self.encode_queries(split)

        def search() -> dict[str, float]:
            ranked = ExactIndex(view, device=self.args.device).search(queries, 100).rows.cpu().numpy()
            values = quality(ranked, positives_as_rows(split, self.targets))
            return {name: float(value.mean()) for name, value in values.items()}

        found = on_main("searching the evaluation queries", search)
        if live is not None:
            # Only a search needs all corrected targets at once, and training has its own way of keeping them.
            live.corrected.invalidate()
        return found

    def measure(
        self, split: Dataset, live: LiveCache, *, old_model: DualEncoderModel | None, options: JudgeOptions | None
    ) -> StalenessReport:
        """Compare stale, corrected and fresh targets, and the old model kept.

        Raises:
            CacheMismatchError: If ``old_model`` is not the encoder that made the first cache.
        """
        old_queries = None
        if old_model is not None:
            checks.check_made_by(live.first, old_model)
            cast(torch.nn.Module, old_model).to(self.args.device)
            old_queries = self.encode_queries(split, old_model)
        conditions = Conditions(
            queries=self.encode_queries(split), stale=live.cache, corrected=live.corrected, fresh=self.encode_fresh(),
            old_queries=old_queries, old=live.first if old_model is not None else None,
        )  # fmt: skip
        options = JudgeOptions(device=self.args.device) if options is None else options

        def compare() -> StalenessReport:
            return measure_staleness(
                conditions, positives_as_rows(split, self.targets), fitted_rows=live.fitted_rows,
                scale=self.model.config.scale, options=options,
            )  # fmt: skip

        report = on_main("judging the run", compare)
        live.corrected.invalidate()
        return report

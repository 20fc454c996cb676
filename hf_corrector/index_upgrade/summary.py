"""What is said and recorded of an upgrade: rows with their costs, the head of the table, the record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_corrector.evaluation.evaluator import Judgement
from hf_corrector.evaluation.examples import judged_examples
from hf_corrector.evaluation.verdict import Verdict
from hf_corrector.index_upgrade.fits import Choice, Fit
from hf_corrector.index_upgrade.fresh_targets import FreshTargets
from hf_corrector.index_upgrade.inputs import UpgradeInputs
from hf_corrector.index_upgrade.judged_corpus import JudgedCorpus
from hf_corrector.index_upgrade.options import UpgradeOptions, Wanted
from hf_corrector.index_upgrade.report import Rates, UpgradeRow, upgrade_rows
from hf_corrector.records import COSTS, RunRecord


@dataclass(frozen=True, eq=False)
class Summary:
    """Facts of a run, and how they are written.

    Attributes:
        inputs: What it started from.
        wanted: Its arguments.
        options: All other settings.
        corpus: What was judged.
        fresh: What was re-encoded.
        other_queries: Queries encoded to choose pairs by traffic, and to choose a corrector.
    """

    inputs: UpgradeInputs
    wanted: Wanted
    options: UpgradeOptions
    corpus: JudgedCorpus
    fresh: FreshTargets
    other_queries: int

    @property
    def rates(self) -> Rates:
        """What a pass takes: as given, else as measured."""
        given = self.options.seconds_per_pass
        measured = self.fresh.seconds_per_pass
        return Rates(measured if given is None else given, given is None, self.options.price_per_hour)

    @property
    def query_passes(self) -> int:
        """Queries encoded: judged ones by each encoder, and others."""
        return len(self.inputs.judged) * (1 if self.inputs.old_model is None else 2) + self.other_queries

    def rows(self, judgement: Judgement, fits: list[Fit], choice: Choice) -> list[UpgradeRow]:
        """Make the rows of the table."""
        pairs, depth = self.wanted.num_pairs, min(self.options.rerank_depth, self.corpus.total)
        passes = dict.fromkeys(judgement.all_queries, (pairs, 0))
        passes |= {"old": (0, 0), "stale": (0, 0), "rerank": (0, depth), "fresh": (self.corpus.total, 0)}
        seconds = {fit.name: fit.seconds for fit in fits}
        seconds |= {"corrected": choice.fit.seconds, "partial_aligned": choice.fit.seconds}
        return upgrade_rows(judgement, choice.fit.name, passes=passes, fit_seconds=seconds, rates=self.rates)

    def head(self, judgement: Judgement) -> str:
        """Say what was judged."""
        corpus, queries = self.corpus, f"{judgement.clean_queries:,} clean queries"
        if judgement.clean_queries < judgement.queries:
            queries += f" of {judgement.queries:,}"
        if corpus.is_whole:
            return f"{queries}, all {corpus.total:,} targets; means with 95 % intervals"
        positives = len(self.inputs.positives)
        return (
            f"{queries}; judged on {len(corpus.rows):,} of {corpus.total:,} targets: all {positives:,} that answer a "
            f"query and {len(corpus.rows) - positives:,} random others, the same in every row.\nWith so few to confuse "
            "them all levels are higher than on the whole corpus; compare rows, not levels."
        )

    def costs(self) -> list[str]:
        """Say what this run took, and what adoption will."""
        fresh = self.fresh
        both = len(self.corpus.rows) + self.wanted.num_pairs - len(fresh.rows)
        lines = [
            f"This run re-encoded {fresh.passes:,} targets in {fresh.seconds:.1f} s ({self.wanted.num_pairs:,} pairs "
            f"and {len(self.corpus.rows):,} to judge by, {both:,} of them the same) and {self.query_passes:,} queries."
        ]
        lines += self._whole_corpus()
        if self.corpus.same_size or self.corpus.old_queries is not None:
            lines.append("Reranking costs its passes at every search, before it answers; repeated targets count again.")
        return lines

    def _whole_corpus(self) -> list[str]:
        """Say what a full re-embedding takes beside a correction."""
        rates, total = self.rates, self.corpus.total
        seconds = rates.seconds(total)
        if seconds is None or rates.seconds_per_pass is None:
            return ["All targets were there from an earlier run, so no pass was timed; give seconds_per_pass."]
        price, source = rates.price(seconds), "measured here" if rates.measured else "as given"
        return [
            f"Whole corpus of {total:,} targets at {1000 * rates.seconds_per_pass:.3g} s per 1,000 passes ({source}): "
            f"{seconds / 3600:.3g} hours to re-embed"
            + ("" if price is None else f", at a price of {price:,.2f}")
            + f"; correction takes {self.wanted.num_pairs:,} passes"
            + (", and one reading of the cache." if self.wanted.direction == "targets" else ".")
        ]

    def record(
        self, judgement: Judgement, rows: list[UpgradeRow], verdict: Verdict, choice: Choice,
        seconds: Mapping[str, float],
    ) -> RunRecord:  # fmt: skip
        """Make ``run.json``; the chosen corrector has noted between which encoders it leads."""
        inputs, pairs = self.inputs, self.wanted.num_pairs
        cost = {
            **dict.fromkeys(COSTS, 0), "pair_target_passes": pairs,
            "measurement_target_passes": len(self.fresh.rows) - pairs, "query_passes": self.query_passes,
        }  # fmt: skip
        arguments = {
            **asdict(self.wanted), "old_cache": str(inputs.cache.path),
            "new_model": str(inputs.model.config.name_or_path),
            "old_model": None if inputs.old_model is None else str(inputs.old_model.config.name_or_path),
            "data": inputs.data_name, "judged_split": inputs.split_name,
            "judged_targets": len(self.corpus.rows), **_plain(self.options),
        }  # fmt: skip
        more = {"losses_left_out": dict(choice.losses), "chosen": choice.fit.name}
        return RunRecord(
            command="upgrade", seed=self.options.seed, arguments=arguments,
            evaluation={**judgement.to_dict(), **more}, cost=cost, timing=dict(seconds),
            manifests=[inputs.cache.manifest.to_dict()],
            rows=[row.to_dict(judgement.primary) for row in rows], verdict=verdict.to_dict(),
            examples=self._examples(judgement),
            corrector=choice.fit.model.describe(),
        )  # fmt: skip

    def _examples(self, judgement: Judgement) -> dict[str, Any]:
        inputs = self.inputs
        if not self.options.examples:
            return {}
        return judged_examples(
            judgement, inputs.relevant, split=inputs.judged, corpus=inputs.data.corpus, seed=self.options.seed
        )


def _plain(options: UpgradeOptions) -> dict[str, Any]:
    """Return the settings a reader of the record asks for, as JSON values."""
    judging, encoding = options.judging, options.encoding
    return {
        "slice_by": list(options.slice_by), "kinds": list(options.kinds), "split": options.split,
        "judge_queries": options.judge_queries, "judge_targets": options.judge_targets,
        "rerank_depth": options.rerank_depth, "duplicate_cosine": options.duplicate_cosine,
        "seconds_per_pass": options.seconds_per_pass, "price_per_hour": options.price_per_hour,
        "metrics": list(judging.metrics), "primary": judging.primary, "resamples": judging.resamples,
        "compute_dtype": encoding.compute_dtype,
    }  # fmt: skip

"""``upgrade``: what to do about millions of vectors of an old encoder, tried on a few and said in one sentence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hf_corrector._progress import working
from hf_corrector.evaluation.evaluator import clean_queries, compare
from hf_corrector.evaluation.verdict import decide
from hf_corrector.evaluation.verdict_checklist import Watched, checklist
from hf_corrector.index_upgrade.conditions import judge_conditions
from hf_corrector.index_upgrade.fits import Fit, choose, fit_all
from hf_corrector.index_upgrade.fitted_corrector import FittedCorrector
from hf_corrector.index_upgrade.fresh_targets import FreshTargets
from hf_corrector.index_upgrade.inputs import Cache, Data, Encoder, UpgradeInputs, check_pair_count, load_inputs
from hf_corrector.index_upgrade.judged_corpus import Search
from hf_corrector.index_upgrade.measuring import (
    Urgency,
    available_sides,
    choice_options,
    details_of_side,
    evidence_of,
    fit_pairs,
    judged_corpus,
    pair_choice,
    query_slices,
)
from hf_corrector.index_upgrade.options import UpgradeOptions, Wanted
from hf_corrector.index_upgrade.report import UpgradeReport
from hf_corrector.index_upgrade.summary import Summary
from hf_corrector.metrics import FloatArray
from hf_corrector.pair_choice import PairChoice
from hf_corrector.records import FittedTargets
from hf_corrector.side_features import SideFeatures


def upgrade(  # noqa: PLR0913 - the questions a user answers, each with a default; all the rest is in the options
    old_cache: Cache,
    new_model: Encoder,
    data: Data,
    *,
    num_pairs: int = 2000,
    old_model: Encoder | None = None,
    kind: str = "auto",
    side: str | None = "auto",
    pairs: str = "random",
    direction: str = "targets",
    options: UpgradeOptions | None = None,
) -> UpgradeReport:
    """Try an index upgrade without re-embedding, compare it with every alternative and decide.

    A few targets are re-encoded, correctors are fitted to them, and every way to go on is judged on the same queries:
    the old model kept, the stale index, each corrector, a part re-embedded at the same budget, reranking, and a full
    re-embedding, for which the judged targets are re-encoded too (see :attr:`UpgradeOptions.judge_targets`). What
    answers a judged query never is among the fitting pairs.

    Where correctors may read the targets' tokens and the old cache stores none, they are counted once and stored in its
    folder, as ``hf-corrector embed`` does, and so are the new encoder's word embeddings, averaged for each target, with
    ``side="word_embeddings"``; its vectors are only read. If nothing can be written there, the saved report keeps the
    side features with the corrector.

    Args:
        old_cache: Vectors of the old encoder: a cache or its folder.
        new_model: The new encoder: a :class:`DualEncoderModel`, a saved one, or any encoder by folder or Hub id.
        data: The targets the cache was made from, with judged queries: data, a BEIR folder or a Hub id.
        num_pairs: Targets to re-encode as fitting pairs.
        old_model: The encoder that made the cache; by default the one the cache names, if it is on this machine.
        kind: Kind of corrector to adopt; ``"auto"`` decides by errors on pairs left out.
        side: Kind of side features; ``"auto"`` uses the targets' tokens where that helps, None uses none.
        pairs: How pairs are chosen: ``"random"``, ``"diverse"`` or ``"traffic"``.
        direction: ``"targets"`` corrects the index; ``"queries"`` maps new queries to the old one, left untouched.
        options: All other settings.

    Returns:
        The report; if ``report.go``, then ``report.corrector.apply(old, new)``.

    Raises:
        CacheMismatchError: If the cache is of other targets, or of another encoder than ``old_model``.
        ConfigurationError: If an argument cannot be used.
        DataError: If there are no queries to judge on, or too few targets to fit on.
    """
    options = UpgradeOptions() if options is None else options
    wanted, clock = Wanted(num_pairs, kind, side, pairs, direction), Clock()
    check_pair_count(num_pairs)
    with working("load and check the inputs", shown=options.encoding.progress):
        inputs = load_inputs(old_cache, new_model, data, old_model=old_model, options=options)
    clock.lap("load")
    return _run(inputs, wanted, options, clock)


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
        self.seconds["total"] = now - self.started


def _run(inputs: UpgradeInputs, wanted: Wanted, options: UpgradeOptions, clock: Clock) -> UpgradeReport:
    slices = query_slices(inputs, options)
    fresh = FreshTargets(inputs, _folder(options), options=options.encoding)
    with working("choose fitting pairs", shown=options.encoding.progress):
        chosen = pair_choice(inputs, wanted, options)
    with working("read side features", shown=options.encoding.progress):
        sides = available_sides(inputs, wanted)
    pairs = fit_pairs(inputs, chosen.choice, fresh, sides=sides, direction=wanted.direction)
    clock.lap("encode_pairs")
    kinds = options.kinds if wanted.kind in ("auto", *options.kinds) else (*options.kinds, wanted.kind)
    fits, notes = fit_all(pairs, kinds, seed=options.seed, progress=options.encoding.progress)
    choosing = choice_options(inputs, wanted, options)
    with working("choose a corrector", shown=options.encoding.progress):
        choice = choose(fits, choosing, kind=wanted.kind, side=wanted.side)
    clock.lap("fit")
    corpus = judged_corpus(inputs, fresh, options, sides=sides, direction=wanted.direction)
    clock.lap("encode_judged")
    search = Search(corpus, options.judging)
    judged = judge_conditions(search, fits, choice.fit, num_pairs=wanted.num_pairs, options=options)
    clean = clean_queries(inputs.relevant, chosen.choice.rows)  # all of them, by the way pairs are chosen
    judgement = compare(judged.per_query, clean=clean, options=options.judging, ranked=judged.ranked)
    evidence = evidence_of(inputs, judgement, slices, wanted=wanted, options=options, clean=clean)
    traffic = chosen.traffic if options.reembed_by_traffic else None
    urgency = Urgency(inputs, choice.fit, traffic=traffic, seed=options.seed)
    verdict = decide(evidence, options.thresholds, reembed=_reembed(urgency, search, inputs, judgement.primary))
    clock.lap("judge")
    watched = Watched(corpus.cosines(choice.fit, without=chosen.choice.rows), judged.overlap)
    other_queries = chosen.query_passes + (0 if choosing.queries is None else len(choosing.queries))
    summary = Summary(inputs, wanted, options, corpus, fresh, other_queries)
    rows = summary.rows(judgement, fits, choice)
    corrector = _corrector(inputs, choice.fit, chosen.choice, sides=sides, direction=wanted.direction)
    return UpgradeReport(
        decision=verdict, rows=rows, judgement=judgement, pairs=chosen.choice,
        corrector=corrector,
        record=summary.record(judgement, rows, verdict, choice, clock.seconds),
        checklist=checklist(verdict, evidence, watched), reembed_first=urgency.first(verdict.reembed_share),
        head=summary.head(judgement), ids=inputs.cache.ids, fresh=fresh,
        footer=(choice.sentence, *summary.costs(), *notes, *judged.notes, *inputs.notes),
    )  # fmt: skip


def _folder(options: UpgradeOptions) -> Path | None:
    return None if options.output_dir is None else Path(options.output_dir)


def _reembed(
    urgency: Urgency, search: Search, inputs: UpgradeInputs, metric: str
) -> Callable[[float], FloatArray] | None:
    """Return how parts of the corpus are judged re-embedded; nothing is fitted before it is asked."""
    if search.corpus.direction == "queries":
        # Old and new vectors in one index would have to be asked by two queries, whose scores do not compare.
        return None
    built: list[Callable[[float], FloatArray]] = []

    def quality(share: float) -> FloatArray:
        if not built:
            built.append(urgency.reembedding(search, inputs.positives, metric=metric))
        return built[0](share)

    return quality


def _corrector(
    inputs: UpgradeInputs, fit: Fit, choice: PairChoice, *, sides: Mapping[str, SideFeatures], direction: str
) -> FittedCorrector:
    leads_to = inputs.model.fingerprint("target") if direction == "targets" else inputs.cache.fingerprint
    rows, new = tuple(choice.rows.tolist()), inputs.model.fingerprint("target")
    fit.model.note_encoders(stale=inputs.cache.fingerprint, fresh=new, direction=direction)
    fitted = FittedTargets(
        cache=inputs.cache.manifest.checksum, encoder=new.digest, rows=rows,
        ids=tuple(inputs.cache.ids[row] for row in rows), encoder_fingerprint=new.to_dict(),
        side_details=details_of_side(inputs, fit.side, sides), direction=direction,
    )  # fmt: skip
    return FittedCorrector(fit.model, fitted, leads_to, direction, None if fit.side is None else sides[fit.side])

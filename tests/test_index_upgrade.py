"""A whole upgrade with small encoders: what is measured, what is said and what is kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import save_bert
from upgrade_helpers import QUERIES, TARGETS, cache_of, make_data, new_encoder, old_encoder

import hf_corrector
from hf_corrector.cache.folder_lock import locked
from hf_corrector.cache.side_store import open_side, side_details, stored_sides
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.data.retrieval import RetrievalData
from hf_corrector.encoding import EncodeOptions
from hf_corrector.errors import CacheMismatchError, ConfigurationError, DataError
from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.evaluation.verdict import Thresholds
from hf_corrector.index.exact import ExactIndex
from hf_corrector.index_upgrade.conditions import ErrorPredictor
from hf_corrector.index_upgrade.corpus_sides import CorpusSide
from hf_corrector.index_upgrade.fits import FitPairs, fit_one
from hf_corrector.index_upgrade.fitted_corrector import FittedCorrector
from hf_corrector.index_upgrade.inputs import UpgradeInputs
from hf_corrector.index_upgrade.measuring import LOGGED_DEPTH, Urgency
from hf_corrector.index_upgrade.options import UpgradeOptions
from hf_corrector.index_upgrade.report import UpgradeReport
from hf_corrector.index_upgrade.upgrading import upgrade
from hf_corrector.metrics import mrr_at_k
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.pair_choice import traffic_of_searches
from hf_corrector.records import EncoderFingerprint, RunRecord

KINDS = ("mean_shift", "affine")
FAST = UpgradeOptions(kinds=KINDS, judging=JudgeOptions(resamples=300))
PAIRS = 150


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data()


@pytest.fixture(scope="module")
def old(tiny_encoder: str) -> DualEncoderModel:
    return old_encoder(tiny_encoder)


@pytest.fixture(scope="module")
def new(tiny_encoder: str) -> DualEncoderModel:
    return new_encoder(tiny_encoder)


@pytest.fixture(scope="module")
def cache(old: DualEncoderModel, data: RetrievalData, tmp_path_factory: pytest.TempPathFactory) -> TargetCache:
    return cache_of(old, data, tmp_path_factory.mktemp("old") / "cache")


@pytest.fixture(scope="module")
def report(cache: TargetCache, new: DualEncoderModel, old: DualEncoderModel, data: RetrievalData) -> UpgradeReport:
    options = replace(FAST, slice_by=("site", "date"), price_per_hour=3.6, seconds_per_pass=2.0)
    return upgrade(cache, new, data, num_pairs=PAIRS, old_model=old, side=None, options=options)


def test_root_name_is_the_function_even_after_its_modules_were_imported() -> None:
    assert hf_corrector.upgrade is upgrade and hf_corrector.UpgradeReport is UpgradeReport


def test_a_drift_that_can_be_corrected_is_a_go(report: UpgradeReport) -> None:
    assert report.go and report.verdict.startswith("Go: correct the index")
    means = {row.method: row.metrics["mrr@10"].estimate for row in report.rows}
    assert means["old"] < means["corrected"] <= means["fresh"] + 0.02
    assert means["partial"] < means["partial_aligned"]
    assert means["stale"] < means["affine"] == means["corrected"]


def test_every_row_equals_a_plain_computation(
    report: UpgradeReport, cache: TargetCache, new: DualEncoderModel, old: DualEncoderModel, data: RetrievalData
) -> None:
    texts, queries = data.corpus["text"][:], data.test["query"][:]
    fresh, asked = new.encode_target(texts), new.encode_query(queries)
    relevant = [{row: 1.0} for row in range(QUERIES)]

    def mrr(query_vectors: torch.Tensor, targets: torch.Tensor) -> float:
        ranked = np.argsort(-(query_vectors.double() @ targets.double().T).float().numpy(), axis=1, kind="stable")
        return float(mrr_at_k(ranked[:, :10], relevant, k=10).mean())

    stale = cache.read(0, len(cache)).float()
    expected = {
        "old": mrr(old.encode_query(queries), stale), "stale": mrr(asked, stale), "fresh": mrr(asked, fresh),
        "corrected": mrr(asked, report.corrector.model.correct(stale)),
    }  # fmt: skip
    found = {row.method: row.metrics["mrr@10"].estimate for row in report.rows}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_no_positive_of_a_judged_query_is_fitted_on_and_all_queries_are_clean(report: UpgradeReport) -> None:
    assert len(report.pairs.rows) == PAIRS and report.pairs.rows.min() >= QUERIES
    assert report.judgement.clean_queries == report.judgement.queries == QUERIES
    assert report.corrector.fitted.rows == tuple(report.pairs.rows.tolist())


def test_passes_time_and_price_are_counted(report: UpgradeReport) -> None:
    rows = {row.method: row for row in report.rows}
    assert {name: row.passes for name, row in rows.items()} == {
        "old": 0, "stale": 0, "mean_shift": PAIRS, "affine": PAIRS, "corrected": PAIRS, "partial": PAIRS,
        "partial_aligned": PAIRS, "rerank": 0, "fresh": TARGETS,
    }  # fmt: skip
    assert rows["rerank"].passes_per_query == 100
    assert rows["fresh"].seconds == pytest.approx(2.0 * TARGETS)
    assert rows["fresh"].price == pytest.approx(2.0 * TARGETS / 3600 * 3.6)
    assert rows["affine"].seconds > 2.0 * PAIRS
    cost = report.record.cost
    assert cost["pair_target_passes"] + cost["measurement_target_passes"] == TARGETS
    assert cost["query_passes"] == 3 * QUERIES
    assert report.fresh.passes == TARGETS


def test_slices_of_queries_and_of_their_targets_are_judged(
    report: UpgradeReport, cache: TargetCache, new: DualEncoderModel, data: RetrievalData
) -> None:
    names = [row.name for row in report.decision.slices]
    assert {"site=x", "site=y", "date=2020", "date=2021"} <= set(names)
    assert "site=other, pooled" in names  # six queries of a rare site
    assert report.decision.worst_slice is not None and report.decision.worst_slice.judged
    assert report.decision.worst_slice.name in report.checklist
    with pytest.raises(DataError, match="slice_by 'nothing'"):
        upgrade(cache, new, data, num_pairs=PAIRS, side=None, options=replace(FAST, slice_by=("nothing",)))


def test_saved_report_holds_corrector_pairs_vectors_and_record(
    report: UpgradeReport, new: DualEncoderModel, tmp_path: Path
) -> None:
    out = report.save(tmp_path / "out")
    record = RunRecord.load(out)
    assert [row["method"] for row in record.rows] == [row.method for row in report.rows]
    assert {"method", "metrics", "recovery", "interval", "passes", "seconds"} <= record.rows[2].keys()
    assert record.verdict["decision"] == "go" and record.verdict["sentence"] == report.verdict
    assert {"worst_slice", "thresholds"} <= record.verdict.keys()
    pairs = json.loads((out / "pairs.json").read_text())
    assert pairs["ids"] == [f"t{row}" for row in report.pairs.rows] and pairs["method"] == "random"
    kept = [TargetCache.open(path) for path in sorted((out / "fresh").iterdir())]
    assert sum(len(one) for one in kept) == TARGETS
    text = make_data().corpus["text"][7]
    (holder,) = [one for one in kept if "t7" in set(one.ids)]
    torch.testing.assert_close(holder.gather(holder.rows_of(["t7"])), new.encode_target([text]), atol=1e-5, rtol=0)
    assert (out / "corrector" / "model.safetensors").is_file()


def test_applied_cache_is_searched_as_the_table_says(
    report: UpgradeReport, cache: TargetCache, new: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    corrected = report.corrector.apply(str(cache.path), tmp_path / "new_cache")
    assert corrected.fingerprint.corrected_from is not None
    found = ExactIndex(corrected).search(new.encode_query(data.test["query"][:]), 10).rows.numpy()
    value = mrr_at_k(found, [{row: 1.0} for row in range(QUERIES)], k=10).mean()
    row = next(row for row in report.rows if row.method == "corrected")
    assert value == pytest.approx(row.metrics["mrr@10"].estimate, abs=1e-6)
    with pytest.raises(CacheMismatchError, match="corrected ones"):
        upgrade(corrected, new, data, num_pairs=PAIRS, options=FAST)


def test_new_model_that_is_no_better_keeps_the_old_one(
    cache: TargetCache, new: DualEncoderModel, old: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    better = cache_of(new, data, tmp_path / "cache")
    report = upgrade(better, old, data, num_pairs=PAIRS, old_model=new, side=None, options=FAST)
    assert not report.go and report.decision.exit_code == 3
    assert "keeping the old model is better" in report.verdict and "Nothing to adopt" in report.checklist
    same = upgrade(cache, old, data, num_pairs=PAIRS, side=None, options=FAST)
    assert not same.go and "old" in {row.method for row in same.rows}


def test_part_to_reembed_first_is_named_worst_first_and_written(
    cache: TargetCache, new: DualEncoderModel, old: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    rules = Thresholds(min_recovery=0.95, reembed_shares=(0.1, 0.3, 0.5, 0.8, 0.9))
    options = replace(FAST, kinds=("affine",), thresholds=rules)
    report = upgrade(cache, new, data, num_pairs=20, old_model=old, side=None, options=options)
    assert report.decision.decision == "re-embed first", report.verdict
    share = report.decision.reembed_share
    assert share is not None and len(report.reembed_first) == round(share * TARGETS)
    out = report.save(tmp_path / "out")
    listed = [json.loads(line) for line in (out / "reembed_first.jsonl").read_text().splitlines()]
    assert listed == [f"t{row}" for row in report.reembed_first]
    assert len(set(listed)) == len(listed) and f"{100 * share:.0f} %" in report.checklist


@pytest.mark.parametrize("with_traffic", [False, True])
def test_what_to_reembed_first_is_ordered_over_the_whole_of_a_large_corpus(with_traffic: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    stale = torch.randn(70_000, 4, generator=generator)
    stale[65_536:, 0] += 4.0  # the last ones, read after the others, are served worse
    goal = stale + torch.randn(stale.shape, generator=generator) * (1 + stale[:, :1].clamp(min=0))
    chosen = fit_one(
        FitPairs(np.arange(69_000, 69_400), stale[69_000:69_400], goal[69_000:69_400], None, normalize=False),
        "affine", None, seed=0,
    )  # fmt: skip
    made = EncoderFingerprint.of_precomputed("vendor-model", normalize=False)
    cache = TargetCache.from_arrays(tmp_path / "large", stale, [str(row) for row in range(70_000)], fingerprint=made)
    traffic = np.random.default_rng(0).poisson(1.0, 70_000).astype(np.float64) if with_traffic else None
    inputs = UpgradeInputs(cache, None, None, None, None, None, [], ())  # type: ignore[arg-type]
    predicted = ErrorPredictor.fit(chosen, seed=0).predict(stale)
    assert predicted[:65_536].min() < 0 < predicted[65_536:].mean()
    urgent = predicted if traffic is None else np.maximum(predicted, 0) * (1 + traffic)
    first = Urgency(inputs, chosen, traffic=traffic, seed=0).first(0.1)
    assert np.array_equal(first, np.argsort(-urgent, kind="stable")[:7000])


def test_what_to_reembed_first_is_weighed_by_traffic_only_where_that_is_asked_for(
    cache: TargetCache, new: DualEncoderModel, old: DualEncoderModel, data: RetrievalData
) -> None:
    log = {str(query): 5.0 for query in data.train["query"][:10]}
    rules = Thresholds(min_recovery=0.95, reembed_shares=(0.3, 0.9))
    options = replace(FAST, kinds=("affine",), thresholds=rules, query_log=log)
    found = ExactIndex(cache).search(old.encode_query(list(log)), LOGGED_DEPTH).rows.numpy()
    traffic = traffic_of_searches(found, len(cache), counts=list(log.values()))
    asked_for = {}
    for weigh in (False, True):
        changed = replace(options, reembed_by_traffic=weigh)
        report = upgrade(cache, new, data, num_pairs=20, old_model=old, side=None, pairs="traffic", options=changed)
        assert report.decision.decision == "re-embed first", report.verdict
        asked_for[weigh] = traffic[report.reembed_first[:50]].mean()
    assert asked_for[True] > 2 * asked_for[False]
    with pytest.raises(ConfigurationError, match="reembed_by_traffic"):
        upgrade(
            cache, new, data, num_pairs=20, old_model=old, side=None, options=replace(FAST, reembed_by_traffic=True)
        )


def test_sample_of_the_corpus_is_judged_and_said_so(
    cache: TargetCache, new: DualEncoderModel, old: DualEncoderModel, data: RetrievalData
) -> None:
    options = replace(FAST, judge_targets=80, judge_queries=50)
    report = upgrade(cache, new, data, num_pairs=100, old_model=old, side=None, options=options)
    assert "judged on 130 of 400 targets" in report.table() and "50 clean queries" in report.table()
    assert report.fresh.passes < TARGETS and report.judgement.queries == 50
    fresh = next(row for row in report.rows if row.method == "fresh")
    assert fresh.passes == TARGETS
    assert report.record.arguments["judged_targets"] == 130


def test_queries_can_be_mapped_to_the_old_index(
    cache: TargetCache, new: DualEncoderModel, old: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    report = upgrade(cache, new, data, num_pairs=PAIRS, old_model=old, direction="queries", options=FAST)
    means = {row.method: row.metrics["mrr@10"].estimate for row in report.rows}
    assert "partial_aligned" not in means and means["affine"] > means["stale"]
    queries = report.corrector.map_queries(new.encode_query(data.test["query"][:]))
    found = ExactIndex(cache).search(queries, 10).rows.numpy()
    assert mrr_at_k(found, [{row: 1.0} for row in range(QUERIES)], k=10).mean() == pytest.approx(means["corrected"])
    with pytest.raises(ConfigurationError, match="map_queries"):
        report.corrector.apply(cache, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_vectors_of_another_size_are_corrected_too(
    cache: TargetCache, tiny_encoder: str, old: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    small = new_encoder(tiny_encoder, dim=24)
    report = upgrade(cache, small, data, num_pairs=PAIRS, old_model=old, side=None, options=FAST)
    methods = [row.method for row in report.rows]
    assert "stale" not in methods and "mean_shift" not in methods and "rerank" in methods
    assert "differ in size" in report.table()
    assert report.corrector.apply(cache, tmp_path / "small").dim == 24


def test_pairs_follow_the_query_log_or_are_spread(
    cache: TargetCache, new: DualEncoderModel, old: DualEncoderModel, data: RetrievalData
) -> None:
    log = {str(query): 5.0 for query in data.train["query"][:20]}
    options = replace(FAST, query_log=log)
    report = upgrade(cache, new, data, num_pairs=60, old_model=old, side=None, pairs="traffic", options=options)
    assert report.pairs.method == "traffic" and report.pairs.weights is not None
    assert report.record.cost["query_passes"] == 3 * QUERIES + 20
    asked = upgrade(cache, new, data, num_pairs=60, old_model=old, side=None, pairs="traffic", options=FAST)
    assert asked.record.cost["query_passes"] == 4 * QUERIES
    assert upgrade(cache, new, data, num_pairs=60, side=None, pairs="diverse", options=FAST).pairs.method == "diverse"


def test_names_and_folders_open_the_same_upgrade_and_killed_runs_encode_nothing_twice(
    cache: TargetCache, new: DualEncoderModel, old: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    new.save_pretrained(str(tmp_path / "new"))
    old.save_pretrained(str(tmp_path / "old"))
    options = replace(FAST, output_dir=tmp_path / "out", encoding=EncodeOptions(progress=False))
    settings = {"num_pairs": PAIRS, "old_model": str(tmp_path / "old"), "side": None, "options": options}
    first = upgrade(str(cache.path), str(tmp_path / "new"), data, **settings)
    again = upgrade(cache.path, tmp_path / "new", data, **settings)
    assert first.fresh.passes == TARGETS and again.fresh.passes == 0
    assert first.judgement.to_dict() == again.judgement.to_dict()
    (tmp_path / "out" / "fresh" / "part-00009").mkdir()  # what a killed run leaves
    assert upgrade(cache, new, data, **settings).fresh.passes == 0


def test_old_model_is_found_by_the_name_in_the_cache(
    new: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    folder = save_bert(tmp_path / "plain", seed=3)
    cache = cache_of(DualEncoderModel.from_encoder(folder, target_max_length=20), data, tmp_path / "cache")
    report = upgrade(cache, new, data, num_pairs=PAIRS, side=None, options=FAST)
    assert report.rows[0].method == "old"
    assert f"got the prompt '' and were cut to {new.config.query_max_length} tokens" in report.table()
    save_bert(Path(folder), seed=4)
    report = upgrade(cache, new, data, num_pairs=PAIRS, side=None, options=FAST)
    assert report.rows[0].method == "stale" and "is not (any more) the encoder" in report.table()


def test_vectors_without_an_encoder_can_be_upgraded(
    cache: TargetCache, new: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    made = EncoderFingerprint.of_precomputed("vendor-model", normalize=True)
    vectors = cache.read(0, len(cache)).float()
    bare = TargetCache.from_arrays(tmp_path / "bare", vectors, list(cache.ids), fingerprint=made)
    report = upgrade(bare, new, data, num_pairs=PAIRS, side=None, options=FAST)
    assert report.go and "old model kept could not be judged" in report.verdict
    assert "'vendor-model' is not on this machine" in report.table()


def test_kind_and_side_that_were_asked_for_are_adopted(
    cache: TargetCache, new: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    report = upgrade(cache, new, data, num_pairs=PAIRS, kind="low_rank", side="word_embeddings", options=FAST)
    assert report.corrector.model.config.kind == "low_rank"
    assert report.corrector.model.config.side == "word_embeddings"
    assert {"affine", "affine + word_embeddings", "low_rank + word_embeddings"} <= {row.method for row in report.rows}
    assert "corrected: low_rank + word_embeddings" in report.table()
    assert len(report.corrector.apply(cache, tmp_path / "new")) == TARGETS
    with_tokens = upgrade(cache, new, data, num_pairs=PAIRS, kind="affine", side="tokens", options=FAST)
    assert with_tokens.corrector.fitted.side_details == side_details(cache, "tokens") != {}
    chosen = upgrade(cache, new, data, num_pairs=PAIRS, options=FAST)
    assert "affine + tokens" in {row.method for row in chosen.rows}
    assert "left out of the fit" in chosen.table() and chosen.record.evaluation["losses_left_out"]


def without_tokens(cache: TargetCache, path: Path) -> TargetCache:
    made = EncoderFingerprint.of_precomputed("vendor-model", normalize=True)
    return TargetCache.from_arrays(path, cache.read(0, len(cache)).float(), list(cache.ids), fingerprint=made)


def test_tokens_the_old_cache_lacks_are_stored_with_it_so_that_they_can_be_applied(
    cache: TargetCache, new: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    bare = without_tokens(cache, tmp_path / "bare")
    settings = {"num_pairs": PAIRS, "kind": "affine", "side": "tokens", "options": FAST}
    report = upgrade(bare, new, data, **settings)
    assert stored_sides(bare) == ("tokens",)
    counts, wanted = open_side(bare, "tokens", verify="full"), open_side(cache, "tokens")
    rows = np.arange(TARGETS)
    assert torch.equal(counts.gather(rows).to_dense(), wanted.gather(rows).to_dense())
    assert side_details(bare, "tokens") == side_details(cache, "tokens")
    assert torch.equal(report.corrector.model.side_idf, wanted.statistics().idf)  # of the whole corpus
    out = report.save(tmp_path / "out")
    assert not list((out / "corrector").glob("side-*"))
    loaded = FittedCorrector.load(out / "corrector").apply(bare.path, tmp_path / "new")
    expected = report.corrector.apply(bare, tmp_path / "new2")
    assert torch.equal(loaded.read(0, TARGETS), expected.read(0, TARGETS))


def test_word_embeddings_are_stored_with_the_cache_so_that_a_loaded_corrector_applies(
    cache: TargetCache, new: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    bare = without_tokens(cache, tmp_path / "bare")
    settings = {"num_pairs": PAIRS, "kind": "affine", "side": "word_embeddings", "options": FAST}
    report = upgrade(bare, new, data, **settings)
    assert stored_sides(bare) == ("word_embeddings",)
    read_off = CorpusSide(data.corpus, new, "word_embeddings")
    stored = open_side(bare, "word_embeddings", verify="full")
    torch.testing.assert_close(stored.read(0, TARGETS), read_off.read(0, TARGETS), atol=1e-6, rtol=0)
    assert report.corrector.fitted.side_details == side_details(bare, "word_embeddings") == read_off.details()
    out = report.save(tmp_path / "out")
    assert not list((out / "corrector").glob("side-*"))
    loaded = FittedCorrector.load(out / "corrector").apply(bare.path, tmp_path / "new")
    expected = report.corrector.apply(bare, tmp_path / "new2")
    assert torch.equal(loaded.read(0, TARGETS), expected.read(0, TARGETS))
    again = upgrade(bare, new, data, **settings)
    assert again.judgement.to_dict() == report.judgement.to_dict()


@pytest.mark.parametrize("kind", ["tokens", "word_embeddings"])
def test_side_features_are_kept_with_the_corrector_where_the_cache_cannot_be_written(
    cache: TargetCache, new: DualEncoderModel, data: RetrievalData, tmp_path: Path, kind: str
) -> None:
    bare = without_tokens(cache, tmp_path / "bare")
    settings = {"num_pairs": PAIRS, "kind": "affine", "side": kind, "options": FAST}
    with locked(bare.path):
        report = upgrade(bare, new, data, **settings)
        out = report.save(tmp_path / "out")
        assert stored_sides(bare) == ()
        with pytest.raises(CacheMismatchError, match=rf"copy the files side-{kind}\.g0\.safetensors"):
            open_side(bare, kind)
        loaded = FittedCorrector.load(out / "corrector").apply(bare, tmp_path / "new")
    model, side = report.corrector.model, CorpusSide(data.corpus, new, kind)
    if kind == "tokens":
        assert torch.equal(model.side_idf, side.statistics().idf)  # of the whole corpus
    assert torch.allclose(loaded.read(0, TARGETS), model.correct(bare.read(0, TARGETS), side), atol=1e-6)
    for path in (out / "corrector").glob("side-*"):
        shutil.copy(path, bare.path)
    assert len(open_side(bare, kind, verify="full")) == TARGETS


def test_kept_vectors_of_other_texts_under_the_same_ids_are_made_anew(
    cache: TargetCache, new: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    bare, settings = without_tokens(cache, tmp_path / "bare"), {"num_pairs": PAIRS, "side": None}
    options = replace(FAST, output_dir=tmp_path / "out")
    assert upgrade(bare, new, data, options=options, **settings).fresh.passes == TARGETS
    texts = [*data.corpus["text"][:-3], "ping", "port", "page"]
    other = replace(data, corpus=data.corpus.remove_columns("text").add_column("text", texts))
    report = upgrade(bare, new, other, options=options, **settings)
    assert report.fresh.passes == 3
    rows = np.arange(TARGETS)
    assert torch.allclose(report.fresh.gather(rows), new.encode_target(texts), atol=1e-5)
    assert upgrade(bare, new, data, options=options, **settings).fresh.passes == 0


def test_mistakes_are_explained_before_any_work(
    cache: TargetCache, new: DualEncoderModel, data: RetrievalData, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="at least 2"):
        upgrade(cache, new, data, num_pairs=1)
    with pytest.raises(ConfigurationError, match="kind: expected one of"):
        upgrade(cache, new, data, kind="magic")
    with pytest.raises(ConfigurationError, match="direction"):
        upgrade(cache, new, data, direction="sideways")
    with pytest.raises(ConfigurationError, match="side"):
        upgrade(cache, new, data, direction="queries", side="tokens")
    with pytest.raises(ConfigurationError, match="a method among"):
        upgrade(cache, new, data, num_pairs=10, pairs="magic", options=FAST)
    with pytest.raises(DataError, match="at most 280 pairs"):
        upgrade(cache, new, data, num_pairs=2000, options=FAST)
    with pytest.raises(CacheMismatchError, match="other ids or texts"):
        upgrade(cache, new, make_data(targets=300), num_pairs=10, options=FAST)
    with pytest.raises(CacheMismatchError, match="weights"):
        upgrade(cache, new, data, num_pairs=10, old_model=new, options=FAST)
    with pytest.raises(DataError, match="neither a test nor a dev split"):
        upgrade(cache, new, replace(data, test=None), num_pairs=10, options=FAST)
    with pytest.raises(DataError, match="split"):
        upgrade(cache, new, data, num_pairs=10, options=replace(FAST, split="dev"))
    with pytest.raises(ConfigurationError, match="judge_queries"):
        UpgradeOptions(judge_queries=0)
    with pytest.raises(ConfigurationError, match="kinds"):
        UpgradeOptions(kinds=("magic",))

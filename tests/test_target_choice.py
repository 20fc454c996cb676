from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from model_helpers import HIDDEN, TEXTS

from hf_corrector.cache import TargetCache
from hf_corrector.candidate_sampling import ContrastSet
from hf_corrector.data.pairs import from_pairs
from hf_corrector.data.tokens import TokenStore
from hf_corrector.encoding import EncodeOptions, build_cache, tokenize_texts
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel, SampledTargets
from hf_corrector.records import EncoderFingerprint
from hf_corrector.scans import ScanPlan
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer
from hf_corrector.training.live_cache import LiveCache
from hf_corrector.training.target_choice import Judgements, TargetChooser

WARMUP = 2
POSITIVES = [{0: 1.0}, {1: 1.0, 5: 0.5}, {2: 1.0}, {0: 1.0, 3: 1.0}]
BATCH = {"query_rows": torch.tensor([2, 1, 3]), "positive_rows": torch.tensor([2, 5, 0])}


@pytest.fixture
def tokens(tiny_model: DualEncoderModel, tmp_path: Path) -> TokenStore:
    return tokenize_texts(tiny_model, TEXTS, "target", tmp_path / "tokens", progress=False)


def arguments(tmp_path: Path, **changes: Any) -> DualEncoderTrainingArguments:
    return DualEncoderTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, seed=7, **changes)


def live_cache(model: DualEncoderModel, args: DualEncoderTrainingArguments, path: Path) -> LiveCache:
    corpus = Dataset.from_dict({"id": [str(row) for row in range(len(TEXTS))], "text": TEXTS})
    cache = build_cache(model, corpus, path, options=EncodeOptions(progress=False)).cache
    return LiveCache(cache, model, args)


def choose(
    model: DualEncoderModel,
    args: DualEncoderTrainingArguments,
    tokens: TokenStore,
    live: LiveCache | None,
    step: int = 0,
) -> tuple[ContrastSet, SampledTargets]:
    judgements = Judgements(
        POSITIVES, negatives=[[7, 8], [0], [9, 0], [8, 3, 7]], teacher=[{}, {5: 2.0, 9: 1.0}, {}, {}]
    )
    scan = None if live is None else live.scan(ScanPlan(), warming_up=args.uses_corrector and step < WARMUP)
    choice = TargetChooser(model, args, tokens, judgements=judgements).choose(
        model.encode_query(TEXTS[:3]), BATCH, scan=scan, step=step
    )
    return choice.contrast, choice.part


def test_in_batch_negatives_encode_nothing_more(
    tiny_model: DualEncoderModel, tokens: TokenStore, tmp_path: Path
) -> None:
    args = arguments(tmp_path, negatives="in_batch", staleness="ignore")
    contrast, sampled = choose(tiny_model, args, tokens, None)
    assert contrast.rows.tolist() == [2, 5, 0]
    assert sampled.tokens is None
    assert sampled.log_proposal is None
    assert sampled.allowed.all()


@pytest.mark.parametrize("negatives", ["softmax", "top_k", "uniform"])
def test_sampled_targets_come_with_their_tokens_and_without_known_positives(
    negatives: str, tiny_model: DualEncoderModel, tokens: TokenStore, tmp_path: Path
) -> None:
    args = arguments(tmp_path, negatives=negatives, staleness="ignore", num_negatives=4, share_negatives=False)
    contrast, sampled = choose(tiny_model, args, tokens, live_cache(tiny_model, args, tmp_path / "cache"))
    assert contrast.rows[:3].tolist() == [2, 5, 0]
    assert sampled.tokens is not None
    extra = contrast.rows[3:].tolist()
    for row, ids, mask in zip(extra, sampled.tokens["input_ids"], sampled.tokens["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == tokens.tokens([row])[0]
    for query, (own, known) in enumerate(zip([2, 5, 0], [POSITIVES[2], POSITIVES[1], POSITIVES[3]], strict=True)):
        seen = contrast.rows[contrast.allowed[query]].tolist()
        assert len(seen) == 5
        assert set(seen) & set(known) == {own}


def test_filters_hold_for_shared_negatives_too(
    tiny_model: DualEncoderModel, tokens: TokenStore, tmp_path: Path
) -> None:
    scores = tiny_model.encode_query(TEXTS[:3]) @ tiny_model.encode_target(TEXTS).T
    limit = float(scores.median())
    kept = []
    for max_score in (limit, None):
        args = arguments(
            tmp_path, staleness="ignore", num_negatives=4, max_score=max_score, uniform_fraction=0.25,
        )  # fmt: skip
        contrast, _ = choose(tiny_model, args, tokens, live_cache(tiny_model, args, tmp_path / f"cache-{max_score}"))
        shared = contrast.allowed.clone()
        shared[torch.arange(3), torch.arange(3)] = False
        kept.append(scores[:, contrast.rows][shared])
    assert len(kept[0]), "something has to be left to share"
    assert float(kept[0].max()) <= limit < float(kept[1].max())


def test_uniform_negatives_need_no_cache_and_are_the_same_with_one(
    tiny_model: DualEncoderModel, tokens: TokenStore, tmp_path: Path
) -> None:
    args = arguments(tmp_path, negatives="uniform", staleness="ignore", num_negatives=4)
    without, _ = choose(tiny_model, args, tokens, None)
    with_cache, _ = choose(tiny_model, args, tokens, live_cache(tiny_model, args, tmp_path / "cache"))
    assert torch.equal(without.rows, with_cache.rows)
    assert without.uniform[3:].all()


def test_each_step_draws_anew_and_the_same_when_repeated(
    tiny_model: DualEncoderModel, tokens: TokenStore, tmp_path: Path
) -> None:
    args = arguments(tmp_path, negatives="softmax", staleness="ignore", num_negatives=4, share_negatives=False)
    live = live_cache(tiny_model, args, tmp_path / "cache")
    rows = [choose(tiny_model, args, tokens, live, step)[0].rows.tolist() for step in (0, 1, 2, 0)]
    assert rows[0] == rows[3]
    assert len({tuple(one) for one in rows[:3]}) > 1


def test_corrector_is_used_only_after_the_warm_up(
    tiny_model: DualEncoderModel, tokens: TokenStore, tmp_path: Path
) -> None:
    args = arguments(tmp_path, negatives="top_k", num_negatives=3, uniform_fraction=0.0)
    tiny_model.corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=HIDDEN))
    live = live_cache(tiny_model, args, tmp_path / "cache")
    # A corrector that turns every vector around chooses what lies furthest away.
    tiny_model.corrector.weight.copy_(-2 * torch.eye(HIDDEN))
    rows = [set(choose(tiny_model, args, tokens, live, step)[0].rows.tolist()) for step in (0, 1, 2, 3)]
    assert rows[0] == rows[1] != rows[2] == rows[3]


def test_scan_is_kept_until_the_corrector_comes_into_use(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    tiny_model.corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=HIDDEN))
    live = live_cache(tiny_model, args, tmp_path / "cache")
    warm, again, later = (live.scan(ScanPlan(), warming_up=step < 2) for step in range(3))
    assert warm is again is not later
    assert live.scan(ScanPlan(), warming_up=False) is later


def test_cache_of_another_size_is_not_looked_at_before_the_corrector_is_used(
    tiny_model: DualEncoderModel, tokens: TokenStore, tmp_path: Path
) -> None:
    args = arguments(tmp_path, num_negatives=3, uniform_fraction=0.0)
    tiny_model.corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=5, output_dim=HIDDEN))
    older = EncoderFingerprint.of_precomputed("older", normalize=False)
    ids = [str(row) for row in range(len(TEXTS))]
    cache = TargetCache.from_arrays(tmp_path / "older", torch.randn(len(TEXTS), 5), ids, fingerprint=older)
    live = LiveCache(cache, tiny_model, args)
    assert live.scan(ScanPlan(), warming_up=True) is None
    warm, _ = choose(tiny_model, args, tokens, live, 0)
    later, _ = choose(tiny_model, args, tokens, live, WARMUP)
    assert warm.uniform[3:].all()
    assert len(warm.rows) > 3
    assert not later.uniform.any()


def test_log_proposal_is_handed_on_only_where_it_is_to_be_subtracted(
    tiny_model: DualEncoderModel, tokens: TokenStore, tmp_path: Path
) -> None:
    for wanted in (True, False):
        args = arguments(
            tmp_path, staleness="ignore", num_negatives=3, share_negatives=False, sampling_correction=wanted
        )
        contrast, sampled = choose(tiny_model, args, tokens, live_cache(tiny_model, args, tmp_path / "cache"))
        assert (sampled.log_proposal is not None) is wanted
        assert (contrast.log_proposal[:, 3:] != 0).any()


def test_given_negatives_are_columns_of_their_query_unless_they_are_its_positives(
    tiny_model: DualEncoderModel, tokens: TokenStore, tmp_path: Path
) -> None:
    args = arguments(tmp_path, negatives="in_batch", staleness="ignore", given_negatives=2, share_negatives=False)
    contrast, part = choose(tiny_model, args, tokens, None)
    seen = [set(contrast.rows[allowed].tolist()) for allowed in contrast.allowed]
    # Queries 2, 1 and 3 are trained on targets 2, 5 and 0; target 3 is known to be right for the last.
    assert seen == [{2, 9, 0}, {5, 0}, {0, 8}]
    assert part.tokens is not None
    assert contrast.rows.tolist() == [2, 5, 0, 3, 8, 9]


def test_several_positives_share_the_label_by_their_grades(
    tiny_model: DualEncoderModel, tokens: TokenStore, tmp_path: Path
) -> None:
    args = arguments(tmp_path, negatives="in_batch", staleness="ignore", several_positives=True)
    contrast, part = choose(tiny_model, args, tokens, None)
    assert contrast.rows.tolist() == [2, 5, 0, 1, 3]
    expected = torch.tensor([[1.0, 0, 0, 0, 0], [0, 1 / 3, 0, 2 / 3, 0], [0, 0, 0.5, 0, 0.5]])
    assert part.label_weights is not None
    assert torch.allclose(part.label_weights, expected)


def test_teacher_scores_stand_where_the_teacher_said_something(
    tiny_model: DualEncoderModel, tokens: TokenStore, tmp_path: Path
) -> None:
    args = arguments(
        tmp_path, negatives="in_batch", staleness="ignore", given_negatives=1, distillation_weight=1.0
    )  # fmt: skip
    contrast, part = choose(tiny_model, args, tokens, None)
    assert contrast.rows.tolist() == [2, 5, 0, 8, 9]
    assert part.teacher_scores is not None
    assert part.teacher_scores[1].nan_to_num(-1).tolist() == [-1, 2, -1, -1, 1]
    assert part.teacher_scores[[0, 2]].isnan().all()


def test_targets_that_are_not_encoded_come_as_vectors(
    tiny_model: DualEncoderModel, tokens: TokenStore, tmp_path: Path
) -> None:
    args = arguments(tmp_path, negatives="uniform", staleness="ignore", train_targets=False, num_negatives=2)
    vectors = torch.randn(len(TEXTS), HIDDEN)
    chooser = TargetChooser(tiny_model, args, tokens, judgements=Judgements(POSITIVES, [[]] * 4, [{}] * 4))
    choice = chooser.choose(
        tiny_model.encode_query(TEXTS[:3]), BATCH, scan=None, step=0, cached=lambda rows: vectors[rows]
    )
    assert choice.part.tokens is None
    assert choice.part.vectors is not None
    assert torch.equal(choice.part.vectors, vectors[choice.contrast.rows])


@pytest.mark.parametrize(("warmup", "steps_by_score"), [("stale", [1, 2, 3, 4]), ("uniform", [3, 4])])
def test_warm_up_may_be_uniform(
    warmup: str, steps_by_score: list[int], tiny_model: DualEncoderModel, tmp_path: Path
) -> None:
    args = arguments(
        tmp_path / warmup, warmup_negatives=warmup, corrector_warmup_steps=2, max_steps=4, logging_steps=1,
        per_device_train_batch_size=2, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = [{"anchor": text[:9], "positive": text} for text in TEXTS]
    data = from_pairs(Dataset.from_list(rows), dev_fraction=0.0, test_fraction=0.0)
    trainer = DualEncoderTrainer(tiny_model, args, train_dataset=data.train, targets=data.corpus)
    trainer.train()
    # A distribution to judge is known only where negatives are drawn by scores.
    judged = [entry["step"] for entry in trainer.state.log_history if "sampling_tv" in entry]
    assert judged == steps_by_score

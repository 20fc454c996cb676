"""Corrected negatives in sentence-transformers' own trainer, with that trainer and a tiny model."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch.nn import functional as F
from upgrade_helpers import make_data

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.candidate_sampling import SamplingPlan
from hf_corrector.data.retrieval import RetrievalData
from hf_corrector.errors import CacheMismatchError, CheckpointError, ConfigurationError, DataError
from hf_corrector.integrations import sentence_transformers as integration
from hf_corrector.integrations.sentence_transformers import (
    CorrectedNegativesLoss,
    NegativesOptions,
    cache_targets,
    training_pairs,
)
from hf_corrector.models import CorrectorModel
from hf_corrector.records import FittedTargets
from hf_corrector.sampling import NegativeFilter
from hf_corrector.scans import ScanPlan
from hf_corrector.training.corrector_fit import CorrectorFitting

TARGETS = 90
PLAN = SamplingPlan("softmax", 3, 0.34, 20.0, 0)
OPTIONS = NegativesOptions(sampling=PLAN, fitting=CorrectorFitting(update_steps=2))


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data(targets=TARGETS, queries=40)


def new_model(encoder: str, **settings: Any) -> SentenceTransformer:
    return SentenceTransformer(modules=[Transformer(encoder), Pooling(32, "mean")], device="cpu", **settings)


def arguments(path: Path, **settings: Any) -> SentenceTransformerTrainingArguments:
    fixed = {
        "per_device_train_batch_size": 6, "learning_rate": 2e-3, "max_steps": 8, "logging_steps": 1,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 0, "use_cpu": True,
    }  # fmt: skip
    return SentenceTransformerTrainingArguments(output_dir=str(path), **{**fixed, **settings})


def trainer_of(
    encoder: str, data: RetrievalData, path: Path, options: NegativesOptions = OPTIONS, **settings: Any
) -> tuple[SentenceTransformerTrainer, CorrectedNegativesLoss]:
    model = new_model(encoder)
    loss = CorrectedNegativesLoss(model, cache_targets(model, data.corpus, path / "cache"), data.corpus, options)
    trainer = SentenceTransformerTrainer(
        model, arguments(path / "out", **settings), train_dataset=training_pairs(data.train, data.corpus), loss=loss,
        callbacks=[loss.callback()],
    )  # fmt: skip
    return trainer, loss


@pytest.fixture(scope="module")
def trained(tiny_encoder: str, data: RetrievalData, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("trained")
    trainer, loss = trainer_of(tiny_encoder, data, path, max_steps=12, save_strategy="steps", save_steps=6)
    trainer.train()
    return trainer, loss, path


def logged(trainer: SentenceTransformerTrainer, name: str) -> list[float]:
    return [one[name] for one in trainer.state.log_history if name in one]


def test_training_moves_the_model_and_the_corrector_follows(trained: Any, data: RetrievalData) -> None:
    trainer, loss, _ = trained
    losses = logged(trainer, "loss")
    assert len(losses) == 12 and np.mean(losses[-4:]) < np.mean(losses[:4])
    stale, corrected = logged(trainer, "cosine_stale_fresh"), logged(trainer, "cosine_corrected_fresh")
    assert len(stale) == 12 and stale[-1] < 0.95 and corrected[-1] > stale[-1]
    fresh = trainer.model.encode_document(data.corpus["text"], normalize_embeddings=True, convert_to_tensor=True)
    unseen = np.setdiff1d(np.arange(TARGETS), loss._online.fitted_rows.numpy())
    before = loss.cache.read(0, TARGETS)
    after = loss.corrector.correct(before)
    mine, theirs = (F.cosine_similarity(one, fresh)[unseen].mean() for one in (after, before))
    assert len(unseen) and mine > theirs


def test_pairs_of_the_first_step_have_not_moved_though_the_model_has_dropout(trained: Any) -> None:
    trainer, _, _ = trained
    assert trainer.model[0].model.config.hidden_dropout_prob > 0
    assert logged(trainer, "cosine_stale_fresh")[0] == pytest.approx(1.0, abs=1e-5)


def test_dropout_may_be_kept(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    trainer, _ = trainer_of(tiny_encoder, data, tmp_path, NegativesOptions(sampling=PLAN, dropout=True), max_steps=1)
    trainer.train()
    assert logged(trainer, "cosine_stale_fresh")[0] < 0.99


def test_resumed_training_ends_as_uninterrupted_training_does(
    trained: Any, tiny_encoder: str, data: RetrievalData
) -> None:
    trainer, loss, path = trained
    again, other = trainer_of(tiny_encoder, data, path, max_steps=12)
    again.train(resume_from_checkpoint=str(path / "out" / "checkpoint-6"))
    for one, two in ((trainer.model, again.model), (loss.corrector, other.corrector)):
        theirs = two.state_dict()
        assert all(torch.allclose(value, theirs[name], atol=1e-5) for name, value in one.state_dict().items())
    assert logged(again, "loss")[-1] == pytest.approx(logged(trainer, "loss")[-1], abs=1e-4)


def test_checkpoint_without_the_corrector_is_refused(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    trainer, _ = trainer_of(tiny_encoder, data, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    (tmp_path / "out" / "checkpoint-2" / integration.STATE_FILE).unlink()
    again, _ = trainer_of(tiny_encoder, data, tmp_path, max_steps=4)
    with pytest.raises(CheckpointError, match="callback"):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_loss_is_that_of_the_whole_softmax_where_every_target_is_a_negative(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    model, few = new_model(tiny_encoder).eval(), data.corpus.select(range(20))
    options = NegativesOptions(sampling=SamplingPlan("top_k", 19, 0.0, 20.0, 0))
    loss = CorrectedNegativesLoss(model, cache_targets(model, few, tmp_path / "cache"), few, options)
    queries = data.train["query"][:5]
    labels = torch.tensor([[row, row] for row in range(5)])
    found = loss([model.preprocess(queries)], labels)
    with torch.no_grad():
        q = model.encode(queries, normalize_embeddings=True, convert_to_tensor=True)
        t = model.encode(few["text"], normalize_embeddings=True, convert_to_tensor=True)
    assert found.item() == pytest.approx(float(F.cross_entropy(20.0 * q @ t.T, torch.arange(5))), abs=1e-5)
    found.backward()
    assert all(weight.grad is None for weight in loss.corrector.parameters())
    assert model[0].model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_known_positives_are_never_negatives(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    model = new_model(tiny_encoder).eval()
    options = NegativesOptions(sampling=SamplingPlan("top_k", 5, 0.0, 20.0, 0), share_negatives=False)
    cache = cache_targets(model, data.corpus, tmp_path / "cache")
    loss = CorrectedNegativesLoss(model, cache, data.corpus, options)
    queries, known = cache.gather(torch.arange(4)), [[row, row, row + 1, row + 2] for row in range(4)]
    contrast = loss._choose(queries, known)
    for number, rows in enumerate(known):
        used = set(contrast.rows[contrast.allowed[number]].tolist())
        assert used & set(rows) == {rows[0]} and len(used) == 6


def test_filters_hold_for_shared_negatives_too(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    known, highest = [[0], [7, 9], [20]], []
    for limit in (None, 0.9):
        plan = SamplingPlan("top_k", 5, 0.0, 20.0, 0, NegativeFilter(max_score=limit))
        _, loss = trainer_of(tiny_encoder, data, tmp_path / str(limit), NegativesOptions(sampling=plan))
        queries = loss.cache.gather(torch.tensor([one[0] for one in known]))
        contrast = loss._choose(queries, known)
        allowed = contrast.allowed.clone()
        allowed[torch.arange(3), torch.arange(3)] = False
        highest.append(float((queries @ loss.cache.gather(contrast.rows).T)[allowed].max()))
    assert highest[1] <= 0.9 + 1e-6 < highest[0]


def test_prompt_of_targets_is_that_of_the_cache(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    model = new_model(tiny_encoder, prompts={"query": "find ", "document": "show the file "}).eval()
    cache = cache_targets(model, data.corpus, tmp_path / "cache")
    loss = CorrectedNegativesLoss(model, cache, data.corpus)
    loss._view(torch.device("cpu"))
    assert torch.allclose(loss._encode(torch.arange(9)), cache.read(0, 9), atol=1e-5)
    plain = new_model(tiny_encoder).encode(data.corpus["text"][:9], normalize_embeddings=True)
    assert not np.allclose(plain, cache.read(0, 9), atol=1e-2)


@pytest.mark.parametrize("scan", [ScanPlan("amortised", refresh_steps=3), ScanPlan("pooled", pool=30)])
@pytest.mark.parametrize("kind", ["residual_mlp", "identity"])
def test_other_scans_and_kinds_train_too(
    scan: ScanPlan, kind: str, tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    fitting = CorrectorFitting(update_steps=2, finishing_updates=5)
    options = NegativesOptions(sampling=PLAN, kind=kind, fitting=fitting, scan=scan)
    trainer, _ = trainer_of(tiny_encoder, data, tmp_path, options, max_steps=4)
    trainer.train()
    names = ("cosine_stale_fresh", "cosine_corrected_fresh")
    stale, corrected = (logged(trainer, name)[-1] for name in names)
    assert (stale == corrected) == (kind == "identity")
    assert len(logged(trainer, "loss")) == 4


def test_saved_corrector_says_what_it_was_fitted_to(trained: Any, tmp_path: Path) -> None:
    _, loss, _ = trained
    loss.save_corrector(tmp_path)
    fitted = FittedTargets.load(tmp_path)
    assert fitted is not None and fitted.cache == loss.cache.manifest.checksum
    assert fitted.ids == tuple(f"t{row}" for row in fitted.rows) and fitted.rows
    stale = loss.cache.read(0, 5)
    assert torch.equal(CorrectorModel.from_pretrained(str(tmp_path)).correct(stale), loss.corrector.correct(stale))


def test_cache_is_opened_again_and_refused_for_other_weights_or_targets(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    model = new_model(tiny_encoder)
    cache = cache_targets(model, data.corpus, tmp_path)
    again = cache_targets(model, data.corpus, tmp_path)
    assert isinstance(again, TargetCache) and again.manifest == cache.manifest
    with pytest.raises(DataError, match="other ids"):
        cache_targets(model, data.corpus.select(range(5)), tmp_path)
    with torch.no_grad():
        model[0].model.embeddings.word_embeddings.weight[7] += 1
    with pytest.raises(CacheMismatchError, match="weights"):
        cache_targets(model, data.corpus, tmp_path)


def test_examples_name_positives_by_row(data: RetrievalData) -> None:
    split = Dataset.from_dict({
        "query_id": ["a", "b"], "query": ["x", "y"], "positive_ids": [["t3"], ["t5", "t8"]],
        "positive_grades": [[1.0], [2.0, 1.0]],
    })  # fmt: skip
    assert training_pairs(split, data.corpus).to_dict() == {
        "anchor": ["x", "y", "y"], "label": [[3, 3, -1], [5, 5, 8], [8, 5, 8]],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "got none"), (torch.tensor([1]), "shape"), (torch.tensor([[-1, 3]]), "rows"),
        (torch.tensor([[0, TARGETS]]), "rows"), (torch.tensor([[0.0, 1.0]]), "float"),
    ],
)  # fmt: skip
def test_labels_that_are_no_rows_are_refused(trained: Any, labels: Any, message: str) -> None:
    _, loss, _ = trained
    with pytest.raises(DataError, match=message):
        loss([loss.model.preprocess(["list"])], labels)


def test_what_does_not_fit_together_is_refused(trained: Any, data: RetrievalData) -> None:
    _, loss, _ = trained
    with pytest.raises(DataError, match="2 text columns"):
        loss([loss.model.preprocess(["list"])] * 2, torch.tensor([[0, 0]]))
    with pytest.raises(ConfigurationError, match="5 vectors of size 32"):
        CorrectedNegativesLoss(loss.model, loss.cache, data.corpus.select(range(5)))
    with pytest.raises(ConfigurationError, match="shortlist"):
        NegativesOptions(scan=ScanPlan("shortlist"))


def test_lines_of_the_documentation_train_a_model(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    new_model(tiny_encoder).save_pretrained("intfloat/e5-base-v2", create_model_card=False)
    folder = tmp_path / "my_beir_folder"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": one["id"], "text": one["text"]} for one in data.corpus]
    queries = [{"_id": one["query_id"], "text": one["query"]} for one in data.train]
    for name, lines in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = [f"{one['query_id']}\t{one['positive_ids'][0]}\t1\n" for one in data.train]
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    shown = textwrap.dedent(str(integration.__doc__).split("::\n", 1)[1])
    imports = (
        "from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer\n"
        "from hf_corrector import load_retrieval_data\n"
        "from hf_corrector.integrations.sentence_transformers import CorrectedNegativesLoss, cache_targets, "
        "training_pairs\n"
    )
    assert len((imports + shown.strip()).splitlines()) <= 10
    names: dict[str, Any] = {}
    exec(compile(imports + shown, "documentation", "exec"), names)
    assert names["loss"].step == names["trainer"].state.global_step > 0

"""Corrected hard negatives for users of ``SentenceTransformerTrainer``, who keep their trainer.

A loss draws negatives of each query from a cache of all targets, seen through a corrector, encodes them with the model
as it is now and contrasts (arXiv 2409.01890); what it has encoded anyway is what the corrector is fitted to. A callback
tells it how training goes on::

    data, model = load_retrieval_data("my_beir_folder"), SentenceTransformer("intfloat/e5-base-v2")
    loss = CorrectedNegativesLoss(model, cache_targets(model, data.corpus, "cache"), data.corpus)
    trainer = SentenceTransformerTrainer(
        model, train_dataset=training_pairs(data.train, data.corpus), loss=loss, callbacks=[loss.callback()]
    )
    trainer.train()
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_corrector._distributed import world_size
from hf_corrector._extras import need_sentence_transformers
from hf_corrector._files import atomic_write
from hf_corrector.cache.manifest import MANIFEST_FILE
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.candidate_sampling import ContrastSet, GivenTargets, SamplingPlan, contrast_set, sample_candidates
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.data.retrieval import column, positives_as_rows
from hf_corrector.errors import CheckpointError, ConfigurationError, DataError
from hf_corrector.losses import truncated_softmax_loss
from hf_corrector.models.configuration_corrector import CorrectorConfig
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.models.sentence_transformers_format import role_prompts
from hf_corrector.models.towers import hash_tensors
from hf_corrector.records import EncoderFingerprint, FittedTargets
from hf_corrector.sampling import DrawKeys, ExcludedRows
from hf_corrector.scans import BlockScan, PooledScan, ScanPlan, TargetScan
from hf_corrector.training.corrector_fit import CorrectorFitting
from hf_corrector.training.corrector_trainer import OnlineCorrector, OnlineTargets
from hf_corrector.training.step_log import StepLog

need_sentence_transformers(__name__)

from sentence_transformers import SentenceTransformer  # noqa: E402 - what is missing is named before

STATE_FILE = "corrected_negatives.safetensors"


@dataclass(frozen=True)
class NegativesOptions:
    """How negatives are drawn and the corrector is fitted.

    Attributes:
        sampling: How many negatives a query gets and how they are chosen; its ``scale`` is that of the loss too.
        share_negatives: Contrast each query with the negatives of all, and with the other positives of the batch.
        kind: Kind of corrector; ``"identity"`` draws from the cache as it is.
        fitting: How the corrector is fitted.
        scan: How the targets are looked at: ``"full"``, ``"amortised"`` or ``"pooled"``.
        dropout: Whether the model keeps its dropout. By default it is trained without: the cache is made without, and
            with it the corrector would be taught noise as if it were drift.
    """

    sampling: SamplingPlan = field(default_factory=lambda: SamplingPlan("softmax", 4, 0.25, 20.0, 0))
    share_negatives: bool = True
    kind: str = "affine"
    fitting: CorrectorFitting = field(default_factory=CorrectorFitting)
    scan: ScanPlan = field(default_factory=ScanPlan)
    dropout: bool = False

    def __post_init__(self) -> None:
        """Refuse a scan that needs an index (ConfigurationError)."""
        if self.scan.strategy == "shortlist":
            raise ConfigurationError(
                "scan", expected="'full', 'amortised' or 'pooled'", got="'shortlist'", cure="Use 'pooled'."
            )


def target_prompt(model: SentenceTransformer) -> str:
    """Return what a model puts before every target."""
    known = {name: prompt for name, prompt in model.prompts.items() if prompt}
    return role_prompts({"prompts": known, "default_prompt_name": model.default_prompt_name})["target_prompt"]


def encoder_fingerprint(model: SentenceTransformer) -> EncoderFingerprint:
    """Return what tells the target vectors of a model, brought to unit length, from those of other weights."""
    name = str(model.model_card_data.base_model or type(model).__name__)
    made = EncoderFingerprint.of_precomputed(name, normalize=True)
    # A pooler on top of the token states changes no vector, and where a checkpoint holds none it is random.
    weights = ((one, tensor) for one, tensor in sorted(model.state_dict().items()) if ".pooler." not in one)
    return replace(
        made, weights=hash_tensors(weights), prompt=target_prompt(model), max_length=int(model.max_seq_length or 0),
        pooling="sentence-transformers",
    )  # fmt: skip


def cache_targets(model: SentenceTransformer, targets: Dataset, path: str | Path, **encoding: Any) -> TargetCache:
    """Encode all targets into a cache, at unit length, or open the one that is there.

    Args:
        model: The model before training.
        targets: Columns ``id`` and ``text``.
        path: Folder of the cache.
        encoding: Handed to ``SentenceTransformer.encode_document`` whole: ``batch_size``, ``show_progress_bar``, …

    Raises:
        CacheMismatchError: If the folder holds vectors of another model.
        DataError: If it holds other targets.
    """
    made_by, ids = encoder_fingerprint(model), column(targets, "id")
    if (Path(path) / MANIFEST_FILE).exists():
        cache = TargetCache.open(path, expected=made_by)
        if list(cache.ids) != ids:
            raise DataError(
                str(path), expected=f"the {len(ids)} given targets in their order", got="other ids",
                cure="Name another folder.",
            )  # fmt: skip
        return cache
    vectors = model.encode_document(
        column(targets, "text"),
        prompt=target_prompt(model),
        normalize_embeddings=True,
        convert_to_numpy=True,
        **encoding,
    )
    return TargetCache.from_arrays(path, np.asarray(vectors, dtype=np.float32), ids, fingerprint=made_by)


def training_pairs(split: Dataset, targets: Dataset) -> Dataset:
    """Return one example for every judgement: the query as ``anchor``, and as ``label`` rows of targets.

    The first row of a label is the positive to train on, the others are all known positives of the query, which are
    never drawn as negatives; −1 fills up.

    Args:
        split: Queries with columns ``query`` and ``positive_ids``.
        targets: Column ``id``.

    Raises:
        DataError: If a query names a target that is not there.
    """
    positives = positives_as_rows(split, targets)
    width = max((len(known) for known in positives), default=0)
    anchors, labels = [], []
    for query, known in zip(column(split, "query"), positives, strict=True):
        rows = [row for row, grade in known.items() if grade > 0]
        for row in rows:
            anchors.append(query)
            labels.append([row, *known, *[-1] * (width - len(known))])
    return Dataset.from_dict({"anchor": anchors, "label": labels})


class CorrectedNegativesLoss(nn.Module):
    """Contrast queries with their positive and with hard negatives from a corrected cache of all targets.

    Takes what :func:`training_pairs` makes: one text column and labels. Scores are cosines. It encodes positives and
    negatives itself, with the prompt that the cache was made with; the prompt of queries comes from the ``prompts`` of
    the training arguments, as always. One process only.

    Args:
        model: The model that is trained.
        cache: Its target vectors before training, see :func:`cache_targets`.
        targets: The same targets, column ``text``.
        options: How to draw and to fit.

    Attributes:
        corrector: Moves the cached vectors to where the model would put them now.
        log: Means of what was observed since the last time the trainer logged, which go into its log.

    Raises:
        ConfigurationError: If cache, targets and model do not fit together, or there are several processes.
    """

    def __init__(
        self, model: SentenceTransformer, cache: TargetCache, targets: Dataset, options: NegativesOptions | None = None
    ) -> None:
        super().__init__()
        options = NegativesOptions() if options is None else options
        dim = int(model.get_embedding_dimension() or 0)
        if not cache.fingerprint.normalize or (cache.dim, len(cache)) != (dim, len(targets)):
            raise ConfigurationError(
                "CorrectedNegativesLoss", expected=f"a cache of {len(targets)} vectors of size {dim} and unit length",
                got=f"{len(cache)} of size {cache.dim}, of {'unit' if cache.fingerprint.normalize else 'any'} length",
                cure="Make one with cache_targets(model, targets, path).",
            )  # fmt: skip
        if world_size() > 1:
            raise ConfigurationError(
                "CorrectedNegativesLoss", expected="one process", got=str(world_size()),
                cure="Train in one process, or use DualEncoderTrainer, which shares the targets out.",
            )  # fmt: skip
        self.model, self.cache, self.options, self.log = model, cache, options, StepLog()
        self._texts, self._prompt = column(targets, "text"), target_prompt(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.fitting.seed)
            self.corrector = CorrectorModel(CorrectorConfig(kind=options.kind, input_dim=dim))
        from_start = cache.fingerprint.weights == encoder_fingerprint(model).weights
        self._online = OnlineCorrector(
            self.corrector, OnlineTargets(len(cache), cache.gather, drift_from_zero=from_start), fitting=options.fitting
        )
        self._scan: TargetScan | None = None
        self._corrected: CorrectedTargets | None = None
        self.step = 0

    def callback(self) -> TrainerCallback:
        """Return what the trainer needs beside the loss, as ``callbacks=[loss.callback()]``."""
        return CorrectedNegativesCallback(self)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: torch.Tensor | None) -> torch.Tensor:
        """Return the mean truncated softmax loss of a batch.

        Args:
            sentence_features: The tokenised queries, one entry.
            labels: Rows of targets, ``(batch, 1 + most known positives)`` int64, see :func:`training_pairs`.

        Raises:
            DataError: If there are other columns, or labels are no rows of targets.
        """
        (anchors, *others), rows = list(sentence_features), _checked_labels(labels, targets=len(self.cache))
        if others:
            raise DataError(
                "training examples", expected="one text column and label", got=f"{1 + len(others)} text columns",
                cure="Use training_pairs(split, targets); targets are encoded by the loss.",
            )  # fmt: skip
        training = self.model.training
        if training and not self.options.dropout:
            self.model.eval()  # the trainer turns it back before the next step
        queries = F.normalize(self.model(anchors)["sentence_embedding"].float(), dim=-1)
        contrast = self._choose(queries.detach(), rows)
        targets = self._encode(contrast.rows)
        if training:
            self._learn(contrast.rows, targets.detach())
        losses = truncated_softmax_loss(
            queries @ targets.T, torch.arange(len(queries), device=queries.device),
            contrast.allowed.to(queries.device), scale=self.options.sampling.scale,
        )  # fmt: skip
        return losses.mean()

    @torch.no_grad()
    def _choose(self, queries: torch.Tensor, rows: list[list[int]]) -> ContrastSet:
        """Draw negatives for all queries."""
        positives = torch.tensor([known[0] for known in rows])
        excluded = ExcludedRows(rows)
        keys = DrawKeys(self.options.sampling.seed, self.step, np.arange(len(rows)))
        sampled = sample_candidates(
            self._view(queries.device), queries, self.options.sampling, positives=positives, excluded=excluded,
            keys=keys,
        )  # fmt: skip
        return contrast_set(
            sampled.candidates, GivenTargets(positives, excluded), share_negatives=self.options.share_negatives,
            too_good=sampled.too_good,
        )  # fmt: skip

    def _view(self, device: torch.device) -> TargetScan:
        """Return all targets through the corrector."""
        if self._scan is None:
            self.corrector.to(device)  # type: ignore[arg-type]
            self._corrected = CorrectedTargets(self.cache, self.corrector, device=device)
            plan = self.options.scan
            self._scan = (PooledScan if plan.strategy == "pooled" else BlockScan)(self._corrected, plan)
        return self._scan

    def _encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Encode targets with the model as it is, ``(columns, dim)`` float32, with gradients."""
        texts = [self._texts[row] for row in rows.tolist()]
        features = self.model.preprocess(texts, prompt=self._prompt or None, task="document")
        here = self.corrector.fitted_pairs.device
        moved = {name: one.to(here) if isinstance(one, torch.Tensor) else one for name, one in features.items()}
        return F.normalize(self.model(moved)["sentence_embedding"].float(), dim=-1)

    @torch.no_grad()
    def _learn(self, rows: torch.Tensor, fresh: torch.Tensor) -> None:
        """Hand targets that were encoded to the corrector as pairs, after noting how stale they were."""
        stale = self.cache.gather(rows).to(fresh.device)
        for name, vectors in (("cosine_stale_fresh", stale), ("cosine_corrected_fresh", self.corrector(stale))):
            self.log.observe(name, float(F.cosine_similarity(vectors, fresh).mean()), count=len(fresh))
        self._online.observe(rows, fresh, step=self.step)

    def follow(self, learning_rate: float) -> None:
        """Let the corrector follow an optimiser step that was taken with this learning rate."""
        self._online.advance(learning_rate)
        self._after(self._online.update(self.step))
        if self._scan is not None:
            self._scan.advance()
        self.step += 1

    def finish(self) -> None:
        """Fit the corrector once more when training ends."""
        self._after(self._online.finish())

    def _after(self, changed: bool) -> None:
        if changed and self._scan is not None and self._corrected is not None:
            self._corrected.invalidate()
            self._scan.invalidate()

    def save_corrector(self, folder: str | Path) -> Path:
        """Write the corrector, with what it was fitted to, into a folder."""
        path, made_by = Path(folder), encoder_fingerprint(self.model)
        self.corrector.save_pretrained(str(path))
        rows = tuple(self._online.fitted_rows.tolist())
        FittedTargets(
            self.cache.manifest.checksum, made_by.digest, rows, tuple(self.cache.ids[row] for row in rows),
            made_by.to_dict(),
        ).save(path)  # fmt: skip
        return path

    def save_state(self, folder: str | Path) -> None:
        """Write corrector and pairs into a checkpoint."""
        if self._scan is not None:
            self._scan.renew()  # a resumed run corrects all targets anew, so this one does too
        weights = {f"corrector.{name}": value for name, value in self.corrector.state_dict().items()}
        state = {name: value.detach().cpu().contiguous() for name, value in {**weights, **self._online.state()}.items()}
        atomic_write(Path(folder) / STATE_FILE, lambda path: save_file(state, path))

    def load_state(self, folder: str | Path, step: int) -> None:
        """Restore what :meth:`save_state` wrote after so many steps.

        Raises:
            CheckpointError: If the checkpoint holds none.
        """
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            raise CheckpointError(
                str(folder), expected=STATE_FILE, got="no such file",
                cure="Resume from a checkpoint written with loss.callback() among the callbacks.",
            )  # fmt: skip
        state = load_file(path)
        weights = {name: state.pop(name) for name in list(state) if name.startswith("corrector.")}
        self.corrector.load_state_dict({name.removeprefix("corrector."): one for name, one in weights.items()})
        self._online.load_state(state)
        self.step = step
        self._after(True)


class CorrectedNegativesCallback(TrainerCallback):
    """Tell a :class:`CorrectedNegativesLoss` of steps, logs and checkpoints.

    Args:
        loss: The loss.
    """

    def __init__(self, loss: CorrectedNegativesLoss) -> None:
        self.loss, self._rate = loss, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on where a checkpoint ended."""
        if state.global_step:
            self.loss.load_state(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rate of the step to come; the schedule moves on before the step has ended."""
        self._rate = float(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the corrector follow."""
        self.loss.follow(self._rate)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to the log how stale targets were, and how far that was corrected."""
        if "loss" in kwargs["logs"]:
            observed = self.loss.log.drain()
            kwargs["logs"].update(observed)
            state.log_history[-1].update(observed)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the corrector's state beside the model's."""
        self.loss.save_state(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fit the corrector to the last window once more."""
        self.loss.finish()


def _checked_labels(labels: torch.Tensor | None, *, targets: int) -> list[list[int]]:
    """Return for each query its positive and its known positives, the positive first."""
    whole = labels is not None and labels.dim() == 2 and labels.shape[1] > 1 and not labels.is_floating_point()
    if labels is None or not whole or int(labels[:, 0].min()) < 0 or int(labels.max()) >= targets:
        got = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise DataError(
            "labels", expected=f"for each query rows of the {targets} targets, its positive first", got=got,
            cure="Use training_pairs(split, targets).",
        )  # fmt: skip
    return [[row for row in known if row >= 0] for known in labels.tolist()]

"""A corrector together with what it leads from and to: enough to apply it to a whole cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_corrector._files import read_json, write_json
from hf_corrector._hub import PushOptions
from hf_corrector.cache.side_store import open_side, stored_sides
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cards import card_of_corrector
from hf_corrector.corrected_cache import ApplyOptions, side_kind, write_corrected
from hf_corrector.errors import CacheMismatchError, ConfigurationError, InputError
from hf_corrector.exports.sentence_transformer import Encoder, save_as_sentence_transformer
from hf_corrector.index_upgrade.corpus_sides import CorpusSide
from hf_corrector.models.hub_files import CORRECTOR_FILES, UPGRADE_FILE, Card, checked, push_saved
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.records import EncoderFingerprint, FittedTargets
from hf_corrector.side_features import SideFeatures


@dataclass(frozen=True, eq=False)
class FittedCorrector:
    """What an upgrade fitted.

    Attributes:
        model: The corrector.
        fitted: Which cache it corrects, where it leads, and which targets it has seen.
        leads_to: The encoder whose vectors come out.
        direction: ``"targets"``: stale targets in, corrected ones out. ``"queries"``: new queries in, out come ones
            that search the old index.
        side: Side features of all targets of the cache, where the corrector takes any and they are at hand.
        folder: Where it was loaded from: side features that the folder of the cache would not take are kept there.
    """

    model: CorrectorModel
    fitted: FittedTargets
    leads_to: EncoderFingerprint
    direction: str = "targets"
    side: SideFeatures | None = None
    folder: Path | None = None

    def apply(
        self, old_cache: str | Path | TargetCache, new_cache: str | Path, *, side: SideFeatures | None = None,
        options: ApplyOptions | None = None,
    ) -> TargetCache:  # fmt: skip
        """Write a cache of corrected vectors beside the old one, which is only read.

        Args:
            old_cache: The cache it was fitted to, or another one of the same encoder.
            new_cache: Folder of the new cache.
            side: Side features of all targets, for a corrector that was loaded from a folder and takes any; by default
                those it has at hand, or that are stored with the cache.
            options: How to write.

        Raises:
            CacheMismatchError: If another encoder made the cache than the one it was fitted to; names both.
            ConfigurationError: If it maps queries, so that there is nothing to write.
        """
        if self.direction == "queries":
            raise ConfigurationError(
                "apply", expected="a corrector of targets", got="one that maps queries to the old index",
                cure="Leave the index as it is and search it with corrector.map_queries(vectors).",
            )  # fmt: skip
        cache = old_cache if isinstance(old_cache, TargetCache) else TargetCache.open(old_cache)
        if self.fitted.cache not in cache.manifest.lineage:
            if self.model.config.stale_encoder is None:
                raise CacheMismatchError(
                    str(cache.path), expected="the cache the corrector was fitted to", got="another one",
                    cure="Name the old cache, or fit a corrector to this one.",
                )  # fmt: skip
            self.model.check_encoders(f"corrector for {cache.path}", stale=cache.fingerprint)
        given = self._side_for(cache) if side is None else side
        return write_corrected(
            self.model, cache, new_cache, encoder=self.leads_to, side=given, options=options
        )  # fmt: skip

    def _side_for(self, cache: TargetCache) -> SideFeatures | None:
        kind = side_kind(self.model)
        if kind is None or self.side is not None:
            return self.side
        kept = self.folder is not None and kind in stored_sides(cache, folder=self.folder)
        return open_side(cache, kind, folder=self.folder if kept else None)

    def map_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """Map vectors of new queries, ``(n, dim_new)``, to ones that search the old index, ``(n, dim_old)``.

        Raises:
            ConfigurationError: If it corrects targets.
        """
        if self.direction != "queries":
            raise ConfigurationError(
                "map_queries", expected="a corrector of queries", got="one of targets", cure="Use apply()."
            )
        return self.model.correct(queries)

    def save(self, folder: str | Path) -> Path:
        """Write corrector and notes into a folder.

        Side features stay with the cache. Those that could not be stored there are written beside the corrector,
        where :meth:`apply` finds them after :meth:`load`; for ``hf-corrector apply`` copy the files ``side-*`` into the
        folder of the cache.
        """
        path = Path(folder)
        self.model.save_pretrained(str(path))
        self.fitted.save(path)
        write_json(path / UPGRADE_FILE, {"direction": self.direction, "leads_to": asdict(self.leads_to)})
        side = self.side
        if isinstance(side, CorpusSide):
            side.keep(path)
        return path

    def save_as_sentence_transformer(
        self, path: str | Path, old_model: Encoder, new_model: Encoder | None = None
    ) -> Path:
        """Write the old encoder with the corrector behind it, and the new one beside it, for sentence-transformers.

        Args:
            path: A new or empty folder.
            old_model: The encoder that made the cache: object, folder or Hub id.
            new_model: The encoder it leads to, which then encodes queries; may be left out where targets are corrected.

        Raises:
            ConfigurationError: If the corrector cannot be repeated exactly, or it belongs to other encoders.
            MissingDependencyError: If sentence-transformers is not installed.
        """
        if isinstance(new_model, DualEncoderModel) and new_model.fingerprint("target").digest != self.fitted.encoder:
            raise ConfigurationError(
                str(new_model.config.name_or_path), expected="the encoder the corrector was fitted to", got="another",
                cure="Name the new encoder of that upgrade.",
            )  # fmt: skip
        if self.direction == "targets":
            return save_as_sentence_transformer(self.model, path, old_model, query_model=new_model)
        if new_model is None:
            raise ConfigurationError(
                "save_as_sentence_transformer", expected="the new encoder, whose queries are mapped", got="none",
                cure="Give new_model.",
            )  # fmt: skip
        return save_as_sentence_transformer(self.model, path, new_model, document_model=old_model)

    def push_to_hub(
        self, repo_id: str, *, options: PushOptions | None = None, card: str | None = None, **settings: Any
    ) -> str:
        """Push the corrector with its notes; side features stay with the cache.

        The notes hold the ids of the targets it was fitted on, by which queries can be told clean. All but ``card`` is
        as in :meth:`CorrectorModel.push_to_hub`.

        Args:
            repo_id: The repository.
            options: How to push.
            card: Its model card, see :func:`~hf_corrector.cards.card_of_run`; by default one of what the corrector says
                of itself, which does not replace another.
            settings: Fields of :class:`PushOptions`, handed to it whole.
        """
        options = replace(PushOptions() if options is None else options, **settings)
        pushed = Card(card_of_corrector(self.model.describe())) if card is None else Card(card, replaces=True)

        def save(folder: str) -> None:
            self.with_side(None).save(folder)

        return push_saved(save, repo_id, CORRECTOR_FILES, options=options, card=pushed)

    @classmethod
    def load(cls, folder: str | Path, *, revision: str | None = None) -> FittedCorrector:
        """Read what :meth:`save` or a push wrote.

        Args:
            folder: Folder or Hub id.
            revision: Hub revision.

        Raises:
            InputError: If the folder holds no corrector of an upgrade or of training, or a file cannot be trusted.
            HubError: If there is no such folder or repository.
        """
        path = checked(str(folder), CORRECTOR_FILES, {"revision": revision}).folder
        fitted = FittedTargets.load(path)
        if fitted is not None and fitted.encoder_fingerprint is not None and not (path / UPGRADE_FILE).exists():
            # Training leaves no other note: it corrects targets, towards the encoder that was trained.
            leads_to = EncoderFingerprint.from_dict(fitted.encoder_fingerprint)
            return cls(CorrectorModel.from_pretrained(str(path)), fitted, leads_to, folder=path)
        if fitted is None or not (path / UPGRADE_FILE).is_file():
            raise InputError(
                str(path), expected="a corrector that an upgrade or a training run has saved",
                got=f"no {UPGRADE_FILE}", cure="Name the folder 'corrector' in the output of one.",
            )  # fmt: skip
        notes = read_json(path / UPGRADE_FILE)
        if not isinstance(notes, dict) or set(notes) != {"direction", "leads_to"}:
            raise InputError(
                str(path / UPGRADE_FILE),
                expected="direction and leads_to",
                got=str(notes)[:80],
                cure="Restore the file.",
            )
        leads_to = EncoderFingerprint.from_dict(notes["leads_to"])
        model = CorrectorModel.from_pretrained(str(path))
        return cls(model, fitted, leads_to, str(notes["direction"]), folder=path)

    def with_side(self, side: SideFeatures | None) -> FittedCorrector:
        """Return the same with side features at hand."""
        return replace(self, side=side)

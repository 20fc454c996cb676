"""What a trainer puts on the Hub: the model, its tokenizers, its corrector and a card; never the run around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_corrector._distributed import on_main
from hf_corrector._files import write_text
from hf_corrector._hub import PushOptions
from hf_corrector.cards import CardFacts, card_of_run
from hf_corrector.errors import ConfigurationError
from hf_corrector.models.hub_files import CARD_FILE, CORRECTOR_FOLDER, DUAL_ENCODER_FILES, push_folder
from hf_corrector.records import RunRecord
from hf_corrector.training.cache_trainer import CacheTrainer


class PublishingTrainer(CacheTrainer):
    """A trainer whose saved models carry a model card, and that pushes the model alone.

    Attributes:
        card_facts: What the card is to say that no run knows of itself: licence, data sets, languages.
        published_files: Patterns of the files that belong to the model.
    """

    card_facts: CardFacts | None = None
    published_files: tuple[str, ...] = DUAL_ENCODER_FILES

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, see :meth:`CacheTrainer.train`; an earlier judgement is none of what comes of it."""
        self._report = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizers and corrector; where it is no checkpoint, a model card too."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.write_cards(Path(output_dir or str(self.args.output_dir)))

    def model_card(self, record: RunRecord) -> str:
        """Return the card of the model, from the record of the run."""
        return card_of_run(record, self.card_facts, of_encoder=True)

    def write_cards(self, folder: Path) -> None:
        """Write the model card into a saved model's folder, and one of the corrector into the corrector's."""
        record = self.run_record()

        def write() -> None:
            write_text(folder / CARD_FILE, self.model_card(record))
            if (folder / CORRECTOR_FOLDER).is_dir():
                write_text(folder / CORRECTOR_FOLDER / CARD_FILE, card_of_run(record, self.card_facts))

        on_main("writing the model card", write)

    def create_model_card(self) -> None:
        """Write the model card into ``output_dir``, instead of transformers' own."""
        self.write_cards(Path(str(self.args.output_dir)))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str:
        """Save the model and push it with tokenizers, corrector and card to ``args.hub_model_id``.

        Cache, tokenised corpus, checkpoints and ``run.json`` stay here.

        Args:
            commit_message: First line of the commit.
            blocking: Must be True; part of transformers' signature.
            token: By default ``args.hub_token``, or the one that ``hf auth login`` stored.
            revision: Branch; by default ``args.hub_revision``.
            private: Whether a new repository is private; by default ``args.hub_private_repo``.

        Returns:
            Address of the commit.

        Raises:
            ConfigurationError: If it is not to be waited for.
            HubError: If the Hub cannot be reached or refuses.
        """
        if not blocking:
            raise ConfigurationError(
                "push_to_hub", expected="blocking=True", got="blocking=False", cure="Call it in a thread of your own."
            )
        args, folder = self.args, Path(str(self.args.output_dir))
        self.save_model(_internal_call=True)
        self.write_cards(folder)
        options = PushOptions(
            private=args.hub_private_repo if private is None else private, revision=revision or args.hub_revision,
            commit_message=commit_message, token=token or args.hub_token, progress=not args.disable_tqdm,
        )  # fmt: skip
        repo_id = args.hub_model_id or folder.absolute().name
        return on_main("pushing", lambda: push_folder(folder, repo_id, self.published_files, options=options))

"""A model that goes to the Hub as it is saved, with a card of what it says of itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from transformers import PreTrainedModel

from hf_corrector._hub import PushOptions
from hf_corrector.models.hub_files import Card, push_saved


class PushedModel(PreTrainedModel):
    """A model with a card of its own.

    Attributes:
        saved_files: Patterns of the files that belong to it.
    """

    saved_files: ClassVar[tuple[str, ...]] = ()

    def own_card(self) -> str:
        """Return the card of the model where nothing is known of its training."""
        raise NotImplementedError

    def push_to_hub(self, repo_id: str, *, options: PushOptions | None = None, **settings: Any) -> str:
        """Push what :meth:`save_pretrained` writes; a card that is there stays.

        What training found it to be worth is pushed by ``trainer.push_to_hub``, by ``report.push_to_hub`` of an upgrade
        and by ``hf-corrector push``.

        Args:
            repo_id: The repository, made if there is none.
            options: How to push.
            settings: Fields of :class:`PushOptions` (``private``, ``create_pr``, ``revision``, ``commit_message``,
                ``token``), handed to it whole.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            HubError: If the Hub cannot be reached or refuses.
        """
        options = replace(PushOptions() if options is None else options, **settings)
        return push_saved(self.save_pretrained, repo_id, self.saved_files, options=options, card=Card(self.own_card()))

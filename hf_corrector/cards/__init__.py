"""Model cards, written from a run's record alone: no model, no data and no network is asked."""

from hf_corrector.cards.reading import card_of_reading_run, card_of_retrieval_augmented
from hf_corrector.cards.rendering import CardFacts, card_of_corrector, card_of_dual_encoder, card_of_run
from hf_corrector.cards.tables import MISSING

__all__ = [
    "MISSING", "CardFacts", "card_of_corrector", "card_of_dual_encoder", "card_of_reading_run",
    "card_of_retrieval_augmented", "card_of_run",
]  # fmt: skip

"""Loading, saving and pushing correctors, and which encoders one leads from and to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

from hf_corrector.cards import card_of_corrector
from hf_corrector.errors import CacheMismatchError
from hf_corrector.models.configuration_corrector import CorrectorConfig
from hf_corrector.models.hub_files import CORRECTOR_FILES, SAFELY, checked
from hf_corrector.models.pushed_model import PushedModel
from hf_corrector.records import EncoderFingerprint, shareable


class StoredCorrector(PushedModel):
    """The part of a corrector that reads and writes folders and repositories."""

    saved_files = CORRECTOR_FILES

    config: CorrectorConfig
    config_class = CorrectorConfig

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *args: Any,
        expected_stale: EncoderFingerprint | None = None,
        expected_fresh: EncoderFingerprint | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a saved corrector.

        Only safetensors and JSON are opened, and no code that comes with them is run.

        Args:
            name: Folder or Hub id.
            args: Handed to transformers' ``from_pretrained``.
            expected_stale: The encoder of the vectors that are to be corrected, for instance ``cache.fingerprint``.
            expected_fresh: The encoder that corrected vectors are to be compared with, for instance
                ``model.fingerprint("target")``.
            kwargs: Handed to transformers' ``from_pretrained``.

        Raises:
            CacheMismatchError: If it was fitted to another encoder than expected; names both.
            InputError: If a file cannot be trusted.
            HubError: If there is no such folder or repository.
            ValueError: If the weights are not those of a corrector of that configuration.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        found = checked(str(name), CORRECTOR_FILES, kwargs, subfolder=kwargs.get("subfolder", ""))
        found.refuse_adapter()
        found.check_config(cls.config_class)
        loaded: Any = super().from_pretrained(name, *args, **{**kwargs, **found.loading, **SAFELY})
        model, info = loaded
        if info["missing_keys"] or info["unexpected_keys"]:
            raise ValueError(
                f"{name}: expected the weights of a corrector of kind {model.config.kind!r}; got missing "
                f"{sorted(info['missing_keys'])[:3]}, unexpected {sorted(info['unexpected_keys'])[:3]}. "
                "Name the folder of a corrector, for instance out/corrector."
            )
        model.check_encoders(str(name), stale=expected_stale, fresh=expected_fresh)
        return loaded if wants_info else model

    def note_encoders(
        self, *, stale: EncoderFingerprint, fresh: EncoderFingerprint, direction: str = "targets", trained: bool = False
    ) -> None:
        """Write into the configuration between which encoders it leads; where on this machine they lie is left out.

        Args:
            stale: The encoder of the vectors it was fitted to.
            fresh: The encoder whose queries it serves, with its fingerprint for targets.
            direction: Which of the two it moves, see :class:`CorrectorConfig`.
            trained: Whether the fresh encoder has been trained since it came from the Hub, and so is at no commit.
        """
        noted = shareable(fresh.to_dict())
        self.config.stale_encoder, self.config.direction = shareable(stale.to_dict()), direction
        self.config.fresh_encoder = {**noted, "revision": None} if trained else noted

    def forget_encoders(self) -> None:
        """Say nothing of encoders any more, as when it is fitted anew: to which ones, whoever fits it knows."""
        self.config.stale_encoder = self.config.fresh_encoder = None

    def check_encoders(
        self, where: str, *, stale: EncoderFingerprint | None = None, fresh: EncoderFingerprint | None = None
    ) -> None:
        """Refuse encoders it was not fitted to, in whatever arithmetic they compute.

        Args:
            where: What to call the corrector in errors.
            stale: The encoder of the vectors that are to be corrected.
            fresh: The encoder that they are to be compared with.

        Raises:
            CacheMismatchError: Naming both and what differs; or that the corrector does not say.
        """
        noted = {"stale": self.config.stale_encoder, "fresh": self.config.fresh_encoder}
        for role, given in (("stale", stale), ("fresh", fresh)):
            if given is not None:
                _check_encoder(where, role, noted[role], given)

    def own_card(self) -> str:
        """Return the card of the corrector where nothing is known of how it was fitted."""
        return card_of_corrector(self.describe())

    def describe(self) -> dict[str, Any]:
        """Return what a run's record says of it, as JSON values."""
        config = self.config
        tensors = [*self.parameters(), *self.buffers()]
        return {
            "kind": config.kind, "side": config.side, "input_dim": config.input_dim, "output_dim": config.output_dim,
            "normalize_output": config.normalize_output, "direction": config.direction,
            "numbers": sum(one.numel() for one in tensors), "fitted_pairs": int(self.get_buffer("fitted_pairs")),
            "stale_encoder": config.stale_encoder, "fresh_encoder": config.fresh_encoder,
        }  # fmt: skip


def _check_encoder(where: str, role: str, noted: dict[str, Any] | None, given: EncoderFingerprint) -> None:
    if noted is None:
        raise CacheMismatchError(
            where, expected=f"a corrector fitted to the {role} encoder {_described(given)}",
            got="one that does not say which it was fitted to",
            cure="Leave the check out if you know that it fits; or fit it again.",
        )  # fmt: skip
    own = EncoderFingerprint.from_dict(noted)
    alike = replace(given, compute_dtype=own.compute_dtype)
    if own.digest != alike.digest:
        raise CacheMismatchError(
            where, expected=f"a corrector fitted to the {role} encoder {_described(given)}",
            got=f"one fitted to another encoder, {_described(own)}, which differs in (its / yours) "
            + "; ".join(own.differences(alike)),
            cure="Use the encoders it was fitted to, or fit another corrector.",
        )  # fmt: skip


def _described(fingerprint: EncoderFingerprint) -> str:
    revision = "" if fingerprint.revision is None else f" at revision {fingerprint.revision}"
    return f"{fingerprint.name!r}{revision}"

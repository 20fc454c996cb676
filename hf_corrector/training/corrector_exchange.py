"""Giving every process of a run the corrector the main one has fitted."""

from __future__ import annotations

from hf_corrector._distributed import broadcast_object, broadcast_tensors, is_main
from hf_corrector.models.modeling_corrector import CorrectorModel


def send_corrector(corrector: CorrectorModel) -> None:
    """Give the main process's corrector to all others; called by all of them."""
    corrector.config.fit_summary = broadcast_object(corrector.config.fit_summary)
    # How large some of its parts are (landmarks, tokens with a displacement) is decided by the fit.
    shapes = broadcast_object({name: tuple(one.shape) for name, one in corrector.state_dict().items()})
    if not is_main():
        own = corrector.state_dict()
        corrector.load_state_dict({name: own[name].new_zeros(shape) for name, shape in shapes.items()})
    broadcast_tensors(list(corrector.state_dict().values()))

"""Facts about the processes of a run; nothing else in the package asks for them."""

from __future__ import annotations

import torch


def world_size() -> int:
    """Return the number of processes that train together, 1 where none do."""
    return torch.distributed.get_world_size() if _initialised() else 1


def _initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

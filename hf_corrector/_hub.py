"""Files to the Hub and back, whatever they are; what may be sent or opened is decided by whoever asks.

One push is one commit: content is uploaded first, file by file, and nothing of it shows until the commit names all of
it. What the Hub already has is not sent again, so that a push that was cut off is finished by the same call.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm

from hf_corrector.errors import ConfigurationError, HFCorrectorError, HubError

# What a failed connection and a refused request have in common; the library behind the client changes its name.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_FAILURES = (_HTTP_ERROR, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class PushOptions:
    """How something is pushed.

    Attributes:
        private: Whether a new repository is private; by default what the account says. One that exists stays as it is.
        create_pr: Open a pull request instead of committing.
        revision: Branch to commit to, made if there is none; ``main`` by default.
        commit_message: First line of the commit.
        token: By default the one that ``hf auth login`` stored.
        progress: Whether to show progress bars.
    """

    private: bool | None = None
    create_pr: bool = False
    revision: str | None = None
    commit_message: str | None = None
    token: str | None = field(default=None, repr=False)
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse a pull request to a branch (ConfigurationError)."""
        if self.create_pr and self.revision is not None:
            raise ConfigurationError(
                "push", expected="create_pr or revision", got=f"create_pr and revision={self.revision!r}",
                cure="Leave one of them out: pull requests are opened against the main branch.",
            )  # fmt: skip


@dataclass(frozen=True)
class Upload:
    """What one commit is to bring about.

    Attributes:
        files: What goes where: a file on this machine, or bytes, by path in the repository.
        message: First line of the commit, where the options give none.
        repo_type: ``"model"`` or ``"dataset"``.
        owned: Patterns of what an earlier push of the same kind wrote: such files that are not in ``files`` go.
        kept: Paths that stay as they are where the repository has them.
    """

    files: Mapping[str, Path | bytes]
    message: str
    repo_type: str = "model"
    owned: Sequence[str] = ()
    kept: Sequence[str] = ()


def push(upload: Upload, repo_id: str, *, options: PushOptions | None = None) -> str:
    """Bring files to a repository, which is made if there is none.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        HubError: If the Hub cannot be reached or refuses.
    """
    options = PushOptions() if options is None else options
    api = HfApi(token=options.token)
    with _quiet(not options.progress), _explained(f"push to {repo_id}", _PUSH_CURE):
        full_name = api.create_repo(repo_id, private=options.private, repo_type=upload.repo_type, exist_ok=True).repo_id
        revision = options.revision
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(full_name, branch=revision, repo_type=upload.repo_type, exist_ok=True)
        there = set(api.list_repo_files(full_name, repo_type=upload.repo_type, revision=revision))
        additions = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=source)
            for name, source in upload.files.items() if not (name in upload.kept and name in there)
        ]  # fmt: skip
        gone = [
            CommitOperationDelete(path_in_repo=name)
            for name in sorted(there - upload.files.keys()) if any(fnmatch(name, one) for one in upload.owned)
        ]  # fmt: skip
        # One by one, so that what was sent before an interruption stays sent: the Hub keeps it until it is named.
        for addition in tqdm(additions, desc=f"push to {full_name}", unit="file", disable=not options.progress):
            api.preupload_lfs_files(
                full_name, [addition], repo_type=upload.repo_type, revision=revision, create_pr=options.create_pr
            )
        done = api.create_commit(
            full_name, [*additions, *gone], commit_message=options.commit_message or upload.message,
            repo_type=upload.repo_type, revision=revision, create_pr=options.create_pr,
        )  # fmt: skip
    return done.pr_url or done.commit_url


def fetch(  # noqa: PLR0913 - where from, and how, as the client asks it
    repo_id: str,
    names: Sequence[str],
    *,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Bring files of one commit into the local cache of the Hub.

    Args:
        repo_id: The repository.
        names: Patterns of paths; see :func:`exactly` for names that are none.
        repo_type: ``"model"`` or ``"dataset"``.
        revision: Branch, tag or commit.
        token: By default the one that ``hf auth login`` stored.
        cache_dir: Folder of another local cache.
        local_files_only: Look in the local cache alone.

    Returns:
        The snapshot's folder, whose name is the commit. It holds those of the files that there are, and perhaps others.

    Raises:
        HubError: If the Hub cannot be reached or there is no such repository.
    """
    with _explained(f"download of {repo_id}", _FETCH_CURE):
        found = snapshot_download(
            repo_id, repo_type=repo_type, revision=revision, allow_patterns=list(names), token=token,
            cache_dir=cache_dir, local_files_only=local_files_only,
        )  # fmt: skip
    return Path(str(found))


def fetch_file(
    repo_id: str, name: str, *, repo_type: str = "model", revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Bring one file into the local cache of the Hub; see :func:`fetch`.

    Raises:
        HubError: If there is no such file, or the Hub cannot be reached.
    """
    with _explained(f"download of {name} from {repo_id}", _FETCH_CURE):
        return Path(str(hf_hub_download(repo_id, name, repo_type=repo_type, revision=revision, token=token)))


def exactly(name: str) -> str:
    """Return the pattern that only this name fits."""
    return glob.escape(name)


_PUSH_CURE = "Log in with 'hf auth login' by a token that may write there, and check the name; then run it again."
# What stands in the words of a transfer that failed by Xet, the client's own protocol (huggingface_hub 2.4).
_OF_XET = "/xet-"
_XET_CURE = "Large files went by Xet here; with HF_HUB_DISABLE_XET=1 in the environment they go the plain way."
_FETCH_CURE = "Check name, revision and connection, or log in with 'hf auth login' if it is private."


@contextmanager
def _explained(where: str, cure: str) -> Iterator[None]:
    try:
        yield
    except HFCorrectorError:
        raise
    except _FAILURES as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        got = " ".join(lines)[:300] or type(error).__name__
        advice = f"{cure} {_XET_CURE}" if _OF_XET in got else cure
        raise HubError(where, expected="the Hub to do it", got=got, cure=advice) from error


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Leave the client's own progress bars out for a while."""
    if not quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()

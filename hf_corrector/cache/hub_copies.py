"""A cache as a data set repository of the Hub: the files its manifest names, and the manifest.

All of it is one commit, so that whoever reads the repository sees one whole cache. What the Hub has already is not sent
again: of a cache that was edited only what the edit wrote, of a push that was cut off only what is left.
"""

from __future__ import annotations

from pathlib import Path

from hf_corrector._hub import PushOptions, Upload, exactly, fetch, fetch_file, push
from hf_corrector._untrusted import check_link
from hf_corrector.cache.manifest import MANIFEST_FILE, CacheManifest
from hf_corrector.errors import CacheMismatchError

_CARD = """---
library_name: hf_corrector
tags:
- target-embeddings
- embeddings
---

# Target embeddings

Vectors of {dim} `{dtype}` numbers by {encoder}, with an id for each and checksums of everything.

```python
from hf_corrector import TargetCache

cache = TargetCache.from_hub("{repo_id}")
```

The files are safetensors and `manifest.json`, which says which encoder made the vectors; `expected=` refuses those of
another one.
"""


def push_cache(folder: Path, manifest: CacheManifest, repo_id: str, options: PushOptions | None) -> str:
    """Push an open cache.

    Args:
        folder: Its folder.
        manifest: The manifest it was opened with.
        repo_id: The data set repository.
        options: How to push.

    Raises:
        CacheMismatchError: If the folder holds another cache by now.
        InputError: If a file of it is a link out of the folder.
        HubError: If the Hub cannot be reached or refuses.
    """
    if CacheManifest.load(folder) != manifest:
        raise CacheMismatchError(
            str(folder), expected="the cache that was opened", got="another one, for instance a later edit of it",
            cure="Open it again and push that.",
        )  # fmt: skip
    names = [MANIFEST_FILE, *(entry.file for entry in manifest.files)]
    for name in names:
        check_link(folder, folder / name)
    made_by = manifest.fingerprint
    card = _CARD.format(
        dim=manifest.dim, dtype=manifest.dtype, repo_id=repo_id,
        encoder=f"`{made_by.name}`" + (f" at revision `{made_by.revision}`" if made_by.revision else ""),
    )  # fmt: skip
    files: dict[str, Path | bytes] = {**{name: folder / name for name in names}, "README.md": card.encode()}
    upload = Upload(
        files, "Upload target embeddings", repo_type="dataset", owned=("*.safetensors",), kept=("README.md",)
    )
    return push(upload, repo_id, options=options)


def fetch_cache(repo_id: str, revision: str | None, token: str | None) -> Path:
    """Bring the files a repository's manifest names into the local cache of the Hub; returns their folder.

    Raises:
        CacheError: If the manifest is damaged or names files it must not.
        HubError: If there is no such cache, or the Hub cannot be reached.
    """
    manifest_file = fetch_file(repo_id, MANIFEST_FILE, repo_type="dataset", revision=revision, token=token)
    manifest = CacheManifest.load(manifest_file.parent)
    names = [MANIFEST_FILE, *(entry.file for entry in manifest.files)]
    # Its folder is named after the commit: all files come from that one, whatever is pushed meanwhile.
    return fetch(
        repo_id, [exactly(name) for name in names], repo_type="dataset", revision=manifest_file.parent.name, token=token
    )

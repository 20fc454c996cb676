"""Read a retrieval data set from the Hugging Face Hub, in the layouts BEIR and mteb publish.

=======  ============  =============  =======================================
layout   targets       queries        judgements
=======  ============  =============  =======================================
mteb     ``corpus``    ``queries``    ``default`` or ``qrels``
subsets  ``x-corpus``  ``x-queries``  ``x-qrels``, for instance one per language
BEIR     ``corpus``    ``queries``    the data set ``<id>-qrels``
=======  ============  =============  =======================================

These are names of configurations. Queries may have a column ``answers``, lists of texts. A local folder that
:func:`datasets.load_dataset` understands (a downloaded repository) is read in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, get_dataset_config_names, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetsError

from hf_corrector.data.assembly import Judgement, Records, assemble, check_split_names, choose_splits
from hf_corrector.data.retrieval import RetrievalData, iterate_columns
from hf_corrector.errors import DataError

QRELS_COLUMNS = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class _Place:
    """One configuration of one data set."""

    source: str
    config: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.source} ({self.config})"

    def split_names(self) -> list[str]:
        with _own_errors(str(self)):
            names: list[str] = get_dataset_split_names(self.source, self.config, revision=self.revision)
        return names

    def load(self, split: str) -> Dataset:
        with _own_errors(str(self)):
            return load_dataset(self.source, self.config, split=split, revision=self.revision)


def load_hub(
    source: str, splits: Mapping[str, str] | None = None, *, subset: str | None = None, revision: str | None = None
) -> RetrievalData:
    """Read a data set with configurations for corpus, queries and judgements.

    Args:
        source: Hub id, for instance ``"mteb/scifact"`` or ``"BeIR/scifact"``, or a folder laid out like one.
        splits: Published splits of the judgements by ours, for instance ``{"dev": "validation"}``; None takes those
            called train, dev (or validation) and test.
        subset: Prefix of the configurations in a set that holds several, for instance ``"de"`` for ``de-corpus``.
        revision: Commit, tag or branch of ``source``; a separate ``<id>-qrels`` data set is read at its newest.

    Raises:
        ConfigurationError: If ``splits`` has other keys than train, dev and test.
        DataError: If there is no such data set, it has another layout, or its content is wrong.
        ConnectionError: If the Hub cannot be reached.
    """
    if splits is not None:
        check_split_names(splits)
    configs = _config_names(source, revision)
    places = {kind: _find(source, kind, configs, subset, revision) for kind in ("corpus", "queries")}
    qrels = _find_qrels(source, configs, subset, revision)
    chosen = choose_splits(qrels.split_names(), splits, where=str(qrels))
    # Judgements are small and come first, so that a set of another shape costs no large download.
    judgements = {split: _judgements(qrels, name) for split, name in chosen.items()}
    return assemble(_texts(places["corpus"]), _texts(places["queries"]), judgements)


@contextmanager
def _own_errors(where: str) -> Iterator[None]:
    """Turn what ``datasets`` raises about a missing or unreadable set into a DataError; connection errors pass."""
    try:
        yield
    except (DatasetsError, FileNotFoundError) as error:
        raise DataError(
            where, expected="a readable folder or data set on the Hub", got=_reason(error),
            cure="Check the spelling; for a private or gated set log in with `hf auth login`.",
        ) from error  # fmt: skip


def _reason(error: BaseException) -> str:
    """Join an error and its cause; ``datasets`` often keeps the informative half in the cause."""
    return f"{error} {error.__cause__}" if error.__cause__ else str(error)


def _config_names(source: str, revision: str | None) -> list[str]:
    with _own_errors(source):
        names: list[str] = get_dataset_config_names(source, revision=revision)
    return names


def _find(source: str, kind: str, configs: list[str], subset: str | None, revision: str | None) -> _Place:
    wanted = kind if subset is None else f"{subset}-{kind}"
    if wanted not in configs:
        found = sorted(name.removesuffix(f"-{kind}") for name in configs if name.endswith(f"-{kind}"))
        cure = (
            f"Choose one with `subset`: {found}."
            if found
            else "For a set of text pairs, use from_pairs(datasets.load_dataset(...)) instead."
        )
        raise DataError(source, expected=f"a configuration {wanted!r}", got=f"the configurations {configs}", cure=cure)
    return _Place(source, wanted, revision)


def _find_qrels(source: str, configs: list[str], subset: str | None, revision: str | None) -> _Place:
    candidates = ["qrels", "default"] if subset is None else [f"{subset}-qrels", subset]
    for name in candidates:
        if name in configs:
            return _Place(source, name, revision)
    separate = f"{source.rstrip('/')}-qrels"
    try:
        return _Place(separate, _config_names(separate, None)[0], None)
    except DataError as error:
        raise DataError(
            source, expected=f"judgements in a configuration {' or '.join(candidates)}, or in {separate}",
            got=f"the configurations {configs}", cure="Publish the judgements in one of these places.",
        ) from error  # fmt: skip


def _judgements(place: _Place, split: str) -> Records[Judgement]:
    dataset = place.load(split)
    name = f"{place}, split {split}"
    if not set(QRELS_COLUMNS) <= set(dataset.column_names):
        raise DataError(
            name, expected=f"the columns {list(QRELS_COLUMNS)}", got=f"{dataset.column_names}",
            cure="For a set of text pairs, use from_pairs(datasets.load_dataset(...)) instead.",
        )  # fmt: skip
    judgements: list[tuple[int, Judgement]] = []
    records = Records(name, "row", judgements)
    for row, (query_id, target_id, grade) in enumerate(iterate_columns(dataset, *QRELS_COLUMNS)):
        if not isinstance(grade, int | float) or int(grade) != grade:
            raise DataError(
                records.where(row), expected="an integer score", got=repr(grade), cure="Publish integer scores."
            )
        judgements.append((row, Judgement(str(query_id), str(target_id), int(grade))))
    return records


def _texts(place: _Place) -> Records[Any]:
    """Read all splits of a configuration, one after the other; there is usually one."""

    def items() -> Iterator[tuple[int, Any]]:
        row = 0
        for split in place.split_names():
            for record in place.load(split).with_format(None):
                yield row, record
                row += 1

    return Records(str(place), "row", items())

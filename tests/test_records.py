import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hf_corrector.errors import InputError
from hf_corrector.records import (
    RECORD_FILE,
    RECORDED_PACKAGES,
    EncoderFingerprint,
    FittedTargets,
    RunRecord,
    collect_versions,
    describe_machine,
)
from hf_corrector.version import __version__

FINGERPRINT = EncoderFingerprint(
    name="some/encoder", weights="w", tokenizer="t", prompt="p: ", max_length=64, pooling="mean", normalize=True,
    role="target", compute_dtype="float32", revision="abc",
)  # fmt: skip
CHANGES: dict[str, Any] = {
    "weights": "x", "tokenizer": "x", "prompt": "", "max_length": 65, "pooling": "cls", "normalize": False,
    "role": "query", "compute_dtype": "bfloat16", "corrected_from": "c",
}  # fmt: skip


@pytest.mark.parametrize("field", sorted(CHANGES))
def test_each_thing_that_changes_a_vector_changes_the_digest_and_is_named(field: str) -> None:
    other = replace(FINGERPRINT, **{field: CHANGES[field]})
    assert other.digest != FINGERPRINT.digest
    assert FINGERPRINT.differences(other) == [f"{field}: {getattr(FINGERPRINT, field)!r} / {CHANGES[field]!r}"]


def test_name_and_revision_are_for_people() -> None:
    other = replace(FINGERPRINT, name="a copy", revision=None)
    assert other.digest == FINGERPRINT.digest
    assert FINGERPRINT.differences(other) == []


def test_digest_is_stable_between_runs_and_versions() -> None:
    assert FINGERPRINT.digest == "b847100c2c77e00558fd81172309b96e"


def test_digest_does_not_confuse_neighbouring_fields() -> None:
    assert replace(FINGERPRINT, prompt="a", pooling="b").digest != replace(FINGERPRINT, prompt="b", pooling="a").digest
    assert replace(FINGERPRINT, max_length=1).digest != replace(FINGERPRINT, normalize=True, max_length=11).digest


def test_fingerprint_survives_json() -> None:
    assert EncoderFingerprint.from_dict(json.loads(json.dumps(asdict(FINGERPRINT)))) == FINGERPRINT


@pytest.mark.parametrize(
    ("value", "named"),
    [({**asdict(FINGERPRINT), "extra": 1}, "extra"), ({"name": "x"}, "weights"), ([], "list"), (None, "NoneType")],
)
def test_fingerprint_of_other_fields_is_refused_naming_them(value: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        EncoderFingerprint.from_dict(value)


def test_revision_may_be_missing() -> None:
    content = asdict(FINGERPRINT)
    del content["revision"]
    assert EncoderFingerprint.from_dict(content).revision is None


def test_what_an_encoder_made_itself_is_written_as_it_always_was() -> None:
    corrected = replace(FINGERPRINT, corrected_from="c")
    assert "corrected_from" not in FINGERPRINT.to_dict() and corrected.to_dict()["corrected_from"] == "c"
    for one in (FINGERPRINT, corrected):
        assert EncoderFingerprint.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.parametrize(
    "note",
    [
        FittedTargets("c", "e", (1, 5)),
        FittedTargets("c", "e", (1, 5), ids=("a", "b"), encoder_fingerprint=FINGERPRINT.to_dict()),
        FittedTargets("c", "e", (), ids=()),
        FittedTargets("c", "e", (1,), side_details={"prompt": "p", "max_length": 9}, direction="queries"),
    ],
)
def test_what_a_corrector_was_fitted_on_survives_saving(note: FittedTargets, tmp_path: Path) -> None:
    note.save(tmp_path)
    assert FittedTargets.load(tmp_path) == note
    assert FittedTargets.load(tmp_path / "nowhere") is None


def test_a_note_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "fitted_targets.json").write_text('{"cache": "c", "encoder": "e", "rows": [3, 4]}')
    assert FittedTargets.load(tmp_path) == FittedTargets("c", "e", (3, 4))
    (tmp_path / "fitted_targets.json").write_text('{"cache": "c", "rows": [3, 4]}')
    with pytest.raises(InputError, match="encoder"):
        FittedTargets.load(tmp_path)


def test_precomputed_vectors_are_told_apart_by_their_name() -> None:
    one, other = (EncoderFingerprint.of_precomputed(name, normalize=True) for name in ("v1", "v2"))
    assert one.digest != other.digest
    assert one.digest == EncoderFingerprint.of_precomputed("v1", normalize=True).digest
    assert one.digest != EncoderFingerprint.of_precomputed("v1", normalize=False).digest


def test_run_record_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    record = RunRecord(
        command="train", seed=3, arguments={"lr": 1e-3, "names": ["ä", None]}, evaluation={"stale": {"mrr@10": 0.5}},
        fidelity={"total_variation": 0.1}, cost={"query_passes": 7}, timing={"fit": 1.25},
        manifests=[{"rows": 3}], history=[{"step": 1, "loss": 0.5}],
    )  # fmt: skip
    assert record.save(tmp_path / "deep" / "run") == tmp_path / "deep" / "run" / RECORD_FILE
    assert RunRecord.load(tmp_path / "deep" / "run") == record


def test_run_record_that_is_not_json_can_not_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        RunRecord(command="train", seed=0, arguments={}, timing={"fit": float("nan")}).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_run_record_of_other_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / RECORD_FILE).write_text('{"command": "train", "seed": 1, "arguments": {}, "surprise": 1}')
    with pytest.raises(InputError, match="surprise"):
        RunRecord.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        RunRecord.load(tmp_path / "nowhere")


def test_versions_name_this_package_python_and_all_dependencies() -> None:
    versions = collect_versions()
    assert versions["hf_corrector"] == __version__
    assert set(versions) == {"hf_corrector", "python", *RECORDED_PACKAGES}
    assert versions["torch"][0].isdigit()


def test_machine_is_described_without_naming_host_or_user() -> None:
    assert describe_machine().endswith("cores")
    assert "\n" not in describe_machine()

"""``hf-corrector search`` by every backend: the same targets, one way or another."""

import re

import pytest
import torch

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cli.main import main
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel
from hf_corrector.records import FittedTargets

TEXTS = [f"the files number {row} are sorted and counted by name" for row in range(60)]


@pytest.fixture(scope="module")
def arguments(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("search")
    model = DualEncoderModel.from_encoder(tiny_encoder)
    cache = TargetCache.from_arrays(
        folder / "cache", model.encode_target(TEXTS), [f"t{row}" for row in range(60)],
        fingerprint=model.fingerprint("target"),
    )  # fmt: skip
    corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=cache.dim))
    corrector.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    corrector.save_pretrained(folder / "corrector")
    FittedTargets(cache.manifest.checksum, model.fingerprint("target").digest, ()).save(folder / "corrector")
    return [
        "search", "--cache", str(folder / "cache"), "--model", tiny_encoder, "--corrector", str(folder / "corrector"),
        "--query", "sort the files", "--query", "number 7", "--top_k", "4",
    ]  # fmt: skip


def found(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return re.findall(r"^ +\d\. -?\d\.\d{4}  t\d+$", capsys.readouterr().out, flags=re.MULTILINE)


def test_every_backend_finds_the_same(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    expected = found(capsys)
    assert len(expected) == 8
    for more in (
        ["--backend", "exact"], ["--backend", "folded"], ["--backend", "two_stage"],
        ["--backend", "two_stage", "--certify"], ["--backend", "two_stage", "--shortlist", "60"],
        ["--backend", "faiss:Flat", "--shortlist", "60"],
        ["--backend", "faiss:HNSW8", "--shortlist", "60", "--ef_search", "200"],
    ):  # fmt: skip
        assert main([*arguments, *more]) == 0, more
        assert found(capsys) == expected, more


@pytest.mark.parametrize("backend", ["flat", "faiss", "faiss:", "exact:Flat", "faiss:nonsense"])
def test_an_unknown_backend_is_explained(
    backend: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--backend", backend]) == 1
    shown = capsys.readouterr().err
    assert ("--backend" in shown or "faiss factory" in shown) and "Traceback" not in shown

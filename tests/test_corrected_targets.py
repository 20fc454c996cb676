import pytest
import torch
from torch.nn.functional import normalize

from hf_corrector.corrected_targets import READ_ROWS, CorrectedTargets
from hf_corrector.errors import ConfigurationError
from hf_corrector.index.base import TensorVectors
from hf_corrector.models import CorrectorConfig, CorrectorModel

NO_SNAPSHOT, SNAPSHOT = 0, 2**30


def rows(count: int = 50, dim: int = 6, dtype: torch.dtype = torch.float32) -> TensorVectors:
    return TensorVectors(torch.randn(count, dim, generator=torch.Generator().manual_seed(0)).to(dtype))


def affine(dim_out: int = 6) -> CorrectorModel:
    corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=6, output_dim=dim_out))
    generator = torch.Generator().manual_seed(1)
    for buffer in (corrector.mean, corrector.weight, corrector.bias):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return corrector


@pytest.mark.parametrize("kept", [NO_SNAPSHOT, SNAPSHOT])
def test_without_corrector_the_stale_rows_are_seen(kept: int) -> None:
    seen = CorrectedTargets(rows(), None, snapshot_bytes=kept)
    assert (len(seen), seen.dim) == (50, 6)
    assert torch.equal(seen.read(3, 20), rows().tensor[3:20])
    assert torch.equal(seen.gather(torch.tensor([7, 0, 7])), rows().tensor[[7, 0, 7]])


@pytest.mark.parametrize("kept", [NO_SNAPSHOT, SNAPSHOT])
@pytest.mark.parametrize("normalize_output", [True, False])
def test_identity_corrector_is_no_corrector_bit_for_bit(kept: int, normalize_output: bool) -> None:
    identity = CorrectorModel(CorrectorConfig(kind="identity", input_dim=6, normalize_output=normalize_output))
    with_identity = CorrectedTargets(rows(), identity, snapshot_bytes=kept)
    without = CorrectedTargets(rows(), None, snapshot_bytes=kept)
    assert torch.equal(with_identity.read(0, 50), without.read(0, 50))
    assert torch.equal(with_identity.gather(torch.tensor([4, 4, 1])), without.gather(torch.tensor([4, 4, 1])))


@pytest.mark.parametrize("kind", ["mean_shift", "affine", "residual_mlp"])
def test_untrained_corrector_changes_unit_vectors_by_rounding_only(kind: str) -> None:
    unit = TensorVectors(normalize(rows().tensor, dim=1))
    seen = CorrectedTargets(unit, CorrectorModel(CorrectorConfig(kind=kind, input_dim=6)))
    assert torch.allclose(seen.read(0, 50), unit.tensor, atol=1e-6)


@pytest.mark.parametrize("kept", [NO_SNAPSHOT, SNAPSHOT])
@pytest.mark.parametrize("dim_out", [6, 4])
def test_rows_are_what_the_corrector_returns(kept: int, dim_out: int) -> None:
    seen, expected = CorrectedTargets(rows(), affine(dim_out), snapshot_bytes=kept), affine(dim_out)(rows().tensor)
    assert seen.dim == dim_out
    assert torch.allclose(seen.read(0, 50), expected, atol=1e-6)
    assert torch.allclose(seen.read(10, 13), expected[10:13], atol=1e-6)
    for wanted in (torch.tensor([49, 3, 3, 0]), torch.tensor([3, 4, 17, 49]), torch.tensor([3, 3, 49])):
        assert torch.allclose(seen.gather(wanted), expected[wanted], atol=1e-6)
    assert not seen.read(0, 1).requires_grad


@pytest.mark.parametrize("kept", [NO_SNAPSHOT, SNAPSHOT])
def test_gathering_no_rows_gives_no_rows(kept: int) -> None:
    assert CorrectedTargets(rows(), affine(4), snapshot_bytes=kept).gather(torch.zeros(0, dtype=torch.int64)).shape == (
        0, 4,
    )  # fmt: skip


def test_snapshot_of_several_chunks_is_whole() -> None:
    many = rows(READ_ROWS + 100)
    seen = CorrectedTargets(many, affine())
    assert torch.allclose(seen.read(0, len(many)), affine()(many.tensor), atol=1e-5)


def test_more_rows_than_a_chunk_are_gathered_as_fewer_are() -> None:
    many = rows(READ_ROWS + 100)
    seen = CorrectedTargets(many, affine(), snapshot_bytes=NO_SNAPSHOT)
    for wanted in (torch.arange(len(many)), torch.arange(len(many)).flip(0)):
        assert torch.allclose(seen.gather(wanted), affine()(many.tensor)[wanted], atol=1e-5)


def test_snapshot_is_made_once_until_it_is_invalidated() -> None:
    corrector = affine()
    seen = CorrectedTargets(rows(), corrector)
    before = seen.read(0, 50).clone()
    corrector.bias.add_(1.0)
    assert torch.equal(seen.read(0, 50), before)
    seen.invalidate()
    assert torch.allclose(seen.read(0, 50), corrector(rows().tensor), atol=1e-6)


def test_without_room_for_a_snapshot_every_read_is_corrected_anew() -> None:
    corrector = affine()
    seen = CorrectedTargets(rows(), corrector, snapshot_bytes=50 * 6 * 4 - 1)
    seen.read(0, 50)
    corrector.bias.add_(1.0)
    assert torch.allclose(seen.read(0, 50), corrector(rows().tensor), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [NO_SNAPSHOT, SNAPSHOT])
def test_half_precision_rows_are_seen_in_float32(dtype: torch.dtype, kept: int) -> None:
    for corrector in (None, CorrectorModel(CorrectorConfig(input_dim=6)), affine()):
        seen = CorrectedTargets(rows(dtype=dtype), corrector, snapshot_bytes=kept)
        assert seen.read(0, 5).dtype == seen.gather(torch.arange(3)).dtype == torch.float32


def test_training_leaves_no_trace_on_the_corrector() -> None:
    corrector = CorrectorModel(CorrectorConfig(kind="residual_mlp", input_dim=6))
    assert not CorrectedTargets(rows(), corrector).read(0, 50).requires_grad


def test_corrector_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="size 5"):
        CorrectedTargets(rows(dim=5), affine())

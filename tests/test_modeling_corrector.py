import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel

from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.models.configuration_corrector import KINDS
from hf_corrector.models.modeling_corrector import CORRECT_CHUNK_ROWS

BETWEEN_SIZES = ("procrustes", "low_rank", "affine", "kernel", "residual_mlp")
LEARNING = tuple(kind for kind in KINDS if kind != "identity")


def make(kind: str, dim_in: int = 6, dim_out: int | None = None, **settings: object) -> CorrectorModel:
    return CorrectorModel(CorrectorConfig(kind=kind, input_dim=dim_in, output_dim=dim_out, **settings))


def trained(kind: str, dim_in: int = 6, dim_out: int | None = None, **settings: object) -> CorrectorModel:
    """Make a corrector whose every weight is a random number."""
    corrector = make(kind, dim_in, dim_out, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in corrector.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return corrector


def vectors(count: int = 9, dim: int = 6) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_identity_returns_its_input_bit_for_bit(dtype: torch.dtype) -> None:
    stale = vectors().to(dtype)
    corrected = make("identity")(stale)
    assert corrected.dtype == dtype
    assert torch.equal(corrected, stale)
    assert torch.equal(make("identity").correct(stale), stale.float())


@pytest.mark.parametrize("kind", LEARNING)
def test_untrained_corrector_is_the_identity(kind: str) -> None:
    stale = vectors()
    assert torch.equal(make(kind, normalize_output=False)(stale), stale)
    assert torch.equal(make(kind)(stale), normalize(stale, dim=-1))


@pytest.mark.parametrize("kind", BETWEEN_SIZES)
@pytest.mark.parametrize("dim_out", [4, 9])
def test_untrained_corrector_between_sizes_cuts_or_fills_up(kind: str, dim_out: int) -> None:
    corrected = make(kind, 6, dim_out, normalize_output=False)(vectors())
    assert torch.equal(corrected[:, :4], vectors()[:, :4])
    assert not corrected[:, 6:].any()


def test_mean_shift_adds_one_vector() -> None:
    corrector = trained("mean_shift", normalize_output=False)
    assert torch.equal(corrector(vectors()), vectors() + corrector.shift)


@pytest.mark.parametrize("dim_out", [6, 4])
def test_affine_displaces_by_a_linear_map_of_the_centred_vector(dim_out: int) -> None:
    corrector = trained("affine", 6, dim_out, normalize_output=False)
    expected = (vectors() - corrector.mean) @ corrector.weight.T + corrector.bias
    expected = expected + vectors() if dim_out == 6 else expected
    assert torch.allclose(corrector(vectors()), expected, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("dim_out", [6, 4])
def test_residual_mlp_adds_a_hidden_layer_to_the_input(activation: str, dim_out: int) -> None:
    corrector = trained("residual_mlp", 6, dim_out, activation=activation, normalize_output=False)
    nonlinear = {"relu": torch.nn.ReLU(), "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU()}[activation]
    hidden = nonlinear(vectors() @ corrector.hidden.weight.T + corrector.hidden.bias)
    base = vectors() if dim_out == 6 else vectors() @ corrector.skip.T
    expected = base + hidden @ corrector.output.weight.T + corrector.output.bias
    assert torch.allclose(corrector(vectors()), expected, atol=1e-4)


@pytest.mark.parametrize("kind", LEARNING)
def test_output_has_unit_length_where_the_encoder_normalises(kind: str) -> None:
    raw, unit = trained(kind, normalize_output=False), trained(kind)
    assert torch.allclose(unit(vectors()), normalize(raw(vectors()), dim=-1), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_goes_back_to_the_identity(kind: str) -> None:
    corrector = trained(kind)
    corrector.fitted_pairs.fill_(7)
    corrector.reset()
    assert torch.equal(corrector(vectors()), make(kind)(vectors()))
    assert corrector.fitted_pairs == 0


@pytest.mark.parametrize("dim_out", [4, 9])
def test_reset_between_sizes_cuts_or_fills_up_again(dim_out: int) -> None:
    for kind in BETWEEN_SIZES:
        corrector = trained(kind, 6, dim_out)
        corrector.reset()
        assert torch.equal(corrector(vectors()), make(kind, 6, dim_out)(vectors()))


@pytest.mark.parametrize("kind", LEARNING)
def test_arithmetic_is_float32_under_autocast(kind: str) -> None:
    corrector, expected = trained(kind), trained(kind)(vectors())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(corrector(vectors()), expected)
    assert corrector(vectors().bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------------- saving, loading, moving


@pytest.mark.parametrize("dim_out", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_corrector_returns_the_same_bits(kind: str, dim_out: int | None, tmp_path: Path) -> None:
    if dim_out is not None and kind not in BETWEEN_SIZES:
        with pytest.raises(ValueError, match="equal sizes"):
            make(kind, 6, dim_out)
        return
    corrector = trained(kind, 6, dim_out)
    corrector.fitted_pairs.fill_(12)
    corrector.save_pretrained(tmp_path)
    for loaded in (
        CorrectorModel.from_pretrained(tmp_path),
        CorrectorModel.from_pretrained(tmp_path, dtype="bfloat16"),
    ):
        assert torch.equal(loaded(vectors()), corrector(vectors()))
        assert loaded.fitted_pairs == 12
        assert {**loaded.config.to_diff_dict(), "dtype": ""} == {**corrector.config.to_diff_dict(), "dtype": ""}
        assert loaded.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_corrector_stays_float32_when_it_is_told_to_be_half(kind: str) -> None:
    for corrector in (trained(kind).to(torch.bfloat16), trained(kind).half(), trained(kind).double()):
        assert torch.equal(corrector(vectors()), trained(kind)(vectors()))
        assert {one.dtype for one in corrector.state_dict().values()} <= {torch.float32, torch.int64}


def test_corrector_moves_to_another_device_all_the_same() -> None:
    moved = trained("residual_mlp").to("meta", torch.bfloat16)
    assert {(one.device.type, one.dtype) for one in moved.state_dict().values()} == {
        ("meta", torch.float32), ("meta", torch.int64),
    }  # fmt: skip


def test_corrector_inside_a_module_stays_float32() -> None:
    around = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2), "corrector": trained("affine")}).to(torch.bfloat16)
    assert around["linear"].weight.dtype == torch.bfloat16
    assert torch.equal(around["corrector"](vectors()), trained("affine")(vectors()))


def test_auto_classes_know_the_corrector(tmp_path: Path) -> None:
    corrector = trained("affine")
    corrector.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CorrectorConfig)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, CorrectorModel)
    assert torch.equal(loaded(vectors()), corrector(vectors()))


def test_weights_are_safetensors_and_a_summary_of_the_fit_is_kept(tmp_path: Path) -> None:
    corrector = trained("affine")
    corrector.config.fit_summary = {"pairs": 3, "ridge": 0.1}
    corrector.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["fit_summary"] == {"pairs": 3, "ridge": 0.1}
    assert CorrectorModel.from_pretrained(tmp_path).config.fit_summary == {"pairs": 3, "ridge": 0.1}


# ---------------------------------------------------------------------- correct()


@pytest.mark.parametrize("kind", KINDS)
def test_correct_takes_and_returns_torch_and_numpy(kind: str) -> None:
    corrector = trained(kind)
    from_torch, from_numpy = corrector.correct(vectors()), corrector.correct(vectors().numpy())
    assert isinstance(from_torch, torch.Tensor)
    assert isinstance(from_numpy, np.ndarray)
    assert from_numpy.dtype == np.float32
    assert torch.equal(from_torch, corrector(vectors()).detach())
    assert np.array_equal(from_numpy, from_torch.numpy())
    assert not from_torch.requires_grad


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_correct_returns_float32_for_any_floats_in_any_order(dtype: type) -> None:
    corrector = trained("affine")
    stale = np.asfortranarray(vectors().numpy().astype(dtype))[::-1]
    expected = corrector(torch.from_numpy(stale.astype(np.float32).copy()))
    assert corrector.correct(stale).dtype == np.float32
    assert np.allclose(corrector.correct(stale), expected.numpy(), atol=1e-6)


def test_correct_works_in_chunks_and_passes_over_none() -> None:
    corrector = trained("affine", 3)
    stale = vectors(2 * CORRECT_CHUNK_ROWS + 5, 3)
    assert torch.allclose(corrector.correct(stale), corrector(stale), atol=1e-6)
    assert corrector.correct(stale[:0]).shape == (0, 3)


def test_correct_reads_a_memory_map_that_cannot_be_written(tmp_path: Path) -> None:
    np.save(tmp_path / "stale.npy", vectors().numpy())
    mapped = np.load(tmp_path / "stale.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corrected = trained("affine").correct(mapped)
    assert np.array_equal(corrected, trained("affine").correct(vectors().numpy()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_correct_names_the_row_that_is_not_finite(bad: float) -> None:
    stale = vectors(CORRECT_CHUNK_ROWS + 10, 6)
    stale[CORRECT_CHUNK_ROWS + 3, 2] = bad
    with pytest.raises(ValueError, match=f"row {CORRECT_CHUNK_ROWS + 3}"):
        trained("affine").correct(stale)


@pytest.mark.parametrize(
    "stale", [torch.ones(3, 5), torch.ones(6), torch.ones(2, 3, 6), torch.ones(3, 6, dtype=torch.int64)]
)
def test_vectors_of_another_shape_are_refused(stale: torch.Tensor) -> None:
    for call in (trained("affine"), trained("affine").correct):
        with pytest.raises(ValueError, match="shape"):
            call(stale)


def test_side_features_are_refused() -> None:
    with pytest.raises(ValueError, match="side"):
        trained("affine")(vectors(), vectors())


# ---------------------------------------------------------------------- configuration


def test_sizes_follow_from_the_input() -> None:
    config = CorrectorConfig(input_dim=10)
    assert (config.kind, config.output_dim, config.hidden_dim) == ("identity", 10, 20)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "spline"}, "kind"),
        ({"kind": "affine", "side": "weather", "side_dim": 3}, "side"),
        ({"kind": "identity", "side": "matrix", "side_dim": 3}, "side"),
        ({"kind": "affine", "side": "matrix"}, "side_dim"),
        ({"kind": "affine", "side_dim": 3}, "side"),
        ({"activation": "tanh"}, "activation"),
        ({"input_dim": 0}, "sizes"),
        ({"kind": "affine", "output_dim": 0}, "sizes"),
        ({"kind": "residual_mlp", "hidden_dim": 0}, "sizes"),
        ({"kind": "mean_shift", "input_dim": 3, "output_dim": 4}, "equal sizes"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CorrectorConfig(**settings)

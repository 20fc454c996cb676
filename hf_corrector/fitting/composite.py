"""Ridge regression on several blocks of features at once: stale vector, landmarks, side features.

What a prior map leaves over is explained by a sum of linear functions, one for each block, each with a strength of its
own (its expected share of the signal, relative to noise). The fit is the mean of a Gaussian process whose kernel is the
weighted sum of the blocks' kernels (Rasmussen and Williams, 2006, ch. 2): solved in the dual for as many pairs as fit,
by conjugate gradients beyond. Strengths are chosen by exact leave-one-target-out errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting.affine import fit_affine, fit_procrustes
from hf_corrector.fitting.blocks import (
    PIECE_ROWS,
    Block,
    DenseBlocks,
    Landmarks,
    TokenColumns,
    token_blocks,
    transposed,
    typical_distance,
)
from hf_corrector.fitting.pairs import Pairs
from hf_corrector.fitting.strengths import choose_strengths, noise_of, time_kernel

# Above this many targets the matrix of the dual problem is not formed.
MAX_DUAL_ROWS = 8192
CG_TOLERANCE = 1e-6
CG_STEPS = 200
CG_COLUMNS = 64
# Kernel widths tried, relative to the typical distance between two stale vectors.
RELATIVE_WIDTHS = (1.0, 0.5)
DEFAULT_LANDMARKS = 2048


@dataclass(frozen=True)
class CompositePlan:
    """What a composite fit consists of.

    Attributes:
        prior: Map the ridge shrinks towards: ``"identity"``, ``"procrustes"``, ``"zero"``, or ``"best"`` for the one
            of least leave-one-target-out error as in :func:`fit_affine`.
        linear: Whether the stale vector itself is a block; without it the prior map stays as it is.
        landmarks: Landmarks of a radial kernel on the stale vector; 0 for none.
        strengths: Strengths by block name as found by an earlier fit, used as they are; chosen anew if None.
        relative_width: Kernel width of that earlier fit; chosen anew if None.
        seed: Seed of the choice of landmarks.
        dtype: Precision of the dual solve.
        memory_bytes: With more targets than :data:`MAX_DUAL_ROWS`: refuse fits that need more than this for their dense
            features (stale vector, landmarks, dense side features; 8 bytes each) and for solving.
    """

    prior: str = "best"
    linear: bool = True
    landmarks: int = 0
    strengths: dict[str, float] | None = None
    relative_width: float | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float64
    memory_bytes: int = 4 * 2**30


@dataclass(frozen=True, eq=False)
class RadialPart:
    """Sum of radial functions around landmarks.

    Attributes:
        landmarks: ``(p, dim_in)`` float32.
        weight: ``(p, dim_out)`` float32.
        width: Width of the radial function.
    """

    landmarks: torch.Tensor
    weight: torch.Tensor
    width: float


@dataclass(frozen=True, eq=False)
class TokenPart:
    """A displacement for each token column that the pairs have shown.

    Attributes:
        columns: Which columns, and how all are weighted.
        table: ``(m, dim_out)`` float32.
    """

    columns: TokenColumns
    table: torch.Tensor


@dataclass(frozen=True, eq=False)
class DensePart:
    """A linear function of dense side features.

    Attributes:
        mean: ``(s,)`` float32.
        weight: ``(s, dim_out)`` float32.
    """

    mean: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True, eq=False)
class CompositeFit:
    """A fitted sum: z maps to ``[z +] weight (z − mean) + bias + radial + side``, ``z +`` where sizes agree.

    Attributes:
        mean: ``(dim_in,)`` float32.
        weight: ``(dim_out, dim_in)`` float32.
        bias: ``(dim_out,)`` float32.
        radial: The sum around landmarks, or None.
        side: What side features add, or None.
        prior: The prior taken.
        strengths: Strength of each block.
        relative_width: Kernel width relative to the typical distance.
        loo_error: Mean squared leave-one-target-out error, on a subset where there are many pairs.
        pairs: Number of distinct targets.
    """

    mean: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    radial: RadialPart | None
    side: TokenPart | DensePart | None
    prior: str
    strengths: dict[str, float]
    relative_width: float
    loo_error: float
    pairs: int


def fit_composite(pairs: Pairs, plan: CompositePlan | None = None) -> CompositeFit:
    """Fit a prior map plus linear functions of several blocks of features.

    Args:
        pairs: What to fit on; their side features, if any, are a block (tokens two).
        plan: What else to use.

    Raises:
        ConfigurationError: If the prior does not fit the sizes, more targets than :data:`MAX_DUAL_ROWS` have a clock,
            or the features need more memory than the plan allows.
    """
    plan = CompositePlan() if plan is None else plan
    check_memory(pairs, plan)
    if pairs.clock is not None and len(pairs) > MAX_DUAL_ROWS:
        raise ConfigurationError(
            "corrector fit", expected=f"at most {MAX_DUAL_ROWS} targets with a clock", got=str(len(pairs)),
            cure="Keep the latest ones.",
        )  # fmt: skip
    setting = _Setting.of(pairs, plan)
    widths = RELATIVE_WIDTHS if plan.relative_width is None else (plan.relative_width,)
    best: tuple[float, float, dict[str, float]] | None = None
    kept: list[Block] = []
    for width in widths if plan.landmarks else (0.0,):
        blocks = setting.blocks(width, plan)
        start = plan.strengths if best is None else best[2]
        error, strengths = choose_strengths(
            blocks, setting.residual, pairs, start=start, fixed=plan.strengths is not None
        )
        if best is None or error < best[0]:
            best = (error, width, strengths)
            kept = blocks
        if len(pairs) > MAX_DUAL_ROWS and width != widths[-1]:
            kept = []  # made again if it is chosen, as two of this size need too much memory
        del blocks
    error, width, strengths = best if best is not None else (0.0, 0.0, {})
    blocks = kept or setting.blocks(width, plan)
    dual = solve_dual(blocks, setting.residual, pairs, strengths, dtype=plan.dtype)
    return setting.assemble(blocks, dual, strengths, width=width, error=error)


def check_memory(pairs: Pairs, plan: CompositePlan) -> None:
    """Refuse a fit that needs more memory than the plan allows (ConfigurationError saying how many pairs it takes)."""
    columns = 1 + (pairs.stale.shape[1] if plan.linear else 0) + min(plan.landmarks, len(pairs))
    if pairs.side is not None and pairs.side.layout != torch.sparse_csr:
        columns += pairs.side.shape[1]
    # Beside the features there are the equation's right side, its solution, and what a step of the solver keeps.
    a_pair = 8 * (columns + 2 * pairs.fresh.shape[1] + 8 * CG_COLUMNS)
    fixed = 8 * columns * (2 * columns + 3 * PIECE_ROWS)
    needed, most = a_pair * len(pairs) + fixed, max(0, plan.memory_bytes - fixed) // a_pair
    if len(pairs) > MAX_DUAL_ROWS and needed > plan.memory_bytes:
        raise ConfigurationError(
            "corrector fit", expected=f"a fit that takes at most {plan.memory_bytes / 2**30:.1f} GiB",
            got=f"{needed / 2**30:.1f} GiB for {len(pairs):,} pairs with {columns:,} features each",
            cure=f"Fit on {max(MAX_DUAL_ROWS, most):,} pairs at most, or with fewer landmarks.",
        )  # fmt: skip


@dataclass(eq=False)
class _Setting:
    """Everything of a fit that does not depend on strengths: prior, residual, and how blocks become parameters."""

    pairs: Pairs
    mean: torch.Tensor
    prior: str
    prior_weight: torch.Tensor
    prior_bias: torch.Tensor
    residual: torch.Tensor
    typical: float
    found: dict[float, Landmarks] = field(default_factory=dict)
    columns: TokenColumns | None = None
    side_mean: torch.Tensor | None = None

    @classmethod
    def of(cls, pairs: Pairs, plan: CompositePlan) -> _Setting:
        square = pairs.stale.shape[1] == pairs.fresh.shape[1]
        prior = plan.prior
        if prior == "best":
            prior = fit_affine(pairs).prior
        mean = (pairs.stale * (pairs.weights / pairs.weights.sum())[:, None]).sum(dim=0)
        dim_out, dim_in = pairs.fresh.shape[1], pairs.stale.shape[1]
        weight, bias = torch.zeros(dim_out, dim_in, dtype=torch.float64), torch.zeros(dim_out, dtype=torch.float64)
        if prior == "procrustes":
            fitted = fit_procrustes(pairs)
            weight, bias = fitted.weight.double(), fitted.bias.double()
        elif prior == "zero":
            fresh_mean = (pairs.fresh * (pairs.weights / pairs.weights.sum())[:, None]).sum(dim=0)
            weight, bias = (-torch.eye(dim_in, dtype=torch.float64) if square else weight), fresh_mean
            bias = bias - mean if square else bias
        elif prior != "identity" or not square:
            raise ConfigurationError(
                "corrector fit", expected="a prior 'identity' (equal sizes), 'procrustes', 'zero' or 'best'",
                got=f"{prior!r} from size {dim_in} to {dim_out}", cure="Name another prior.",
            )  # fmt: skip
        base = (pairs.stale if square else 0) + (pairs.stale - mean) @ weight.T + bias
        return cls(pairs, mean, prior, weight, bias, pairs.fresh - base, typical_distance(pairs.stale))

    def blocks(self, relative_width: float, plan: CompositePlan) -> list[Block]:
        """Return the blocks, the radial one with its kernel width relative to the typical distance."""
        count = len(self.pairs)
        blocks = [Block("constant", torch.ones(count, 1, dtype=torch.float64), 1.0)]
        if plan.linear:
            blocks.append(Block.of("linear", self.pairs.stale - self.mean))
        if plan.landmarks:
            width = relative_width * self.typical
            landmarks = Landmarks.choose(self.pairs.stale, plan.landmarks, width, seed=plan.seed)
            self.found[relative_width] = landmarks
            blocks.append(Block("radial", landmarks.features(self.pairs.stale), 1.0))
        return [*blocks, *self._side_blocks()]

    def _side_blocks(self) -> list[Block]:
        side = self.pairs.side
        if side is None:
            return []
        if side.layout == torch.sparse_csr:
            blocks, self.columns = token_blocks(side, self.pairs.statistics)
            return blocks
        self.side_mean = side.double().mean(dim=0)
        return [Block.of("side", side.double() - self.side_mean)]

    def assemble(
        self, blocks: list[Block], dual: torch.Tensor, strengths: dict[str, float], *, width: float, error: float
    ) -> CompositeFit:
        """Turn the dual solution ``(n, dim_out)`` into parameters of each block."""
        clocked = dual if self.pairs.clock is None else dual * self.pairs.clock[:, None]
        primal = {one.name: one.backward(clocked) * (strengths[one.name] / one.unit) for one in blocks}
        weight = self.prior_weight + (primal["linear"].T if "linear" in primal else 0)
        return CompositeFit(
            mean=self.mean.float(), weight=weight.float(), bias=(self.prior_bias + primal["constant"][0]).float(),
            radial=self._radial_part(primal, width), side=self._side_part(primal), prior=self.prior,
            strengths=strengths, relative_width=width, loo_error=error, pairs=len(self.pairs),
        )  # fmt: skip

    def _radial_part(self, primal: dict[str, torch.Tensor], width: float) -> RadialPart | None:
        if width not in self.found:
            return None
        landmarks = self.found[width]
        weight = landmarks.whitening @ primal["radial"]
        return RadialPart(landmarks.points.float(), weight.float(), landmarks.width)

    def _side_part(self, primal: dict[str, torch.Tensor]) -> TokenPart | DensePart | None:
        if self.side_mean is not None:
            return DensePart(self.side_mean.float(), primal["side"].float())
        if self.columns is None:
            return None
        parts = [primal[name].float() for name in ("tokens", "bigrams") if name in primal]
        return TokenPart(self.columns, torch.cat([*parts, torch.zeros(0, self.residual.shape[1])]))


def solve_dual(
    blocks: list[Block],
    residual: torch.Tensor,
    pairs: Pairs,
    strengths: dict[str, float],
    *,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return the solution of (K + noise) dual = residual, ``(n, dim_out)`` float64."""
    if len(pairs) > MAX_DUAL_ROWS:
        return conjugate_gradients(blocks, residual, noise_of(pairs), strengths)
    kernel = torch.zeros(len(pairs), len(pairs), dtype=dtype)
    for one in blocks:
        kernel.add_(one.gram(dtype), alpha=strengths[one.name])
    if pairs.clock is not None:
        kernel.mul_(time_kernel(pairs.clock.to(dtype)))
    kernel.diagonal().add_(noise_of(pairs).to(dtype))
    factor, failed = torch.linalg.cholesky_ex(kernel)
    if bool(failed) and dtype != torch.float64:
        # Rounding made it indefinite: strengths far above the noise. The same solution, in the precision it needs.
        return solve_dual(blocks, residual, pairs, strengths)
    if bool(failed):
        raise ConfigurationError(
            "corrector fit", expected="a positive definite kernel", got="one that rounding made indefinite",
            cure="Remove near-duplicate targets, or use kind 'affine'.",
        )  # fmt: skip
    return torch.cholesky_solve(residual.to(dtype), factor).double()


def conjugate_gradients(
    blocks: list[Block], residual: torch.Tensor, noise: torch.Tensor, strengths: dict[str, float]
) -> torch.Tensor:
    """Solve the same equation without forming K, to a relative residual of :data:`CG_TOLERANCE`.

    Preconditioned by the exact inverse of the dense blocks (Woodbury), so that only the sparse ones take steps. Some
    columns of the solution are computed at a time, as each needs several more of their size.

    Raises:
        ConfigurationError: If it does not converge, which strengths far above the noise can bring about.
    """
    kernel = _Kernel(blocks, noise, strengths)
    solution = torch.empty_like(residual)
    for found, wanted in zip(*(torch.split(one, CG_COLUMNS, dim=1) for one in (solution, residual)), strict=True):
        found.copy_(_solve_columns(kernel, wanted.contiguous()))
    return solution


class _Kernel:
    """K + noise as a linear function, and its approximate inverse."""

    def __init__(self, blocks: list[Block], noise: torch.Tensor, strengths: dict[str, float]) -> None:
        self._noise, self._dense = noise[:, None], DenseBlocks(blocks, strengths)
        self._factor = torch.linalg.cholesky(self._dense.inner(noise))
        sparse = [one for one in blocks if one.matrix.layout == torch.sparse_csr]
        self._sparse = [(one.matrix, transposed(one.matrix), strengths[one.name] / one.unit) for one in sparse]

    def precondition(self, values: torch.Tensor) -> torch.Tensor:
        """Return the inverse without the sparse blocks, times values ``(n, k)``."""
        light = values / self._noise
        inner = torch.cholesky_solve(self._dense.backward(light), self._factor)
        return light - self._dense.forward(inner) / self._noise

    def multiply(self, values: torch.Tensor) -> torch.Tensor:
        """Return (K + noise) times values ``(n, k)``."""
        product = values * self._noise + self._dense.forward(self._dense.backward(values))
        for matrix, turned, strength in self._sparse:
            product += (matrix @ (turned @ values)) * strength
        return product


def _solve_columns(kernel: _Kernel, residual: torch.Tensor) -> torch.Tensor:
    solution = kernel.precondition(residual)
    left = residual - kernel.multiply(solution)
    direction = ready = kernel.precondition(left)
    energy = (left * ready).sum(dim=0)
    target = CG_TOLERANCE * residual.norm()
    for _ in range(CG_STEPS):
        if left.norm() <= target:
            return solution
        product = kernel.multiply(direction)
        step = energy / (direction * product).sum(dim=0).clamp(min=1e-300)
        solution, left = solution + step * direction, left - step * product
        ready = kernel.precondition(left)
        fresh_energy = (left * ready).sum(dim=0)
        direction, energy = ready + fresh_energy / energy.clamp(min=1e-300) * direction, fresh_energy
    raise ConfigurationError(
        "corrector fit", expected=f"convergence within {CG_STEPS} steps",
        got=f"a relative residual of {float(left.norm() / residual.norm()):.1e}", cure="Fit on fewer pairs.",
    )  # fmt: skip

"""A corrector that follows a stream of pairs of stale and fresh vectors, one batch at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_corrector._files import atomic_write
from hf_corrector.adaptation.recent_pairs import RecentPairs
from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting import PRIORS, AffineFit, CompositePlan, Forgetting, Pairs, PairStatistics
from hf_corrector.fitting.pairs import check_pairs
from hf_corrector.fitting.ridge import RELATIVE_RIDGES
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.side_features import TokenStatistics
from hf_corrector.training.corrector_fit import (
    CorrectorFitting,
    Search,
    check_sizes,
    fit_side,
    fit_to_pairs,
    gradient_update,
    solve_closed_form,
)

STATE_FILE = "streaming.safetensors"
# Of these kinds, without side features, statistics say all there is to know.
STATISTICS_KINDS = ("mean_shift", "procrustes", "low_rank", "affine")
# Strength and prior are chosen anew at solves 1, 2, 4, 8 and so on, and at every one of this number.
CHOICE_SOLVES = 16


@dataclass(frozen=True)
class StreamingOptions:
    """How a stream is followed.

    Attributes:
        half_life: After so many further pairs (or batches, see ``unit``) a pair counts half; None to forget nothing.
        unit: ``"pairs"`` or ``"batches"``.
        solve_batches: Batches between closed-form solves; the first batch is solved at once.
        max_pairs: Pairs kept where there are no sufficient statistics (kind ``"kernel"`` or ``"residual_mlp"``, side
            features): the latest, or without a half-life a uniform sample of all.
        fitting: Learning rate, batch size and updates per batch of ``"residual_mlp"``, and the seed of everything.
        statistics: How common each token is in the corpus, for side features that are token counts; from the pairs
            kept if None.
    """

    half_life: float | None = None
    unit: str = "pairs"
    solve_batches: int = 10
    max_pairs: int = 2_048
    fitting: CorrectorFitting = field(default_factory=CorrectorFitting)
    statistics: TokenStatistics | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range (ConfigurationError)."""
        if self.solve_batches < 1 or self.max_pairs < 2:
            raise ConfigurationError(
                "streaming corrector", expected="solve_batches of at least 1 and max_pairs of at least 2",
                got=f"{self.solve_batches} and {self.max_pairs}", cure="Leave them out, or raise them.",
            )  # fmt: skip
        Forgetting(self.half_life, self.unit)


class StreamingCorrector:
    """Follow a stream of pairs with a corrector of any kind, in place.

    Mean shift, Procrustes, low rank and affine keep sufficient statistics, so a stream without forgetting ends where a
    fit to all its pairs at once does. The kernel, and whatever reads side features, are solved on a bounded memory of
    pairs. ``residual_mlp`` takes gradient steps on the newest batch, half of every update replayed from that memory.

    Args:
        corrector: The corrector; its parameters stop asking for gradients.
        options: How to follow.
    """

    def __init__(self, corrector: CorrectorModel, *, options: StreamingOptions | None = None) -> None:
        corrector.requires_grad_(False)
        self.corrector, self.options = corrector, StreamingOptions() if options is None else options
        forgetting, config = Forgetting(self.options.half_life, self.options.unit), corrector.config
        self._statistics = PairStatistics(config.input_dim, int(config.output_dim or 0), forgetting=forgetting)
        self._recent = RecentPairs(self.options.max_pairs, forgetting=forgetting, seed=self.options.fitting.seed)
        self._optimizer = self._new_optimizer()
        self._batches = self._solves = 0
        self._remembered: dict[str, float] = {}

    @property
    def uses_statistics(self) -> bool:
        """Whether no pair has to be kept."""
        config = self.corrector.config
        return config.kind in STATISTICS_KINDS and config.side is None

    @property
    def seen(self) -> int:
        """Pairs taken in since the start, or since :meth:`forget`."""
        return self._statistics.seen if self.uses_statistics else self._recent.seen

    def _new_optimizer(self) -> torch.optim.Optimizer | None:
        if self.corrector.config.kind != "residual_mlp":
            return None
        return torch.optim.AdamW(self.corrector.parameters(), lr=self.options.fitting.learning_rate, weight_decay=0.0)

    def partial_fit(
        self,
        stale: torch.Tensor,
        fresh: torch.Tensor,
        *,
        side: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        target_rows: torch.Tensor | None = None,
    ) -> bool:
        """Take in a batch of pairs, and fit where that is due.

        Args:
            stale: Stale vectors, ``(n, input_dim)``.
            fresh: Vectors of the same targets by the encoder of now, ``(n, output_dim)``.
            side: Side features of the same targets, ``(n, side_dim)``, for a corrector that reads some.
            weights: Weight of each pair, ``(n,)``; 1 if not given.
            target_rows: Which target each pair is of, ``(n,)`` int64, where targets may come more than once.

        Returns:
            Whether the corrector has changed.

        Raises:
            ConfigurationError: If shapes disagree or a number is not finite; nothing is taken in then.
        """
        weights = torch.ones(len(stale)) if weights is None else weights
        check_pairs(stale, fresh, weights)
        pairs = Pairs(
            stale.detach().double().cpu(), fresh.detach().double().cpu(), weights.detach().double().cpu(),
            None if side is None else side.detach().cpu(),
        )  # fmt: skip
        check_sizes(self.corrector, pairs)
        if self.corrector.config.kind == "identity" or not len(pairs):
            return False
        if self.uses_statistics:
            self._statistics.update(pairs.stale, pairs.fresh, weights=pairs.weights, target_rows=target_rows)
        else:
            self._recent.add(pairs, target_rows=target_rows)
        self._batches += 1
        due = self._solves == 0 or self._batches % self.options.solve_batches == 0
        solved = self._solve(full=False) if due else False
        return self._descend(pairs) or solved

    def discount(self, weight: float) -> None:
        """Let all earlier pairs together count, from now on, as so many new ones at most, as when drift has jumped."""
        self._statistics.discount(weight)
        self._recent.discount(weight)

    def refit(self) -> bool:
        """Fit now to what is remembered, everything chosen anew; say whether the corrector has changed."""
        config = self.corrector.config
        if self._optimizer is None:
            return self._solve(full=True)
        if len(self._recent) < 2:
            return False
        if config.input_dim != config.output_dim:
            self.corrector.reset()  # the fit begins at an affine map, beside which what was learnt has no meaning
        fit_to_pairs(self.corrector, self._recent.pairs(self._token_statistics()), fitting=self.options.fitting)
        self._optimizer = self._new_optimizer()
        return True

    def forget(self) -> None:
        """Forget all pairs and go back to the identity, as when the cache was made anew."""
        self.corrector.reset()
        self.corrector.fitted_pairs.zero_()
        self.corrector.config.fit_summary = None
        self._statistics.clear()
        self._recent.clear()
        self._optimizer = self._new_optimizer()
        self._batches = self._solves = 0
        self._remembered = {}

    def merge(self, other: StreamingCorrector) -> None:
        """Take in what another stream has shown, for instance on another machine, and fit; exact.

        Raises:
            ConfigurationError: If the kinds differ or keep pairs, or forget at another pace.
        """
        same = self.corrector.config.kind == other.corrector.config.kind
        if not same or not self.uses_statistics or not other.uses_statistics:
            raise ConfigurationError(
                "streaming correctors to merge", expected=f"one kind among {STATISTICS_KINDS} without side features",
                got=f"{self.corrector.config.kind!r} and {other.corrector.config.kind!r}",
                cure="Let one of them see both streams.",
            )  # fmt: skip
        self._statistics.merge(other._statistics)
        self._solve(full=True)

    def _solve(self, *, full: bool) -> bool:
        """Solve in closed form, also for what side features add to a network."""
        config = self.corrector.config
        if self._optimizer is not None and config.side is None and config.input_dim == config.output_dim:
            return False
        if self.seen < 2 or config.kind == "identity":
            return False
        self._solves += 1
        chosen = full or math.log2(self._solves).is_integer() or self._solves % CHOICE_SOLVES == 0
        if self.uses_statistics:
            self._solve_statistics(chosen=chosen)
        else:
            self._solve_pairs(self._recent.pairs(self._token_statistics()), chosen=chosen)
        return True

    def _solve_statistics(self, *, chosen: bool) -> None:
        kind, found = self.corrector.config.kind, self._statistics
        facts: dict[str, float | str] = {}
        if kind == "mean_shift":
            parameters = {"shift": found.mean_shift()}
        else:
            fit, parameters, facts = self._affine_fit(kind, chosen=chosen)
            if kind == "low_rank":
                parameters = {**parameters, **self._factors(fit, int(facts["rank"]))}
                del parameters["weight"]
        self.corrector.load_parameters(parameters)
        count = max(round(found.pairs), 1)
        self.corrector.fitted_pairs.fill_(count)
        self.corrector.config.fit_summary = {"pairs": count, "seen": found.seen, **facts}

    def _affine_fit(
        self, kind: str, *, chosen: bool
    ) -> tuple[AffineFit, dict[str, torch.Tensor], dict[str, float | str]]:
        """Return a fit with a linear map, its parameters and facts; earlier choices hold unless ``chosen`` anew."""
        known = {} if chosen else self._remembered
        priors: tuple[str, ...] = PRIORS
        ridges: tuple[float, ...] = RELATIVE_RIDGES
        if "ridge" in known:
            priors, ridges = (PRIORS[int(known["prior"])],), (known["ridge"],)
        facts: dict[str, float | str] = {}
        if kind == "procrustes":
            fit = self._statistics.procrustes()
        elif kind == "low_rank":
            rank = int(known["rank"]) if "rank" in known else self.corrector.config.rank
            fit, rank = self._statistics.low_rank(rank=rank, relative_ridges=ridges)
            facts["rank"] = rank
            self._remembered["rank"] = rank
        else:
            fit = self._statistics.affine(priors=priors, relative_ridges=ridges)
            facts["held_out_error"] = fit.loo_error
        if kind != "procrustes":
            facts.update(prior=fit.prior, ridge=fit.ridge)
            self._remembered.update(prior=PRIORS.index(fit.prior), ridge=fit.ridge)
        return fit, {"mean": fit.mean, "weight": fit.weight, "bias": fit.bias}, facts

    def _factors(self, fit: AffineFit, rank: int) -> dict[str, torch.Tensor]:
        """Write the weight of a fit as up · down, along the directions in which it moves the pairs most."""
        _, directions = torch.linalg.eigh(self._statistics.moved_scatter(fit))
        up = directions[:, -rank:]
        return {"up": up, "down": up.T @ fit.weight.double()}

    def _solve_pairs(self, pairs: Pairs, *, chosen: bool) -> None:
        config = self.corrector.config
        square, known = config.input_dim == config.output_dim, {} if chosen else self._remembered
        strengths = {name: value for name, value in known.items() if name != "relative_width"}
        plan = CompositePlan(
            prior="identity" if square else "best", strengths=strengths or None,
            relative_width=known.get("relative_width"), seed=self.options.fitting.seed,
        )  # fmt: skip
        if self._optimizer is None:
            solve_closed_form(self.corrector, pairs, search=Search(composite=plan))
        elif self._solves == 1 and not square:
            # Between spaces of different size a network starts at the affine solution; no epoch follows.
            fit_to_pairs(self.corrector, pairs, fitting=CorrectorFitting(max_epochs=0, seed=self.options.fitting.seed))
        elif config.side is not None:
            fit_side(self.corrector, pairs, plan=plan)
        summary = config.fit_summary or {}
        if "strengths" in summary:
            self._remembered = {**summary["strengths"], "relative_width": summary["relative_width"]}

    def _token_statistics(self) -> TokenStatistics | None:
        config, given = self.corrector.config, self.options.statistics
        if given is not None or config.side != "tokens":
            return given
        side = self._recent.pairs().side
        if side is None:
            return None
        frequency = torch.bincount(side.col_indices().long(), minlength=side.shape[1])
        return TokenStatistics(frequency, len(side), int(config.side_vocabulary or 0))

    def _descend(self, newest: Pairs) -> bool:
        """Take gradient steps, half of every update on the newest batch and half on what is remembered."""
        if self._optimizer is None:
            return False
        fitting, remembered = self.options.fitting, self._recent.pairs()
        generator = torch.Generator().manual_seed((fitting.seed + 1) * 1_000_003 + self._batches)
        device, half, loss = self.corrector.fitted_pairs.device, max(fitting.batch_size // 2, 1), 0.0
        for _ in range(fitting.updates):
            parts = [
                part.take(torch.multinomial(part.weights, half, replacement=True, generator=generator))
                for part in (newest, remembered)
            ]
            added = None
            if self.corrector.config.side is not None:
                sides = [part.side for part in parts if part.side is not None]
                added = torch.cat([self.corrector.side_displacement(side.to(device)) for side in sides])
            stale, fresh = (
                torch.cat([part.stale for part in parts]).float(), torch.cat([part.fresh for part in parts]).float()
            )  # fmt: skip
            loss = gradient_update(
                self.corrector, self._optimizer, stale.to(device), fresh.to(device), added=added
            )  # fmt: skip
        self.corrector.fitted_pairs.fill_(self.seen)
        summary = self.corrector.config.fit_summary or {}
        self.corrector.config.fit_summary = {**summary, "pairs": len(remembered), "seen": self.seen, "loss": loss}
        return True

    def state(self) -> dict[str, torch.Tensor]:
        """Return what is remembered of the stream as tensors, the corrector's own weights left out."""
        state = {"batches": torch.tensor(self._batches), "solves": torch.tensor(self._solves)}
        state.update(self._statistics.state() if self.uses_statistics else self._recent.state())
        for name, value in self._remembered.items():
            state[f"remembered.{name}"] = torch.tensor(value, dtype=torch.float64)
        if self._optimizer is not None:
            for number, values in self._optimizer.state_dict()["state"].items():
                state.update({f"optimizer.{number}.{name}": torch.as_tensor(one) for name, one in values.items()})
        return state

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state` returned; the corrector's own weights are those of then already."""
        self._batches, self._solves = int(state["batches"]), int(state["solves"])
        if self.uses_statistics:
            self._statistics.load_state(state)
        else:
            self._recent.load_state(state)
        named = {key.removeprefix("remembered."): value for key, value in state.items() if key.startswith("remembered")}
        self._remembered = {name: float(value) for name, value in named.items()}
        if self._optimizer is not None:
            entries: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in state.items():
                if key.startswith("optimizer."):
                    _, number, name = key.split(".")
                    entries.setdefault(int(number), {})[name] = value
            self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": entries})

    def save(self, folder: Path) -> None:
        """Save the corrector as a model folder, and beside it what is remembered of the stream."""
        self.corrector.save_pretrained(folder)
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.state().items()}
        atomic_write(folder / STATE_FILE, lambda temporary: save_file(state, temporary))

    @classmethod
    def load(cls, folder: Path, *, options: StreamingOptions | None = None) -> StreamingCorrector:
        """Load what :meth:`save` wrote, and go on as if nothing had happened.

        Args:
            folder: The folder.
            options: Those of then.
        """
        found = cls(CorrectorModel.from_pretrained(str(folder)), options=options)
        found.load_state(load_file(folder / STATE_FILE))
        return found

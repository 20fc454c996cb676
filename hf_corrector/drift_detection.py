"""Notice when cached vectors have become too wrong: a sequential test on the residuals of uniformly drawn targets.

At every step a few targets are known fresh, and how far their served vectors were off is a sample of the mean squared
error of all. Three things are made of that stream.

* **The test.** While the mean never exceeds the bound b, every factor 1 + λ(x − b) with 0 ≤ λ ≤ 1/b has expectation at
  most 1, so the wealth of a gambler who bets on x > b is a supermartingale (Waudby-Smith and Ramdas, "Estimating means
  of bounded random variables by betting", JRSS B 86, 2024). Gamblers with several λ enter at every batch t with capital
  1/t(t+1), so that wealth lost in good times does not delay the alarm in bad ones (the mixture over change points of
  Shin, Ramdas and Rinaldo, "E-detectors", 2022, with summable weights). By Ville's inequality the total ever reaches
  1/alpha with probability at most alpha, however long the stream is; the k-th alarm needs k(k+1) times as much, so that
  alpha holds for all episodes together.
* **The estimate**, a mean that forgets: its effective number of values is the horizon.
* **Its interval.** Fan's inequality exp(λξ − ψ(λ)ξ²) ≤ 1 + λξ for ξ ≥ −1, ψ(λ) = −log(1 − λ) − λ (Fan, Grama and Liu,
  2015), holds with weights w ≤ 1 in front of λ as ψ(λw) ≤ w²ψ(λ), so a bound for a forgetting mean needs two running
  sums. Levels alpha/t(t+1) make it hold for all t at once. Its upper end is wide: few values rule out no rare large
  ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.errors import ConfigurationError, DataError

ACTIONS = ("none", "refit", "refresh_worst", "refresh_all")
# Of a gambler's capital, at most; and of the λ of the interval, all below 1.
_BETS = 0.95 * 0.5 ** np.arange(8)
_TILTS = 0.9 * 0.5 ** np.arange(8)
_FLOAT_STATE = ("batches", "values", "episode", "since", "previous", "spent", "weight", "total", "upward", "downward")
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AdaptationPolicy:
    """When something has to be done about stale vectors, and what.

    Attributes:
        bound: Largest mean squared error of served vectors to put up with; for unit vectors 2 − 2 · cosine.
        actions: What may be done, from the cheapest on, of ``"refit"`` (the corrector, on recent pairs),
            ``"refresh_worst"`` (re-encode a share of the targets) and ``"refresh_all"``.
        refresh_share: Share of the targets that ``"refresh_worst"`` re-encodes.
        alpha: Probability of ever raising an alarm while the mean error has never been above the bound.
        horizon: Effective number of values the estimate looks back on; an alarm that comes within so many values of
            an action having settled says that this action did not help.
        settle: Values after an action on which the test does not bet: a refit shows as new pairs come in.
        largest: Largest squared error there is, larger values count as this one: 4 between unit vectors.
        cost_per_pass: Price of encoding one target.
        budget: What may be spent altogether, in the unit of ``cost_per_pass``.
    """

    bound: float
    actions: tuple[str, ...] = ACTIONS[1:]
    refresh_share: float = 0.1
    alpha: float = 0.05
    horizon: float = 1_000.0
    settle: int = 256
    largest: float = 4.0
    cost_per_pass: float = 0.0
    budget: float = math.inf

    def __post_init__(self) -> None:
        """Refuse values out of range (ConfigurationError)."""
        ordered = sorted(set(self.actions), key=ACTIONS.index) if set(self.actions) <= set(ACTIONS[1:]) else []
        sound = {
            "bound": 0 < self.bound < self.largest, "refresh_share": 0 < self.refresh_share < 1,
            "alpha": 0 < self.alpha < 1, "horizon": 1 < self.horizon < math.inf,
            "actions": bool(ordered) and ordered == list(self.actions),
            "cost_per_pass": self.cost_per_pass >= 0, "budget": self.budget >= 0, "settle": self.settle >= 0,
        }  # fmt: skip
        wrong = [name for name, good in sound.items() if not good]
        if wrong:
            raise ConfigurationError(
                f"adaptation policy, {wrong[0]}",
                expected="0 < bound < largest, shares and alpha between 0 and 1, a horizon above 1, nothing negative, "
                f"and actions among {ACTIONS[1:]} in this order", got=repr(getattr(self, wrong[0])),
                cure="Give a bound such as 0.2, the mean squared error at a cosine of 0.9.",
            )  # fmt: skip

    def passes(self, action: str, targets: int) -> int:
        """Return the encoder passes of an action on a corpus of so many targets."""
        return {"refresh_worst": math.ceil(self.refresh_share * targets), "refresh_all": targets}.get(action, 0)

    def choose(self, error: float, *, failed: str, targets: int, spent: float) -> str:
        """Choose what to do about an error above the bound.

        From cheap to dear, what has just failed and what comes before it left out. Re-encoding the worst share takes
        away at least that share of the error, and is passed over where no more than that would not be enough.

        Args:
            error: Mean squared error.
            failed: The action that was taken last, if it did not help; ``"none"`` else.
            targets: Size of the corpus.
            spent: What was spent so far.

        Returns:
            The action; ``"none"`` where the budget allows nothing that is left.
        """
        paid = {one: self.passes(one, targets) * self.cost_per_pass for one in self.actions}
        affordable = [one for one in self.actions if spent + paid[one] <= self.budget]
        stronger = [one for one in affordable if ACTIONS.index(one) > ACTIONS.index(failed)]
        enough = (1.0 - self.refresh_share) * error <= self.bound
        if "refresh_worst" in stronger and "refresh_all" in stronger and not enough:
            stronger.remove("refresh_worst")
        if stronger:
            return stronger[0]
        # The strongest one within the budget has failed already: it is all there is.
        return affordable[-1] if affordable else "none"


@dataclass(frozen=True)
class Decision:
    """What the residuals seen so far say.

    Attributes:
        action: One of :data:`ACTIONS`.
        alarm: Whether the bound was found to be crossed; without an action if the budget allows none.
        error: Estimate of the present mean squared error.
        low: Lower end of its interval, which holds at all times at once with probability 1 − alpha.
        high: Upper end.
        evidence: Evidence that the bound was crossed, in [0, ∞): log of the wealth over log of what an alarm takes.
        values: Values since the last alarm.
        passes: Encoder passes the action takes.
        cost: Its price.
    """

    action: str
    alarm: bool
    error: float
    low: float
    high: float
    evidence: float
    values: int
    passes: int = 0
    cost: float = 0.0


class DriftDetector:
    """Watch the squared errors of uniformly drawn targets, and say when to do something.

    Errors must be those of vectors as they were served before any fit has seen these targets, and targets must be drawn
    uniformly and independently of what is known about them. Nothing is random: the same values lead to the same
    decisions.

    Args:
        policy: The bound, and what to do when it is crossed.
        targets: Size of the corpus, for the price of actions.
    """

    def __init__(self, policy: AdaptationPolicy, *, targets: int = 0) -> None:
        self.policy, self.targets = policy, targets
        self._bets = _BETS / policy.bound
        self._spread = min(2.0 * policy.bound, policy.largest)
        self._batches = self._values = self._since = 0
        self._episode, self._previous, self._spent = 1, "none", 0.0
        self._start()

    def _start(self) -> None:
        self._wealth = np.full(len(self._bets), -np.inf)
        self._batches = self._values = 0
        self._weight = self._total = self._upward = self._downward = 0.0

    @property
    def alarms(self) -> int:
        """Alarms so far, and calls of :meth:`reset`."""
        return self._episode - 1

    def observe(self, residuals: torch.Tensor | FloatArray) -> Decision:
        """Take in the squared errors of some targets, ``(n,)``, and decide.

        After an alarm everything starts anew, in the trust that the action is taken before the next call.

        Raises:
            DataError: If a value is negative or not finite.
        """
        values = np.asarray(residuals.detach().cpu() if isinstance(residuals, torch.Tensor) else residuals, np.float64)
        if values.ndim != 1 or not bool((values >= 0).all()) or not math.isfinite(float(values.sum())):
            raise DataError(
                "residuals", expected="finite squared errors (n,)", got=f"shape {values.shape}: {values[:3]}",
                cure="Pass ((served - fresh) ** 2).sum(dim=1).",
            )  # fmt: skip
        if len(values):
            values = np.minimum(values, self.policy.largest)
            self._batches += 1
            self._values += len(values)
            # Whether to bet is known before the values are, which is all that the test asks for.
            if self._since >= self.policy.settle or self._previous == "none":
                self._bet(values)
            self._since += len(values)
            self._average(values)
        return self._decide()

    def reset(self) -> None:
        """Start anew, for instance after a refresh that was not this detector's idea.

        Costs a little sensitivity each time, as alarms do; a corrector that goes on being fitted needs none.
        """
        self._episode += 1
        self._start()

    def _bet(self, values: FloatArray) -> None:
        start = -math.log(self._batches * (self._batches + 1.0))
        gains = np.log1p(np.outer(self._bets, values - self.policy.bound)).sum(axis=1)
        self._wealth = np.logaddexp(self._wealth, start) + gains

    def _average(self, values: FloatArray) -> None:
        """Update the forgetting sums; what deviations are taken from is known before the values are."""
        policy, kept = self.policy, (1.0 - 1.0 / self.policy.horizon) ** len(values)
        before = self._total / self._weight if self._weight else policy.bound
        squares = (values - min(before, self._spread)) ** 2
        self._weight = kept * self._weight + len(values)
        self._total = kept * self._total + float(values.sum())
        self._upward = kept**2 * self._upward + float(squares.sum()) / self._spread**2
        self._downward = kept**2 * self._downward + float(((values - before) ** 2).sum()) / policy.largest**2

    def _interval(self) -> tuple[float, float]:
        if not self._weight:
            return 0.0, self.policy.largest
        count = self._batches
        surprise = math.log(2.0 * len(_TILTS) * count * (count + 1.0) * self._levels() / self.policy.alpha)
        price = -np.log1p(-_TILTS) - _TILTS
        below = self._spread * float(((surprise + price * self._upward) / _TILTS).min())
        above = self.policy.largest * float(((surprise + price * self._downward) / _TILTS).min())
        low, high = (self._total - below) / self._weight, (self._total + above) / self._weight
        return max(low, 0.0), min(high, self.policy.largest)

    def _levels(self) -> float:
        """Return what this episode's share of alpha is divided by."""
        return self._episode * (self._episode + 1.0)

    def _decide(self) -> Decision:
        # Gamblers that are still to enter hold 1/(t + 1) together.
        waiting = -math.log(self._batches + 1.0)
        wealth = float(np.logaddexp(np.logaddexp.reduce(self._wealth) - math.log(len(self._wealth)), waiting))
        needed = math.log(self._levels() / self.policy.alpha)
        low, high = self._interval()
        error = self._total / self._weight if self._weight else math.nan
        alarm, action, seen = wealth >= needed, "none", self._values
        if alarm:
            failed = self._previous if self._since <= self.policy.horizon + self.policy.settle else "none"
            # The estimate trails behind an error that has just jumped; what was proven is at least the bound.
            action = self.policy.choose(
                max(error, self.policy.bound), failed=failed, targets=self.targets, spent=self._spent
            )
            self._previous, self._since = action, 0
            self.reset()
        passes = self.policy.passes(action, self.targets)
        cost = passes * self.policy.cost_per_pass
        self._spent += cost
        return Decision(action, alarm, error, low, high, max(wealth / needed, 0.0), seen, passes, cost)

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything a checkpoint needs, as tensors."""
        previous = float(ACTIONS.index(self._previous))
        numbers = [
            self._batches, self._values, self._episode, self._since, previous, self._spent, self._weight, self._total,
            self._upward, self._downward,
        ]  # fmt: skip
        return {
            "detector_numbers": torch.tensor(numbers, dtype=torch.float64),
            "detector_wealth": torch.from_numpy(self._wealth.copy()),
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state` returned; the policy should be that of then."""
        found = dict(zip(_FLOAT_STATE, state["detector_numbers"].tolist(), strict=True))
        self._wealth = state["detector_wealth"].numpy().copy()
        self._batches, self._values = int(found["batches"]), int(found["values"])
        self._episode, self._since = int(found["episode"]), int(found["since"])
        self._previous, self._spent = ACTIONS[int(found["previous"])], found["spent"]
        self._weight, self._total = found["weight"], found["total"]
        self._upward, self._downward = found["upward"], found["downward"]

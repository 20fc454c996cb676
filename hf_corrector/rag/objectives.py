"""What retrieval and reading are trained on: functions of P(y|x) and of answer likelihoods, one query a row.

Every function takes ``log_prior`` log P(y|x) over the passages of each query, −inf where masked, and
``log_likelihoods`` log P_LM(a|x,y) of the whole answer, both ``(batch, k)``, and computes in float32 under any
autocast. Every query must have at least one passage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_corrector.errors import ConfigurationError

OBJECTIVES = ("marginal", "emdr2", "perplexity_distillation", "leave_one_out", "generator_only")


@dataclass(frozen=True)
class Objective:
    """What a step minimises.

    Attributes:
        name: One of :data:`OBJECTIVES`.
        temperature: τ of the distribution the reader teaches, of ``"perplexity_distillation"`` and
            ``"leave_one_out"``.
        reader_weight: Factor of the reader's own loss, where the objective has one beside the retriever's.

    Raises:
        ConfigurationError: If a value is out of its range.
    """

    name: str = "marginal"
    temperature: float = 1.0
    reader_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.name not in OBJECTIVES or not 0 < self.temperature < float("inf") or self.reader_weight < 0:
            raise ConfigurationError(
                "objective", expected=f"a name among {OBJECTIVES}, temperature above 0, reader_weight at least 0",
                got=str(self), cure="Correct the argument.",
            )  # fmt: skip

    @property
    def trains_retriever(self) -> bool:
        """Whether any gradient reaches the encoders."""
        return self.name != "generator_only"

    @property
    def reads_jointly(self) -> bool:
        """Whether the reader sees all passages of a query at once."""
        return self.name == "leave_one_out"


@dataclass(frozen=True)
class LossParts:
    """Losses of each query.

    Attributes:
        loss: What is minimised, ``(batch,)``.
        retriever: The part that trains the encoders; None where it is not a part of its own.
        reader: The part that trains the reader, unweighted; None where it is not a part of its own.
    """

    loss: torch.Tensor
    retriever: torch.Tensor | None = None
    reader: torch.Tensor | None = None


@dataclass(frozen=True)
class JointReading:
    """How likely a reader of several passages at once finds the answers.

    Attributes:
        log_likelihoods: log P_LM(a|x,S) given all passages, ``(batch,)``, with gradient.
        without: log P_LM(a|x,S−y) with each passage left out, ``(batch, k)``; any number where masked.
    """

    log_likelihoods: torch.Tensor
    without: torch.Tensor


def log_softmax_over(scores: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Return log P(y|x) = βs(x,y) − log Σ_{y'∈S} exp(βs(x,y')), ``(batch, k)`` float32, −inf where masked.

    Args:
        scores: Inner products, ``(batch, k)``.
        mask: Which places hold a passage, ``(batch, k)`` bool.
        scale: Inverse temperature β.
    """
    with torch.autocast(scores.device.type, enabled=False):
        return torch.log_softmax((scale * scores.float()).masked_fill(~mask, float("-inf")), dim=1)


def marginal_log_likelihood(
    log_prior: torch.Tensor, log_likelihoods: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """Return log P(a|x) = log Σ_y P(y|x)·P_LM(a|x,y), ``(batch,)`` (RAG-sequence, arXiv 2005.11401, section 2.1)."""
    with torch.autocast(log_prior.device.type, enabled=False):
        joint = (log_prior.float() + log_likelihoods.float()).masked_fill(~mask, float("-inf"))
        return torch.logsumexp(joint, dim=1)


def reader_loss(log_prior: torch.Tensor, log_likelihoods: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return −Σ_y sg[P(y|x)]·log P_LM(a|x,y), ``(batch,)``: the reader's own loss where each passage is read alone.

    A passage counts as much as it is likely to be read. It is an upper bound of −log P(a|x) (Jensen); readers that see
    all passages at once, as those of EMDR² and Atlas, have −log P_LM(a|x,S) in its place.
    """
    with torch.autocast(log_prior.device.type, enabled=False):
        weighted = log_prior.detach().float().exp() * log_likelihoods.float()
        return -weighted.masked_fill(~mask, 0.0).sum(dim=1)


def taught_loss(
    log_prior: torch.Tensor, evidence: torch.Tensor, mask: torch.Tensor, *, temperature: float
) -> torch.Tensor:  # fmt: skip
    """Return KL(softmax(sg[evidence]/τ) ‖ P(y|x)), ``(batch,)``: the retriever learns what helped the reader.

    Args:
        log_prior: log P(y|x), ``(batch, k)``.
        evidence: How much each passage helped, ``(batch, k)``, without gradient.
        mask: Which places hold a passage.
        temperature: τ.
    """
    with torch.autocast(log_prior.device.type, enabled=False):
        masked = (evidence.detach().float() / temperature).masked_fill(~mask, float("-inf"))
        teacher = torch.log_softmax(masked, dim=1)
        gap = (teacher - log_prior.float()).masked_fill(~mask, 0.0)
        return (teacher.exp() * gap).sum(dim=1)


def marginal(log_prior: torch.Tensor, log_likelihoods: torch.Tensor, mask: torch.Tensor) -> LossParts:
    """Compute −log Σ_y P(y|x)·P_LM(a|x,y), whose gradient reaches retriever and reader (RAG-sequence)."""
    return LossParts(-marginal_log_likelihood(log_prior, log_likelihoods, mask))


def generator_only(log_prior: torch.Tensor, log_likelihoods: torch.Tensor, mask: torch.Tensor) -> LossParts:
    """Compute −log Σ_y sg[P(y|x)]·P_LM(a|x,y): the reader learns to read what a fixed retriever finds."""
    return marginal(log_prior.detach(), log_likelihoods, mask)


def emdr2(
    log_prior: torch.Tensor, log_likelihoods: torch.Tensor, mask: torch.Tensor, *, reader_weight: float = 1.0
) -> LossParts:  # fmt: skip
    """Compute −log Σ_y P(y|x)·sg[P_LM(a|x,y)] beside the reader's own loss (arXiv 2106.05346, equation 5).

    The first term trains the retriever alone, as an expectation-maximisation step in which the reader's likelihoods are
    observed; the second the reader alone, see :func:`reader_loss`.
    """
    retriever = -marginal_log_likelihood(log_prior, log_likelihoods.detach(), mask)
    reader = reader_loss(log_prior, log_likelihoods, mask)
    return LossParts(retriever + reader_weight * reader, retriever, reader)


def perplexity_distillation(
    log_prior: torch.Tensor, log_likelihoods: torch.Tensor, mask: torch.Tensor, *, temperature: float = 1.0,
    reader_weight: float = 1.0,
) -> LossParts:  # fmt: skip
    """Compute KL(softmax(sg[log P_LM(a|x,y)]/τ) ‖ P(y|x)) beside the reader's own loss (arXiv 2208.03299, 2.2).

    As there, the prior over passages is uniform in what the reader teaches.
    """
    retriever = taught_loss(log_prior, log_likelihoods, mask, temperature=temperature)
    reader = reader_loss(log_prior, log_likelihoods, mask)
    return LossParts(retriever + reader_weight * reader, retriever, reader)


def leave_one_out(
    log_prior: torch.Tensor, joint: JointReading, mask: torch.Tensor, *, temperature: float = 1.0,
    reader_weight: float = 1.0,
) -> LossParts:  # fmt: skip
    """Compute KL(softmax(sg[log P_LM(a|x,S) − log P_LM(a|x,S−y)]/τ) ‖ P(y|x)) − log P_LM(a|x,S).

    A passage is worth what the answer loses without it (LOOP of arXiv 2208.03299, section 2.2, where the first
    likelihood, equal for all passages, is left out of the softmax).

    Raises:
        ConfigurationError: If a query has one passage only: leaving it out leaves nothing to compare with.
    """
    if int(mask.sum(dim=1).min()) < 2:
        raise ConfigurationError(
            "leave_one_out", expected="at least two passages for every query", got="a query with fewer",
            cure="Raise num_passages, or use another objective.",
        )  # fmt: skip
    helped = joint.log_likelihoods[:, None].float() - joint.without.float()
    retriever = taught_loss(log_prior, helped, mask, temperature=temperature)
    reader = -joint.log_likelihoods.float()
    return LossParts(retriever + reader_weight * reader, retriever, reader)

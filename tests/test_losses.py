import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from torch.nn import functional as F

from hf_corrector.losses import corrector_loss, distillation_loss, truncated_softmax_loss


def random_scores(batch: int = 5, targets: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, targets, generator=generator), torch.randint(targets, (batch,), generator=generator)


def test_with_all_targets_it_is_the_full_softmax_loss() -> None:
    scores, labels = random_scores()
    loss = truncated_softmax_loss(scores, labels, torch.ones_like(scores, dtype=torch.bool), scale=20.0)
    assert torch.equal(loss, F.cross_entropy(20.0 * scores, labels, reduction="none"))


def test_it_is_the_softmax_over_the_allowed_columns_and_the_label() -> None:
    scores, labels = random_scores()
    allowed = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    losses = truncated_softmax_loss(scores, labels, allowed, scale=3.0)
    for query in range(len(scores)):
        subset = {*allowed[query].nonzero()[:, 0].tolist(), int(labels[query])}
        logits = 3.0 * scores[query, sorted(subset)]
        expected = torch.logsumexp(logits, dim=0) - 3.0 * scores[query, labels[query]]
        assert torch.allclose(losses[query], expected, atol=1e-5)


def test_label_counts_even_where_it_is_not_allowed() -> None:
    scores, labels = random_scores()
    assert truncated_softmax_loss(scores, labels, torch.zeros_like(scores, dtype=torch.bool), scale=1.0).tolist() == [
        0.0
    ] * len(scores)


def test_columns_that_are_not_allowed_get_no_gradient() -> None:
    scores, labels = random_scores()
    scores.requires_grad_(True)
    allowed = torch.zeros_like(scores, dtype=torch.bool)
    allowed[:, ::2] = True
    truncated_softmax_loss(scores, labels, allowed, scale=5.0).sum().backward()
    outside = ~allowed
    outside[torch.arange(len(labels)), labels] = False
    assert scores.grad is not None
    assert (scores.grad[outside] == 0).all()
    assert (scores.grad[allowed] != 0).all()


def test_log_proposal_is_subtracted_from_all_logits_but_the_label() -> None:
    scores, labels = random_scores()
    log_proposal = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2))
    allowed = torch.ones_like(scores, dtype=torch.bool)
    corrected = truncated_softmax_loss(scores, labels, allowed, scale=2.0, log_proposal=log_proposal)
    logits = 2.0 * scores - log_proposal
    own = torch.arange(len(labels)), labels
    logits[own] = 2.0 * scores[own]
    assert torch.allclose(corrected, F.cross_entropy(logits, labels, reduction="none"))


def test_proposal_of_one_draw_each_changes_nothing() -> None:
    scores, labels = random_scores()
    allowed = torch.ones_like(scores, dtype=torch.bool)
    plain = truncated_softmax_loss(scores, labels, allowed, scale=2.0)
    assert torch.equal(
        truncated_softmax_loss(scores, labels, allowed, scale=2.0, log_proposal=torch.zeros_like(scores)), plain
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loss_is_float32_whatever_the_scores_are(dtype: torch.dtype) -> None:
    scores, labels = random_scores()
    allowed = torch.ones_like(scores, dtype=torch.bool)
    loss = truncated_softmax_loss(scores.to(dtype), labels, allowed, scale=20.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, truncated_softmax_loss(scores.to(dtype).float(), labels, allowed, scale=20.0))


def test_corrector_loss_is_the_mean_squared_distance() -> None:
    corrected, fresh = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert corrector_loss(corrected, fresh).item() == pytest.approx((5.0 + 9.0) / 2)
    assert corrector_loss(corrected.bfloat16(), fresh.bfloat16()).dtype == torch.float32


def test_corrector_loss_sends_gradient_into_the_corrected_vectors_only() -> None:
    corrected, fresh = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    corrector_loss(corrected, fresh).backward()
    assert fresh.grad is None
    assert corrected.grad is not None
    assert torch.allclose(corrected.grad, 2 * (corrected - fresh).detach() / 4)


# --- several and graded positives ---


def graded_weights(batch: int = 5, targets: int = 12) -> torch.Tensor:
    """Give every query three positives, of weights that sum to 1."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.zeros(batch, targets)
    for query in range(batch):
        grades = torch.rand(3, generator=generator) + 0.1
        weights[query, torch.randperm(targets, generator=generator)[:3]] = grades / grades.sum()
    return weights


@pytest.mark.parametrize("proposal", [False, True])
def test_one_positive_of_weight_one_is_the_plain_loss(proposal: bool) -> None:
    scores, labels = random_scores()
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(scores.shape, generator=generator) < 0.4
    log_proposal = torch.randn(scores.shape, generator=generator) if proposal else None
    gradients = []
    for weights in (None, F.one_hot(labels, scores.shape[1]).float()):
        own_scores = scores.clone().requires_grad_(True)
        loss = truncated_softmax_loss(
            own_scores, labels, allowed, scale=20.0, log_proposal=log_proposal, label_weights=weights
        )
        loss.sum().backward()
        gradients.append((loss.detach(), own_scores.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert gradients[0][1] is not None and gradients[1][1] is not None
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-6)


def test_weights_make_it_the_cross_entropy_over_allowed_columns_and_positives() -> None:
    scores, _ = random_scores()
    weights = graded_weights()
    labels = weights.argmax(dim=1)
    allowed = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    losses = truncated_softmax_loss(scores, labels, allowed, scale=3.0, label_weights=weights)
    for query in range(len(scores)):
        subset = (allowed[query] | (weights[query] > 0)).nonzero()[:, 0]
        logits = 3.0 * scores[query, subset]
        expected = (weights[query, subset] * (torch.logsumexp(logits, dim=0) - logits)).sum()
        assert torch.allclose(losses[query], expected, atol=1e-5)


def test_every_positive_stays_in_the_denominator_and_the_best_softmax_is_the_weights() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    labels, nothing = torch.tensor([0]), torch.zeros(1, 4, dtype=torch.bool)
    ideal = weights.clamp_min(1e-30).log().requires_grad_(True)
    loss = truncated_softmax_loss(ideal, labels, nothing, scale=1.0, label_weights=weights)
    entropy = -(weights[weights > 0] * weights[weights > 0].log()).sum()
    loss.sum().backward()
    assert torch.allclose(loss, entropy)
    assert ideal.grad is not None and torch.allclose(ideal.grad, torch.zeros(1, 4), atol=1e-6)


def test_log_proposal_leaves_every_positive_alone() -> None:
    scores, _ = random_scores()
    weights = graded_weights()
    labels, everything = weights.argmax(dim=1), torch.ones_like(scores, dtype=torch.bool)
    log_proposal = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2))
    loss = truncated_softmax_loss(
        scores, labels, everything, scale=2.0, log_proposal=log_proposal, label_weights=weights
    )
    logits = torch.where(weights > 0, 2.0 * scores, 2.0 * scores - log_proposal)
    assert torch.allclose(loss, F.cross_entropy(logits, weights, reduction="none"), atol=1e-6)


def test_columns_outside_get_no_gradient_and_no_nan_with_weights() -> None:
    scores, _ = random_scores()
    scores.requires_grad_(True)
    weights = graded_weights()
    nothing = torch.zeros_like(scores, dtype=torch.bool)
    loss = truncated_softmax_loss(scores, weights.argmax(dim=1), nothing, scale=5.0, label_weights=weights)
    loss.sum().backward()
    assert scores.grad is not None and torch.isfinite(loss).all() and torch.isfinite(scores.grad).all()
    assert (scores.grad[weights == 0] == 0).all() and (scores.grad[weights > 0] != 0).any()


# --- distillation ---


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distillation_is_the_mean_that_sentence_transformers_computes(temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(6, 8, generator=generator)
    candidates = torch.randn(4, 6, 8, generator=generator)
    teacher = 3 * torch.randn(6, 4, generator=generator)
    theirs = DistillKLDivLoss(SentenceTransformer(modules=[torch.nn.Identity()], device="cpu"), temperature=temperature)
    expected = theirs.compute_loss_from_embeddings([query, *candidates], teacher)
    scores = torch.einsum("bd,mbd->bm", query, candidates)
    loss = distillation_loss(scores, teacher, scale=1.0, temperature=temperature)
    assert loss.shape == (6,)
    assert torch.allclose(loss.mean(), expected, atol=1e-6)


def test_distillation_looks_only_at_the_columns_the_teacher_scored() -> None:
    scores, _ = random_scores()
    teacher = torch.randn(scores.shape, generator=torch.Generator().manual_seed(4))
    silent = torch.rand(scores.shape, generator=torch.Generator().manual_seed(6)) < 0.5
    loss = distillation_loss(scores, teacher.masked_fill(silent, float("nan")), scale=3.0, temperature=2.0)
    for query in range(len(scores)):
        heard = ~silent[query]
        assert heard.sum() >= 2
        wanted = torch.softmax(teacher[query, heard] / 2.0, dim=0)
        own = torch.log_softmax(3.0 * scores[query, heard] / 2.0, dim=0)
        assert torch.allclose(loss[query], 4.0 * (wanted * (wanted.log() - own)).sum(), atol=1e-5)


def test_a_teacher_of_fewer_than_two_columns_teaches_nothing() -> None:
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    nan = float("nan")
    teacher = torch.tensor([[nan, nan, nan, nan], [nan, 2.0, nan, nan], [1.0, nan, nan, 3.0]])
    loss = distillation_loss(scores, teacher, scale=20.0, temperature=1.0)
    loss.sum().backward()
    assert loss[:2].tolist() == [0.0, 0.0] and loss[2] > 0
    assert scores.grad is not None and torch.isfinite(scores.grad).all()
    assert (scores.grad[:2] == 0).all() and (scores.grad[2, 1:3] == 0).all()
    assert (scores.grad[2, [0, 3]] != 0).all()


def test_a_student_that_agrees_has_learnt_everything() -> None:
    scores, _ = random_scores()
    loss = distillation_loss(scores.bfloat16(), 20.0 * scores.bfloat16().float(), scale=20.0, temperature=3.0)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.zeros(len(scores)), atol=1e-5)


def test_a_sharp_teacher_gives_finite_losses() -> None:
    scores, _ = random_scores()
    scores.requires_grad_(True)
    teacher = torch.linspace(-500.0, 98.0, scores.shape[1]).expand_as(scores)
    loss = distillation_loss(scores, teacher, scale=20.0, temperature=1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and scores.grad is not None and torch.isfinite(scores.grad).all()

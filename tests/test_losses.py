import pytest
import torch
from torch.nn import functional as F

from hf_corrector.losses import corrector_loss, truncated_softmax_loss


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

"""The distillation loss against its formula, and its gradient against finite differences."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nlgmoe.layers.losses import DistilledLoss, SoftTargets, cross_entropy, distilled_cross_entropy

TOKENS, VOCABULARY = 7, 11


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, unembedding, targets, mask, and the logits of a teacher that agrees at the first three tokens."""
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, 5, generator=draw).to(dtype).requires_grad_()
    unembedding = torch.randn(VOCABULARY, 5, generator=draw).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    mask = torch.tensor([True, True, False, True, True, False, True])
    teacher = torch.randn(TOKENS, VOCABULARY, generator=draw).to(dtype)
    likeliest = (hidden @ unembedding.t()).argmax(dim=-1)
    for token in range(TOKENS):
        teacher[token, (likeliest[token] + (token > 2)) % VOCABULARY] = 9.0
    return hidden, unembedding, targets, mask, teacher


def distilled(h: Tensor, u: Tensor, t: Tensor, m: Tensor | None, teacher: Tensor, **settings: float) -> DistilledLoss:
    soft = SoftTargets(lambda part: teacher[part], settings["beta"], settings["temperature"])
    return distilled_cross_entropy(h, u, t, m, 3, None, soft)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_its_formula(temperature: float, masked: bool) -> None:
    hidden, unembedding, targets, mask, teacher = inputs()
    counted = mask if masked else torch.ones_like(mask)
    found = distilled(
        hidden, unembedding, targets, mask if masked else None, teacher, beta=0.7, temperature=temperature
    )
    logits = hidden @ unembedding.t()
    p = (teacher / temperature).softmax(-1)
    divergence = (p * (p.log() - (logits / temperature).log_softmax(-1))).sum(-1)
    language = F.cross_entropy(logits[counted], targets[counted])
    distillation = temperature**2 * divergence[counted].mean()
    torch.testing.assert_close(found.language, language)
    torch.testing.assert_close(found.distillation, distillation)
    torch.testing.assert_close(found.loss, language + 0.7 * distillation)
    assert float(found.agreement) == pytest.approx(2 / 5 if masked else 3 / 7)  # token 2 is masked
    expected = torch.autograd.grad(language + 0.7 * distillation, (hidden, unembedding))
    torch.testing.assert_close(torch.autograd.grad(found.loss, (hidden, unembedding)), expected)


def test_the_gradient_is_the_losses() -> None:
    hidden, unembedding, targets, mask, teacher = inputs()

    def loss(h: Tensor, u: Tensor) -> Tensor:
        return distilled(h, u, targets, mask, teacher, beta=1.3, temperature=2.0).loss

    assert torch.autograd.gradcheck(loss, (hidden, unembedding))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    hidden, unembedding, targets, mask, _ = inputs()
    same = (hidden @ unembedding.t()).detach()
    found = distilled(hidden, unembedding, targets, mask, same, beta=5.0, temperature=3.0)
    alone = cross_entropy(hidden, unembedding, targets, mask, 3)
    assert float(found.distillation.detach()) == pytest.approx(0, abs=1e-12) and float(found.agreement) == 1
    both = [torch.autograd.grad(loss, (hidden, unembedding)) for loss in (found.loss, alone)]
    torch.testing.assert_close(*both)


def test_nothing_counts_where_all_is_masked() -> None:
    hidden, unembedding, targets, mask, teacher = inputs()
    found = distilled(hidden, unembedding, targets, torch.zeros_like(mask), teacher, beta=1.0, temperature=2.0)
    found.loss.backward()
    assert [float(value.detach()) for value in found] == [0] * 4 and not hidden.grad.any()


def test_autocast_keeps_the_losses_in_fp32() -> None:
    hidden, unembedding, targets, mask, teacher = inputs(torch.float32)
    exact = distilled(hidden, unembedding, targets, mask, teacher, beta=1.0, temperature=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        half = distilled(hidden, unembedding, targets, mask, teacher.bfloat16(), beta=1.0, temperature=2.0)
    assert {value.dtype for value in half} == {torch.float32}
    torch.testing.assert_close(tuple(half[:3]), tuple(exact[:3]), rtol=0.02, atol=0.02)
    found, expected = (torch.autograd.grad(one.loss, hidden)[0] for one in (half, exact))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)

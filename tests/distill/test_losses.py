"""The distillation loss against its formula, and its gradient against finite differences."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nlgmoe.distill.record_logits import likeliest
from nlgmoe.layers.losses import DistilledLoss, SoftTargets, TopTargets, cross_entropy, distilled_cross_entropy

TOKENS, VOCABULARY, ROWS = 7, 11, 13  # of the table two rows are padding


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, unembedding, targets, mask, and the logits of a teacher that agrees at the first three tokens."""
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, 5, generator=draw).to(dtype).requires_grad_()
    unembedding = torch.randn(ROWS, 5, generator=draw).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    mask = torch.tensor([True, True, False, True, True, False, True])
    teacher = torch.randn(TOKENS, VOCABULARY, generator=draw).to(dtype)
    likeliest = (hidden @ unembedding[:VOCABULARY].t()).argmax(dim=-1)
    for token in range(TOKENS):
        teacher[token, (likeliest[token] + (token > 2)) % VOCABULARY] = 9.0
    return hidden, unembedding, targets, mask, teacher


def distilled(h: Tensor, u: Tensor, t: Tensor, m: Tensor | None, teacher: Tensor, **settings: float) -> DistilledLoss:
    soft = SoftTargets(lambda part: teacher[part], settings["beta"], settings["temperature"])
    return distilled_cross_entropy(h, u, VOCABULARY, t, m, 3, None, soft)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
def test_distillation_loss_is_its_formula(temperature: float, masked: bool) -> None:
    hidden, unembedding, targets, mask, teacher = inputs()
    counted = mask if masked else torch.ones_like(mask)
    masks = mask if masked else None
    actual = distilled(hidden, unembedding, targets, masks, teacher, beta=0.7, temperature=temperature)
    logits = hidden @ unembedding[:VOCABULARY].t()
    p = (teacher / temperature).softmax(-1)
    divergence = (p * (p.log() - (logits / temperature).log_softmax(-1))).sum(-1)
    language = F.cross_entropy(logits[counted], targets[counted])
    distillation = temperature**2 * divergence[counted].mean()
    torch.testing.assert_close(actual.language, language)
    torch.testing.assert_close(actual.distillation, distillation)
    torch.testing.assert_close(actual.loss, language + 0.7 * distillation)
    assert float(actual.agreement) == pytest.approx(2 / 5 if masked else 3 / 7)  # token 2 is masked
    assert [value.requires_grad for value in actual] == [True, False, False, False]
    expected = torch.autograd.grad(language + 0.7 * distillation, (hidden, unembedding))
    torch.testing.assert_close(torch.autograd.grad(actual.loss, (hidden, unembedding)), expected)


def test_a_target_whose_probability_is_zero_in_fp32_has_its_loss_and_gradient() -> None:
    hidden, unembedding, targets, _, _ = inputs(torch.float32)
    hidden = (300 * hidden).detach().requires_grad_()
    logits = hidden @ unembedding[:VOCABULARY].t()
    assert (logits.softmax(-1).gather(1, targets[:, None]) == 0).any()
    actual = cross_entropy(hidden, unembedding, VOCABULARY, targets, None, 3)
    expected = F.cross_entropy(logits, targets)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    variables = hidden, unembedding
    torch.testing.assert_close(torch.autograd.grad(actual, variables), torch.autograd.grad(expected, variables))


def test_distillation_loss_and_gradient_are_0_where_all_is_masked() -> None:
    hidden, unembedding, targets, mask, teacher = inputs()
    actual = distilled(hidden, unembedding, targets, torch.zeros_like(mask), teacher, beta=1.0, temperature=2.0)
    actual.loss.backward()
    assert [float(value.detach()) for value in actual] == [0] * 4 and not hidden.grad.any()


def offline(
    h: Tensor,
    u: Tensor,
    t: Tensor,
    m: Tensor | None,
    teacher: Tensor,
    top_k: int,
    half: bool = False,
    **settings: float,
) -> DistilledLoss:
    """As `distilled`, of the teacher's `top_k` likeliest tokens."""
    beta, temperature = settings["beta"], settings["temperature"]
    said = SoftTargets(lambda part: teacher[part], beta, temperature)

    def top(part: slice) -> tuple[Tensor, Tensor]:
        ids, log_probs = likeliest(said, part, top_k, temperature)
        return ids, log_probs.half() if half else log_probs

    return distilled_cross_entropy(h, u, min(len(u), VOCABULARY), t, m, 3, None, TopTargets(top, beta, temperature))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_loss_of_all_tokens_is_the_whole_loss(temperature: float) -> None:
    arguments, settings = inputs(), {"beta": 0.7, "temperature": temperature}
    whole, kept = distilled(*arguments, **settings), offline(*arguments, top_k=VOCABULARY, **settings)
    torch.testing.assert_close(tuple(kept), tuple(whole))
    hidden, unembedding = arguments[:2]
    actual, expected = (torch.autograd.grad(result.loss, (hidden, unembedding)) for result in (kept, whole))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 4, VOCABULARY - 1])
def test_top_k_loss_hides_a_bounded_part_of_the_tail(top_k: int, temperature: float) -> None:
    """Token by token: the divergence of K + 1 classes, what it lacks, and the gradient by the logits."""
    _, _, targets, _, teacher = inputs()
    logits = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    p, q = ((x / temperature).softmax(-1) for x in (teacher.double(), logits.detach()))
    order = p.argsort(dim=-1, descending=True)
    p, q = p.gather(1, order), q.gather(1, order)
    classes = [torch.cat([x[:, :top_k], x[:, top_k:].sum(-1, keepdim=True)], dim=1) for x in (p, q)]
    expected = (classes[0] * (classes[0] / classes[1]).log()).sum(-1)
    for token in range(TOKENS):
        position = slice(token, token + 1)
        arguments = logits[position], identity, targets[position], None, teacher[position].double()
        kept = offline(*arguments, top_k=top_k, beta=1.0, temperature=temperature)
        whole = distilled(*arguments, beta=1.0, temperature=temperature)
        assert float(kept.distillation.detach()) == pytest.approx(temperature**2 * float(expected[token]))
        lost = float((whole.distillation - kept.distillation).detach()) / temperature**2
        tail, ours = p[token, top_k:], q[token, top_k:]
        assert -1e-12 <= lost <= float(tail.sum() * (ours.sum() / ours.min()).log()) + 1e-12
        gradients = [torch.autograd.grad(loss.loss, logits)[0][token] for loss in (kept, whole)]
        difference = float((gradients[0] - gradients[1]).abs().sum())
        assert difference <= 2 * temperature * float(tail.sum()) + 1e-12
        assert top_k == VOCABULARY - 1 or difference > 0


def test_top_k_loss_has_its_own_gradient() -> None:
    hidden, unembedding, targets, mask, teacher = inputs()

    def loss(h: Tensor, u: Tensor) -> Tensor:
        return offline(h, u, targets, mask, teacher, top_k=3, beta=1.3, temperature=2.0).loss

    assert torch.autograd.gradcheck(loss, (hidden, unembedding))


def test_a_student_whose_tail_is_nothing_learns_without_nan() -> None:
    """Its probabilities of the tail are 0 in fp32, the teacher's are not."""
    logits = torch.zeros(1, 6).index_fill_(1, torch.tensor([0]), 300.0).requires_grad_()
    teacher, target = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]), torch.zeros(1, dtype=torch.int64)
    actual = offline(logits, torch.eye(6), target, None, teacher, top_k=2, half=True, beta=1.0, temperature=1.0)
    (gradient,) = torch.autograd.grad(actual.loss, logits)
    assert actual.loss.isfinite() and gradient.isfinite().all() and gradient[0, 0] > 0.5


def test_distillation_loss_stays_in_fp32_under_autocast() -> None:
    hidden, unembedding, targets, mask, teacher = inputs(torch.float32)
    exact = distilled(hidden, unembedding, targets, mask, teacher, beta=1.0, temperature=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        half = distilled(hidden, unembedding, targets, mask, teacher.bfloat16(), beta=1.0, temperature=2.0)
    assert {value.dtype for value in half} == {torch.float32}
    torch.testing.assert_close(tuple(half[:3]), tuple(exact[:3]), rtol=0.02, atol=0.02)
    actual, expected = (torch.autograd.grad(result.loss, hidden)[0] for result in (half, exact))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02)

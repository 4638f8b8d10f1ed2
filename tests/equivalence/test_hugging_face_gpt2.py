"""The dense model is GPT-2: with the same weights, Hugging Face's implementation computes the same numbers."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.attention import KVCache
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.model.gpt import GPT
from tests.support.gpt2 import HEADS, INNER, LAYERS, SEQ_LEN, VOCAB, WIDTH, as_theirs, our_name


def our_gpt(moe: MoEConfig | None = None) -> GPT:
    shape = VOCAB, SEQ_LEN, LAYERS, WIDTH, HEADS, INNER
    gpt = GPT(GPTConfig(*shape, layer_norm_eps=1e-5, vocab_size_multiple=16, moe=moe))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in gpt.named_parameters():  # far from the initial values, so that every one of them matters
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data = 1 + noise if "norm.weight" in name else noise
    return gpt


def their_gpt(ours: GPT) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=SEQ_LEN, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=INNER,
        activation_function="gelu_new", layer_norm_epsilon=1e-5, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config)
    values = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(as_theirs(name, values[our_name(name)]))
    return theirs


def test_logits_loss_and_every_gradient_equal_hugging_faces() -> None:
    ours = our_gpt()
    theirs = their_gpt(ours)
    tokens = torch.randint(VOCAB, (3, SEQ_LEN), generator=torch.Generator().manual_seed(2))
    counted = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.7

    hidden = ours(tokens).hidden
    targets, mask = tokens[:, 1:].flatten(), counted[:, 1:].flatten()
    loss = cross_entropy(hidden[:, :-1].flatten(0, 1), ours.unembedding, VOCAB, targets, mask, chunk_size=10)
    expected = theirs(tokens, labels=tokens.masked_fill(~counted, -100))
    logits = ours.logits(hidden)
    assert logits.shape == (3, SEQ_LEN, VOCAB)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5 * expected.logits.abs().max().item())
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)

    loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert not gradients["token_embedding.weight"][VOCAB:].any(), "padding of the vocabulary has a gradient"
    reference = {name: p.grad for name, p in theirs.named_parameters()}
    assert {our_name(name) for name in reference} == set(gradients)
    floor = 1e-3 * torch.stack([g.norm() for g in reference.values()]).norm()  # key biases: pure rounding noise
    for name, theirs_grad in reference.items():
        error = (as_theirs(name, gradients[our_name(name)]) - theirs_grad).norm()
        assert error <= 1e-5 * max(theirs_grad.norm(), floor), f"{name}: {error / theirs_grad.norm():.1e}"


MOE = MoEConfig(num_experts=4, top_k=2, mlp_type="residual")  # evaluation is dropless, so neighbours do not matter


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padded_batches_equal_the_sequences_alone_with_and_without_cache(side: str, moe: MoEConfig | None) -> None:
    gpt = our_gpt(moe).eval()
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(VOCAB, (n,), generator=generator) for n in (3, 12, 7)]
    padded, mask = torch.full((3, 14), 9), torch.zeros(3, 14, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        start = {"left": 14 - len(prompt), "right": 0, "both": (14 - len(prompt)) // 2}[side]
        padded[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = True
    going_on = torch.randint(VOCAB, (3, 4), generator=generator)

    cache = KVCache(SEQ_LEN)
    first = gpt(padded, token_mask=mask, cache=cache).hidden
    second = torch.cat([gpt(piece, cache=cache).hidden for piece in going_on.split([1, 3], dim=1)], dim=1)
    for row, prompt in enumerate(prompts):
        alone = gpt(torch.cat([prompt, going_on[row]])[None]).hidden[0]
        got = torch.cat([first[row][mask[row]], second[row]])
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)

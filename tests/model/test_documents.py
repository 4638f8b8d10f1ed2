"""Documents packed into one sequence are read as if each stood alone, and padding as if it were not there."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from window_attention import WindowAttentionConfig

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.attention import KVCache
from nlgmoe.layers.mla import MLAConfig
from nlgmoe.model.gpt import GPT

DROPLESS = MoEConfig(4, top_k=2, second_expert="argmax", mlp_type="residual", token_dropping=False)
CONFIG = GPTConfig(50, 24, 4, 32, 2, init_std=0.2, vocab_size_multiple=16, moe=DROPLESS)
# Half of each head turns, as in GLM-4.5; the shared expert is times a sigmoid, as in Qwen2-MoE.
TURNED = replace(
    CONFIG, rope_theta=100.0, rotary_dim=8, qkv_bias=False, moe=replace(DROPLESS, residual_mix="sigmoid", groups=[2, 1])
)
LATENT = replace(CONFIG, rope_theta=100.0, attention=MLAConfig(12, 8, 4, 6, q_lora_rank=10))
WINDOW = replace(CONFIG, attention=WindowAttentionConfig(6))
LENGTHS = [[3, 8, 1, 12], [24, 0, 0, 0]]  # of the documents in each sequence


def packed() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))
    return tokens, torch.stack([torch.arange(4).repeat_interleave(torch.tensor(row)) for row in LENGTHS])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [CONFIG, TURNED, LATENT, WINDOW], ids=["gpt", "turned", "latent", "window"])
def test_documents_in_a_sequence_are_computed_as_if_alone(
    config: GPTConfig, dtype: torch.dtype, tolerance: float, training: bool
) -> None:
    model = GPT(config).to(dtype).train(training)
    tokens, documents = packed()
    together = model(tokens, documents=documents)
    assert not torch.allclose(together.hidden[0, 3:], model(tokens).hidden[0, 3:], atol=1e-2)
    for sequence, lengths in enumerate(LENGTHS):
        end = 0
        for length in filter(None, lengths):
            start, end = end, end + length
            alone = model(tokens[sequence : sequence + 1, start:end])
            found = together.hidden[sequence, start:end]
            torch.testing.assert_close(found, alone.hidden[0], rtol=tolerance, atol=tolerance)
            for packed_routing, routing in zip(together.routings, alone.routings, strict=True):
                chosen = packed_routing.expert.view(2, 24, 2)[sequence, start:end]
                assert torch.equal(chosen, routing.expert)


@pytest.mark.parametrize("config", [CONFIG, LATENT, WINDOW], ids=["gpt", "latent", "window"])
def test_padding_beside_documents_is_not_seen_nor_counted(config: GPTConfig) -> None:
    model = GPT(config).double().eval()
    tokens, documents = packed()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, [4, 11, 13]] = False  # inside the second document, the third one whole, and near the start of the fourth
    found = model(tokens, mask, documents=documents).hidden
    for start, end in ((0, 3), (3, 11), (12, 24)):
        real = mask[0, start:end]
        alone = model(tokens[:1, start:end][:, real]).hidden[0]
        torch.testing.assert_close(found[0, start:end][real], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "config",
    [replace(CONFIG, moe=None), CONFIG, TURNED, LATENT, WINDOW],
    ids=["dense", "moe", "turned", "latent", "window"],
)
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padded_batches_equal_the_sequences_alone_with_and_without_cache(side: str, config: GPTConfig) -> None:
    gpt = GPT(replace(config, num_layers=3)).eval()
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(50, (n,), generator=generator) for n in (3, 12, 7)]
    padded, mask = torch.full((3, 14), 9), torch.zeros(3, 14, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        start = {"left": 14 - len(prompt), "right": 0, "both": (14 - len(prompt)) // 2}[side]
        padded[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = True
    going_on = torch.randint(50, (3, 4), generator=generator)

    cache = KVCache(24)
    first = gpt(padded, token_mask=mask, cache=cache).hidden
    second = torch.cat([gpt(piece, cache=cache).hidden for piece in going_on.split([1, 3], dim=1)], dim=1)
    for row, prompt in enumerate(prompts):
        alone = gpt(torch.cat([prompt, going_on[row]])[None]).hidden[0]
        got = torch.cat([first[row][mask[row]], second[row]])
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)

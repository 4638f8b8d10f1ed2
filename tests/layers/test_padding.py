"""Padding is as if it were not there."""

import pytest
import torch

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.attention import KVCache
from nlgmoe.model.gpt import GPT

VOCAB, SEQ_LEN = 67, 24
MOE = MoEConfig(num_experts=4, top_k=2, mlp_type="residual")  # evaluation is dropless, so neighbours do not matter


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padded_batches_equal_the_sequences_alone_with_and_without_cache(side: str, moe: MoEConfig | None) -> None:
    gpt = GPT(GPTConfig(VOCAB, SEQ_LEN, 3, 32, 4, 80, init_std=0.2, moe=moe)).eval()
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

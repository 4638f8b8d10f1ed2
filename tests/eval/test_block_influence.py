"""Block Influence (ShortGPT, arXiv 2403.03853), against its definition."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nlgmoe import GPT
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.eval.importance import measure_influence

CONFIG = GPTConfig(61, 16, 3, 16, 2, init_std=0.3, moe=MoEConfig(4))


def batch_of(tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"tokens": tokens, "targets": tokens, "token_mask": mask, "domain": torch.zeros(len(tokens))}


@torch.no_grad()
def test_block_influence_is_one_minus_the_mean_cosine_of_input_and_output() -> None:
    """Padding does not count, and batches of different sizes weigh by their tokens."""
    model = GPT(CONFIG).eval()
    tokens = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(0))
    masks = torch.ones_like(tokens, dtype=torch.bool)
    masks[0, 5:] = False
    inputs: list[list[Tensor]] = []
    for row, mask in zip(tokens, masks, strict=True):
        states: list[Tensor] = []
        handles = [b.register_forward_pre_hook(lambda _, x, s=states: s.append(x[0][0])) for b in model.blocks]
        handles.append(model.final_norm.register_forward_pre_hook(lambda _, x, s=states: s.append(x[0][0])))
        model(row[mask].unsqueeze(0))
        for handle in handles:
            handle.remove()
        inputs.append(states)
    states = [torch.cat(parts).double() for parts in zip(*inputs, strict=True)]  # of each block, of all tokens
    expected = [float(1 - (x * y).sum(-1).div(x.norm(dim=-1) * y.norm(dim=-1)).mean()) for x, y in pairwise(states)]
    found = measure_influence(model, [batch_of(tokens[:1], masks[:1]), batch_of(tokens[1:], masks[1:])])
    assert found == pytest.approx(expected, abs=1e-6) and min(found) > 0.01
    assert not any(block._forward_hooks for block in model.blocks)

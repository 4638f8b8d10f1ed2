"""Block Influence on a text (ShortGPT, arXiv 2403.03853): how much each block changes the residual stream's direction.

    BI_i = 1 - mean over tokens of cos(x_i, x_{i+1})

x_i is the input of block i, x_{i+1} its output. A block with an influence of 0 passes its input on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.nn.functional import cosine_similarity

from nlgmoe.batch import Batch, token_mask_or_none
from nlgmoe.model.gpt import GPT, Block
from nlgmoe.validation import RunError


@torch.no_grad()
def measure_influence(model: GPT, batches: Iterable[Batch]) -> list[float]:
    """Read text with a model in evaluation mode, and return the influence of each block, from 0 to 2.

    Raises:
        RunError: there is no text.
    """
    device = model.unembedding.device
    sums = torch.zeros(len(model.blocks), dtype=torch.float64, device=device)
    tokens, mask = 0, torch.empty(0)

    def measured(index: int) -> Any:
        def add(block: Block, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
            similarity = cosine_similarity(inputs[0].float(), output[0].float(), dim=-1)  # [B, T]
            sums[index] += ((1 - similarity.double()).clamp_min(0) * mask).sum()  # rounding: cos > 1

        return add

    handles = [block.register_forward_hook(measured(index)) for index, block in enumerate(model.blocks)]
    try:
        for batch in (move_data_to_device(batch, device) for batch in batches):
            mask = batch["token_mask"]
            model(batch["tokens"], token_mask_or_none(batch), documents=batch.get("document"))
            tokens += int(mask.sum())
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise RunError("there is no text to measure the influence of blocks on; give some")
    influence: list[float] = (sums / tokens).tolist()
    return influence

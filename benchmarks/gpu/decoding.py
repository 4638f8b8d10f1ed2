"""Step `decoding`: what 125M + MoE-64 generates greedily on the GPU, against the CPU in fp32; and the time of a token.

The CPU reads what the GPU has written, in one pass: each id has to be the one it would have chosen. Where two logits, or two
experts, are as close as rounding, either may win: an id counts as wrong if its logit is more than `NEAR` below the best, and
one in 200 may be, after another expert somewhere in its past.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import Tensor

from benchmarks.gpu.run import ROOT, Run, draw, seconds
from nlgmoe.config import GPTConfig
from nlgmoe.eval.generation import generate
from nlgmoe.model.gpt import GPT

NEAR = 1e-3
BATCHES = (1, 16)


def decoding(run: Run, folder: Path) -> None:
    """Generate, compare, time."""
    values = yaml.safe_load((ROOT / "configs/moe/125m_moe_64.yaml").read_text())["model"]["config"]
    tiny = {"vocab_size": 257, "seq_len": 64, "num_layers": 2, "hidden_size": 32, "num_heads": 2} if run.dry else {}
    config = GPTConfig.from_dict(values | tiny)
    prompt, new = (8, 6) if run.dry else (512, 128)
    model, dense = built(config, run.device), built(replace(config, moe=None), run.device)
    there = empty(config, torch.device("cpu"))
    there.load_state_dict(model.state_dict())
    for batch in BATCHES:
        tokens = torch.randint(config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(batch))
        found = torch.tensor(generate(model, tokens, new, temperature=0))
        shortfall = below_best(there, found, prompt)
        run.note(f"ids that are exactly the CPU's, batch {batch}", float((shortfall == 0).float().mean()))
        run.correct(
            f"ids that the CPU would not choose, batch {batch}", float((shortfall > NEAR).float().mean()), 0.005
        )
    model, dense = model.bfloat16(), dense.bfloat16()
    for batch in BATCHES:
        tokens = torch.randint(config.vocab_size, (batch, prompt))
        times = {
            name: seconds(run.device, partial(generate, of, tokens, new, temperature=0))
            for name, of in {"warm-up": model, "MoE": model, "warm-up, dense": dense, "dense": dense}.items()
        }
        run.note(f"ms a token, batch {batch}", {name: 1e3 * times[name] / new for name in ("MoE", "dense")})
        run.aim(f"MoE over dense, a token, batch {batch}", times["MoE"] / times["dense"], at_most=2.0)


def built(config: GPTConfig, device: torch.device) -> GPT:
    """A model drawn on the device, with logits further apart than untrained ones."""
    model = empty(config, device)
    draw(model, std=0.05)
    return model


def empty(config: GPTConfig, device: torch.device) -> GPT:
    """A model without values."""
    with torch.device("meta"):
        model = GPT(config)
    return model.to_empty(device=device).eval()


@torch.no_grad()
def below_best(model: GPT, tokens: Tensor, prompt: int) -> Tensor:
    """How far the logit of each generated id is below the best one, `[B, new]`, in standard deviations of the logits."""
    parts = []
    for row in tokens.split(4):
        logits = model.logits(model(row[:, :-1]).hidden[:, prompt - 1 :])  # [B, new, V]
        chosen = logits.gather(-1, row[:, prompt:, None])[..., 0]
        parts.append((logits.amax(dim=-1) - chosen) / logits.std(dim=-1))
    return torch.cat(parts)

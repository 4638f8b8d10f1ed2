"""Speed of generation: MoE beside dense, and exported. 2 minutes.

    python -m benchmarks.generation

64 greedy tokens, 6 blocks of width 256, 64 experts in each, top-1, and a dense model with as many active parameters; with a
cache. Exported: our MoE by `generate` of `transformers`. `benchmarks.step` has Hugging Face's models. Models are untrained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.step import NEW, greedy
from benchmarks.timing import Benchmark, Part, Table, interleaved
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.model.gpt import GPT

CELLS = ((1, 32), (8, 32), (32, 32), (1, 512))  # batch, prompt
EXPERTS = 64
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def models(dtype: torch.dtype) -> dict[str, Any]:
    """Return all that generate."""
    from nlgmoe.tools.hugging_face.configuration_nlgmoe import NlgmoeConfig
    from nlgmoe.tools.hugging_face.modeling_nlgmoe import NlgmoeForCausalLM

    base = GPTConfig(4096, max(prompt for _, prompt in CELLS) + NEW, 6, 256, 4)
    ours = GPT(replace(base, moe=MoEConfig(EXPERTS, expert_interval=1)))
    exported = NlgmoeForCausalLM(
        NlgmoeConfig(**ours.config.to_dict(), bos_token_id=None, eos_token_id=None, pad_token_id=0)
    )
    exported.model.gpt.load_state_dict(ours.state_dict())
    every = {"MoE": ours, "exported": exported, "dense": GPT(base)}
    return {name: model.eval().to(dtype) for name, model in every.items()}


def text(rounds: int) -> list[dict[str, Any]]:
    """Return tokens per second by type, batch, prompt and model."""
    measured = []
    for kind, dtype in TYPES.items():
        every = models(dtype)
        for batch, prompt in CELLS:
            tokens = torch.randint(1, 4096, (batch, prompt), generator=torch.Generator().manual_seed(batch))
            candidates = {name: greedy(model, tokens) for name, model in every.items()}
            speed = {
                name: batch * NEW / seconds for name, seconds in interleaved(candidates, rounds, warm_up=1).items()
            }
            measured.append({"type": kind, "batch": batch, "prompt": prompt, "tokens_per_second": speed})
    return measured


def text_table(measured: list[dict[str, Any]]) -> Table:
    names = list(measured[0]["tokens_per_second"])
    rows: list[Any] = [
        [row["type"], row["batch"], row["prompt"], *(f"{row['tokens_per_second'][name]:,.0f}" for name in names)]
        for row in measured
    ]
    return ["tokens/s", "batch", "prompt", *names], rows


BENCHMARK = Benchmark("generation", "generation.md", {"text": Part(text, text_table, 5)})

if __name__ == "__main__":
    BENCHMARK.run(__doc__)

"""Speed of generation: MoE beside dense, exported, and one token of the paper's families. 3 minutes.

    python -m benchmarks.generation [--only text token]

text: 64 greedy tokens, 6 blocks of width 256, 64 experts in each, top-1, and a dense model with as many active parameters; with
a cache. Exported: our MoE by `generate` of `transformers`. `benchmarks.step` has Hugging Face's models.

token: one token at batch 1 after 64 others, in fp32. Dense and 128 experts in every second block, by width (6 blocks); the
families in the shape of the paper's 350M models with half the blocks (12) and a width of 256. The cache is that of a sequence of
128 tokens.

Models are untrained, and the tokens that are fed are random ones: a model that repeats itself would find its experts' weights in
the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.step import NEW, greedy
from benchmarks.timing import Benchmark, Part, Table, interleaved
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.attention import KVCache
from nlgmoe.model.counting import count_parameters
from nlgmoe.model.gpt import GPT
from nlgmoe.pyramid import student_config

CELLS = ((1, 32), (8, 32), (32, 32), (1, 512))  # batch, prompt
EXPERTS = 64
CACHED, DECODED = 64, 32  # of `token`: tokens in the cache, tokens fed one by one in each round
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dense(width: int, length: int = 128) -> GPTConfig:
    """6 blocks."""
    return GPTConfig(4096, length, 6, width, max(2, width // 64))


def models(dtype: torch.dtype) -> dict[str, Any]:
    """Return all that generate."""
    from nlgmoe.tools.hugging_face.configuration_nlgmoe import NlgmoeConfig
    from nlgmoe.tools.hugging_face.modeling_nlgmoe import NlgmoeForCausalLM

    base = dense(256, max(prompt for _, prompt in CELLS) + NEW)
    ours = GPT(replace(base, moe=MoEConfig(EXPERTS, expert_interval=1)))
    exported = NlgmoeForCausalLM(
        NlgmoeConfig(**ours.config.to_dict(), bos_token_id=None, eos_token_id=None, pad_token_id=0)
    )
    exported.model.load_state_dict(ours.state_dict())
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


def decoder(model: GPT) -> Callable[[], None]:
    """Return decoding of `DECODED` tokens, one by one after `CACHED`, each with the choice of the most likely next one."""
    draw = torch.Generator().manual_seed(0)
    cached = torch.randint(model.config.vocab_size, (1, CACHED), generator=draw)
    fed = torch.randint(model.config.vocab_size, (DECODED, 1, 1), generator=draw)
    cache = KVCache(CACHED + DECODED)
    with torch.no_grad():
        model(cached, cache=cache)

    @torch.no_grad()
    def decode() -> None:
        cache.length = CACHED  # forget what the last round added
        for token in fed:
            model.logits(model(token, cache=cache).hidden[:, -1]).argmax(dim=-1)

    return decode


def token(rounds: int) -> list[dict[str, Any]]:
    """Return size, memory and seconds of a token by group of models."""
    base = GPTConfig(4096, 128, 12, 256, 4)
    teacher = replace(base, moe=MoEConfig([32] * 5 + [64], mlp_type="residual"))
    groups: dict[str, dict[str, GPTConfig]] = {
        f"{width} wide": {"dense": dense(width), "MoE-128": replace(dense(width), moe=MoEConfig(128))}
        for width in (128, 256, 512)
    }
    groups["350M's shape"] = {
        "standard MoE, 128 experts": replace(base, moe=MoEConfig(128)),
        "PR-MoE 32/64": teacher,
        "its student, 10 of 12 blocks": student_config(teacher, 10),
    }
    measured = []
    for group, configs in groups.items():
        seconds = interleaved({name: decoder(GPT(config).eval()) for name, config in configs.items()}, rounds)
        for name, config in configs.items():
            count, cache = count_parameters(config), 8 * config.num_layers * config.hidden_size * 128
            row = {"group": group, "model": name, "parameters": count.total, "active_parameters": count.active}
            measured.append(row | {"cache_bytes": cache, "seconds_per_token": seconds[name] / DECODED})
    return measured


def token_table(measured: list[dict[str, Any]]) -> Table:
    rows: list[Any] = []
    for row in measured:
        first = next(other for other in measured if other["group"] == row["group"])
        size, active, cache = (row[key] / 1e6 for key in ("parameters", "active_parameters", "cache_bytes"))
        cells = [
            f"{row['group']}: {row['model']}",
            f"{size:.1f}M",
            f"{active:.2f}M",
            f"{4 * size:,.0f} MB",
            f"{cache:.1f} MB",
        ]
        ratio = row["seconds_per_token"] / first["seconds_per_token"]
        rows.append([*cells, f"{1e3 * row['seconds_per_token']:.2f}", f"{ratio:.2f}"])
    return ["model", "parameters", "active", "weights", "cache", "ms a token", "of the group's first"], rows


BENCHMARK = Benchmark(
    "generation", "generation.md", {"text": Part(text, text_table, 5), "token": Part(token, token_table, 7)}
)

if __name__ == "__main__":
    BENCHMARK.run(__doc__)

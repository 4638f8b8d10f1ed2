"""A whole training step: forward, loss, backward, clipping, AdamW. Ours beside assemblies of well-known parts.

    python -m benchmarks.step [--rounds 5] [--only assemblies|growth]

    ours            `GPT`, chunked cross-entropy, fused AdamW
    usual           DeepSpeed's `MoE`, attention written out, logits and cross-entropy of the whole batch in fp32, default AdamW
    good            DeepSpeed's `MoE`, PyTorch's fused attention, cross-entropy in recomputed chunks, fused AdamW
    dense           our dense model of the same active FLOPs per token
    hugging face    GPT-2 of the dense model's size, fused attention, its own loss, fused AdamW

Growth: the step against the number of experts, the length of sequences and the width, at equal tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.layer import deepspeed
from benchmarks.timing import command_line, interleaved, settings
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.attention import AttentionContext, CausalSelfAttention
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.layers.router import RoutingContext
from nlgmoe.model.counting import flops_per_token
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.param_groups import AdamWConfig, build_adamw

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TOKENS, CHUNK = 2048, 1024
DENSE = GPTConfig(50_257, 256, 6, 256, 8)


def moe(config: GPTConfig, experts: int) -> GPTConfig:
    """The same with a top-1 MoE in every second block: the same active FLOPs, but for the gate."""
    return replace(config, moe=MoEConfig(experts, token_dropping=False))


class PlainAttention(CausalSelfAttention):
    """The same layer with the scores written out."""

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`[B, T, H] -> [B, T, H]`."""
        length = x.shape[1]
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(later, float("-inf")).float().softmax(dim=-1).to(value.dtype) @ value
        projected: Tensor = self.project(mixed.transpose(1, 2).flatten(2))
        return projected


class DeepSpeedLayer(nn.Module):
    """DeepSpeed's `MoE` in the place of ours; capacity 1.0, as it is used."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.layer = deepspeed(hidden, experts, 1, dropping=True)

    def forward(self, x: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """`[B, T, H] -> [B, T, H]` and, in the place of the routing, the balance loss."""
        y, loss, _ = self.layer(x)
        return y, loss


def assembled(config: GPTConfig, attention: type[CausalSelfAttention]) -> GPT:
    """Our model with DeepSpeed's layers, and attention of the given kind."""
    assert config.moe is not None and isinstance(config.moe.num_experts, int)
    model = GPT(config)
    for block in model.blocks:
        block.attention.__class__ = attention
        if block.moe is not None:
            block.moe = DeepSpeedLayer(config.hidden_size, config.moe.num_experts)
    return model


def whole_loss(hidden: Tensor, table: Tensor, vocab_size: int, targets: Tensor) -> Tensor:
    """All logits at once, in fp32."""
    return F.cross_entropy((hidden @ table[:vocab_size].t()).float(), targets)


def recomputed_loss(hidden: Tensor, table: Tensor, vocab_size: int, targets: Tensor) -> Tensor:
    """Logits in chunks that the backward pass computes again."""
    chunks = [
        checkpoint(whole_loss, h, table, vocab_size, t, use_reentrant=False)
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.stack(chunks).mean()


def our_loss(hidden: Tensor, table: Tensor, vocab_size: int, targets: Tensor) -> Tensor:
    """`layers/losses.py`."""
    return cross_entropy(hidden, table, vocab_size, targets, None, CHUNK)


def balance(routings: list[Any]) -> Tensor:
    """The balance loss, from our routings or DeepSpeed's losses."""
    return torch.stack(routings).sum() if isinstance(routings[0], Tensor) else router_losses(routings)[0]


def step(
    model: GPT,
    loss: Callable[[Tensor, Tensor, int, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Tensor],
    half: bool,
) -> Callable[[], None]:
    """A training step."""

    def run() -> None:
        batch = next(batches)
        tokens, targets = batch[:, :-1], batch[:, 1:].flatten()
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            output = model(tokens)
            value = loss(output.hidden.flatten(0, 1), model.unembedding, model.config.vocab_size, targets)
        if output.routings:
            value = value + 0.01 * balance(output.routings)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def hugging_face(config: GPTConfig, batches: Iterator[Tensor], half: bool) -> Callable[[], None]:
    """GPT-2 of the same size, as `transformers` trains it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.seq_len,
    }
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=config.padded_vocab_size, attn_implementation="sdpa", use_cache=False, **shape, **drops)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        tokens = next(batches)[:, :-1]
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            value = model(input_ids=tokens, labels=tokens).loss
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def batches_of(config: GPTConfig) -> Iterator[Tensor]:
    """`[B, T + 1]` ids, others each time: the experts' numbers of rows change, and the CPU's kernels are made for numbers."""
    random = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(config.vocab_size, (TOKENS // config.seq_len, config.seq_len + 1), generator=random)


def our_step(config: GPTConfig, half: bool) -> Callable[[], None]:
    """The step that `train.py` takes."""
    model = GPT(config)
    return step(model, our_loss, build_adamw(model, AdamWConfig(lr=1e-4)), batches_of(config), half)


def assemblies(experts: int, half: bool, rounds: int) -> dict[str, float]:
    """Seconds of each candidate."""
    config, batches = moe(DENSE, experts), batches_of(DENSE)
    usual, good = assembled(config, PlainAttention), assembled(config, CausalSelfAttention)
    return interleaved(
        {
            "ours": our_step(config, half),
            "usual": step(usual, whole_loss, torch.optim.AdamW(usual.parameters(), lr=1e-4), batches, half),
            "good": step(
                good, recomputed_loss, torch.optim.AdamW(good.parameters(), lr=1e-4, fused=True), batches, half
            ),
            "dense": our_step(DENSE, half),
            "hugging face": hugging_face(DENSE, batches, half),
        },
        rounds,
        warm_up=2,
    )


def growth(half: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds by experts, sequence length and width; `TOKENS` tokens each."""
    small = replace(DENSE, vocab_size=4096)
    by_experts = {"dense": small} | {str(e): moe(small, e) for e in (4, 8, 16, 32, 64, 128, 256)}
    by_length = {str(t): moe(replace(small, seq_len=t), 32) for t in (64, 128, 256, 512, 1024, 2048)}
    by_width = {str(h): moe(replace(small, hidden_size=h), 32) for h in (64, 128, 256, 512)}
    kinds = {"experts": by_experts, "sequence length": by_length, "width": by_width}
    return {
        kind: interleaved({name: our_step(config, half) for name, config in configs.items()}, rounds, warm_up=1)
        for kind, configs in kinds.items()
    }


def plot(found: dict[str, dict[str, float]], path: Path) -> None:
    """One panel for each thing that grows; dashed: a dense model's step, or growth in proportion to the width."""
    figure, panels = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.4), sharey=True, layout="constrained")
    for panel, (kind, seconds) in zip(panels, found.items(), strict=True):
        points = {int(name): 1000 * value for name, value in seconds.items() if name.isdigit()}
        panel.plot(list(points), list(points.values()), "o-", color="tab:blue", label="MoE")
        if "dense" in seconds:
            panel.axhline(1000 * seconds["dense"], linestyle="--", color="gray", label="dense, equal FLOPs per token")
        elif kind == "width":
            first, *_, last = points
            panel.plot(
                [first, last], [points[first], points[first] * last / first], "--", color="gray", label="in proportion"
            )
        panel.set(xscale="log", yscale="log", xlabel=kind, xticks=list(points), xticklabels=map(str, points))
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set(ylabel=f"ms a step of {TOKENS:,} tokens", yticks=[200, 500, 1000, 2000, 5000])
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = command_line(__doc__.splitlines()[0], "step", 5, ["assemblies", "growth"])
    output = Path(arguments.output)
    results: dict[str, Any] = json.loads(output.read_text()) if arguments.only and output.exists() else {}
    now = settings(freed_memory_kept=arguments.freed_memory_kept, rounds=arguments.rounds, tokens=TOKENS, chunk=CHUNK)
    print(json.dumps(now, indent=1))
    flops = {name: flops_per_token(config) for name, config in {"dense": DENSE, "MoE-32": moe(DENSE, 32)}.items()}
    print(f"MFLOP per token, forward and backward: {', '.join(f'{n} {v / 1e6:.1f}' for n, v in flops.items())}")
    if arguments.only != "growth":
        results["assemblies"], results["settings"] = {}, now
        for half in (False, True):
            found = assemblies(32, half, arguments.rounds)
            name = "bf16" if half else "fp32"
            results["assemblies"][name] = found
            print(f"\n{name}: " + ", ".join(f"{label} {1000 * value:.0f} ms" for label, value in found.items()))
            for label, (one, other) in {
                "usual / ours": ("usual", "ours"),
                "good / ours": ("good", "ours"),
                "hugging face / dense": ("hugging face", "dense"),
                "ours / dense": ("ours", "dense"),
            }.items():
                print(f"  {label:<22} {found[one] / found[other]:.2f}", flush=True)
    if arguments.only != "assemblies":
        results["growth"], results["growth_settings"] = growth(False, max(3, arguments.rounds // 2)), now
        for kind, found in results["growth"].items():
            print(
                f"\n{kind}: " + ", ".join(f"{label} {1000 * value:.0f} ms" for label, value in found.items()),
                flush=True,
            )
        plot(results["growth"], output.with_name("step_growth.png"))
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A whole training step, forward, loss, backward, clipping, AdamW, beside Hugging Face's. 5 minutes.

    python -m benchmarks.step

One model with the same weights, as `OlmoeForCausalLM` or `Qwen3MoeForCausalLM` (`grouped_mm` experts, fused attention,
its own loss) and imported; 8 blocks of width 256, 16 experts, top-2, vocabulary of 8,192; a step of 2,048 tokens, and 64 greedy
tokens for 1, 8 and 32 prompts of 16. Memory is the most that a step allocates, beside weights, gradients and moments. Types:
fp32; bf16 weights; fp32 weights under bf16 autocast, where Hugging Face's experts stay in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import count
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Benchmark, Part, Table, interleaved
from nlgmoe import generate, load_model
from nlgmoe.experiment import load_config
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.layers.moe import moe_layers
from nlgmoe.loss import training_loss
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.optimizer import AdamWConfig, build_optimizer
from tests.support.memory import peak_bytes

TOKENS = 2048
TYPES = {
    "fp32": (torch.float32, False),
    "bf16 weights": (torch.bfloat16, False),
    "bf16 autocast": (torch.float32, True),
}
PROMPTS, NEW = (1, 8, 32), 64
WARM_UP = 15  # steps of `same`: oneDNN compiles a kernel for each number of rows
SAME: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "max_position_embeddings"), 256),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 8),
    **{"vocab_size": 8192, "num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True, "pad_token_id": 0},
    "eos_token_id": None,
}


def gpt_step(model: GPT, half: bool) -> Callable[[], None]:
    """Return a step: forward, loss, backward, clipping, AdamW; `half`: under bf16 autocast."""
    vocab_size = model.config.vocab_size

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        output = model(tokens)
        value = cross_entropy(output.hidden.flatten(0, 1), model.unembedding, vocab_size, targets.flatten(), None, 1024)
        return value + 0.01 * router_losses(output.routings)[0]

    optimizer = build_optimizer(model, AdamWConfig(lr=1e-4))
    return training_step(model, optimizer, loss, batches_of(model.config.seq_len, vocab_size), half)


def hugging_face_step(model: Any, half: bool) -> Callable[[], None]:
    """Return the step of a model of `transformers`, with its own loss."""

    def loss(tokens: Tensor, _: Tensor) -> Tensor:
        value: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return value

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return training_step(
        model, optimizer, loss, batches_of(SAME["max_position_embeddings"], model.config.vocab_size), half
    )


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterator[Tensor],
    half: bool,
) -> Callable[[], None]:
    """Return a step; `loss` is of tokens and targets `[B, T]`."""

    def run() -> None:
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            value = loss(batch[:, :-1], batch[:, 1:])
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def whole_step(files: Sequence[str], **overrides: Any) -> Callable[[], None]:
    """Return a step of train.py's `files` on their text: forward, loss, backward, clipping, optimizer, routers."""
    experiment = load_config(files, **overrides)
    module, data, steps = experiment.module, experiment.data, count()
    data.prepare_data()
    data.setup()
    batches, gpt, optimizer = iter(data.train_dataloader()), module.gpt.train(), module.configure_optimizers()
    routers: list[Any] = [moe.router for moe in moe_layers(gpt)]

    def step() -> None:
        loss, _, routings = training_loss(gpt, next(batches), (1, next(steps), 0), module.loss_chunk_size)
        loss.backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for router, routing in zip(routers, routings, strict=True):
            if router.learns_from_steps:
                router.after_step(routing.step_statistic)

    return step


def batches_of(length: int, vocab_size: int) -> Iterator[Tensor]:
    """Yield `[B, T + 1]` ids, others each time, so that experts have other numbers of rows."""
    random = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(vocab_size, (TOKENS // length, length + 1), generator=random)


def same_model(family: str) -> tuple[GPT, nn.Module]:
    """Return a model of a family with random weights, imported, and in its own class."""
    import transformers

    from nlgmoe.tools.hugging_face.importing import import_model

    if family == "OLMoE":
        config = transformers.OlmoeConfig(intermediate_size=256, **SAME)
    else:
        config = transformers.Qwen3MoeConfig(moe_intermediate_size=256, head_dim=32, intermediate_size=256, **SAME)
    build = transformers.AutoModelForCausalLM.from_config
    theirs: Any = build(config, attn_implementation="sdpa", experts_implementation="grouped_mm")
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(f"{folder}/theirs")
        import_model(f"{folder}/theirs", f"{folder}/ours.ckpt")
        return load_model(f"{folder}/ours.ckpt"), theirs


def greedy(model: Any, tokens: Tensor) -> Callable[[], object]:
    """Return greedy decoding of `NEW` tokens after prompts `[B, T]`, by us or by `transformers`."""
    if isinstance(model, GPT):
        prompts = tokens.tolist()
        return lambda: generate(model, prompts, NEW, temperature=0)
    options = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True}
    return lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)


def same(rounds: int) -> dict[str, Any]:
    """Return seconds of ours and theirs by family, type and task, and bytes at most of a training step."""
    measured: dict[str, Any] = {}
    for family in ("OLMoE", "Qwen3-MoE"):
        for kind, (dtype, half) in TYPES.items():
            ours, theirs = (model.to(dtype).train() for model in same_model(family))
            steps = {"ours": gpt_step(ours, half), "theirs": hugging_face_step(theirs, half)}
            row: dict[str, Any] = {"step": interleaved(steps, rounds, WARM_UP)}
            row["peak_bytes"] = {name: peak_bytes(step) for name, step in steps.items()}
            for prompts in () if half else PROMPTS:
                tokens = torch.randint(1, SAME["vocab_size"], (prompts, 16))
                candidates = {"ours": greedy(ours.eval(), tokens), "theirs": greedy(theirs.eval(), tokens)}
                row[f"{prompts} prompts"] = interleaved(candidates, rounds, 1)
            measured[f"{family}, {kind}"] = row
    return measured


def same_table(measured: dict[str, Any]) -> Table:
    tasks = ["step", "peak_bytes", *(f"{prompts} prompts" for prompts in PROMPTS)]
    head = ["theirs / ours", "our step, ms", "step", "memory of a step", *(f"text, {task}" for task in tasks[2:])]
    rows: list[Any] = []
    for name, row in measured.items():
        ratios = [f"{row[task]['theirs'] / row[task]['ours']:.2f}" if task in row else None for task in tasks]
        rows.append([name, f"{1e3 * row['step']['ours']:.0f}", *ratios])
    return head, rows


BENCHMARK = Benchmark("step", "performance.md", {"same": Part(same, same_table, 3)})

if __name__ == "__main__":
    BENCHMARK.run(__doc__)

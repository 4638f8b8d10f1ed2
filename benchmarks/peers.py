"""A whole training step beside other MoE models of the same FLOPs per token: time, and memory.

    python -m benchmarks.peers [--rounds 5] [--threads 2] [--only peers|same]

6 blocks of width 256, 16 experts in each, top-1, 2,048 tokens, GPT-2's vocabulary, fused AdamW, gradient clipping. Candidates:

    ours          `GPT` with an MoE in every block, dropless, chunked cross-entropy
    olmoe, qwen3  `OlmoeForCausalLM` and `Qwen3MoeForCausalLM` with `grouped_mm` experts, fused attention, and their own loss
    litgpt        litgpt's `GPT` with `LLaMAMoE`, where it is installed (`pip install --no-deps litgpt`)
    deepspeed     our model with DeepSpeed's `MoE`, capacity 1.0, in a plain loop: see `good` in benchmarks/step.py
    head          our logits, loss and their gradients alone: three products that every candidate has to compute

Experts of Hugging Face and litgpt are SwiGLU networks of three matrices, ours GELU networks of two; theirs are two thirds as
wide, for equal FLOPs and parameters. Memory is the most that a step allocates, beside weights, gradients and moments. Types:
fp32; bf16 weights; fp32 weights under bf16 autocast, where Hugging Face's experts stay in fp32.

`same` is the fairest comparison: one model with the same weights, as `OlmoeForCausalLM` or `Qwen3MoeForCausalLM` and imported; 8
blocks of width 256, 16 experts, top-2, 2,048 tokens; a training step, a forward pass, and 64 greedy tokens for 1, 8 and 32
prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step import CHUNK, DENSE, TOKENS, assembled, batches_of, our_loss, recomputed_loss, step
from benchmarks.timing import command_line, interleaved, settings
from nlgmoe import generate, load_model
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.attention import CausalSelfAttention
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.param_groups import AdamWConfig, build_adamw
from nlgmoe.tools.hugging_face.importing import import_folder
from tests.memory import peak_bytes

EXPERTS = 16
TYPES = {
    "fp32": (torch.float32, False),
    "bf16 weights": (torch.bfloat16, False),
    "bf16 autocast": (torch.float32, True),
}


def ours(dtype: torch.dtype, autocast: bool) -> Callable[[], None]:
    """Our model's step."""
    config = replace(DENSE, moe=MoEConfig(EXPERTS, expert_interval=1, token_dropping=False))
    model = GPT(config).to(dtype)
    return step(model, our_loss, build_adamw(model, AdamWConfig(lr=1e-4)), batches_of(config), autocast)


def head(dtype: torch.dtype, autocast: bool) -> Callable[[], None]:
    """The part of our step from the last hidden states to their gradient."""
    hidden = torch.randn(TOKENS, DENSE.hidden_size, dtype=dtype, requires_grad=True)
    table = (0.02 * torch.randn(DENSE.padded_vocab_size, DENSE.hidden_size)).to(dtype).requires_grad_()
    targets = next(batches_of(DENSE))[:, 1:].flatten()

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = cross_entropy(hidden, table, DENSE.vocab_size, targets, None, CHUNK)
        loss.backward()
        hidden.grad = table.grad = None

    return run


def swiglu_width(config: GPTConfig) -> int:
    """Width of experts of three matrices with the parameters of ours, which have two; a multiple of 16."""
    return config.ffn_size * 2 // 3 // 16 * 16


def hugging_face_shape(config: GPTConfig, experts: int) -> dict[str, Any]:
    """Settings that Hugging Face's MoE models have in common, for an MoE with top-1 in every block."""
    return {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "max_position_embeddings": config.seq_len,
        "num_experts": experts,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
    }


def hugging_face(name: str, dtype: torch.dtype, autocast: bool) -> Callable[[], None]:
    """The step of a model of `transformers` with random weights."""
    import transformers

    wide = swiglu_width(DENSE)
    shape = {**hugging_face_shape(DENSE, EXPERTS), "use_cache": False, "output_router_logits": True}
    if name == "olmoe":
        config = transformers.OlmoeConfig(intermediate_size=wide, **shape)
    else:
        head = DENSE.hidden_size // DENSE.num_heads
        config = transformers.Qwen3MoeConfig(moe_intermediate_size=wide, head_dim=head, **shape)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", experts_implementation="grouped_mm"
    ).to(dtype)
    return plain_step(model, lambda tokens, _: model(input_ids=tokens, labels=tokens).loss, autocast)


def plain_step(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], autocast: bool, shape: GPTConfig = DENSE
) -> Callable[[], None]:
    """A step with PyTorch's own parts; `loss` is of tokens and targets, `[B, T]`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = batches_of(shape)

    def run() -> None:
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            value = loss(batch[:, :-1], batch[:, 1:])
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def litgpt(dtype: torch.dtype, autocast: bool) -> Callable[[], None]:
    """The step of litgpt's model, its head tied as in the others."""
    from litgpt import GPT as LitGPT
    from litgpt import Config
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=DENSE.seq_len,
        n_layer=DENSE.num_layers,
        n_head=DENSE.num_heads,
        n_embd=DENSE.hidden_size,
        padded_vocab_size=DENSE.padded_vocab_size,
        vocab_size=DENSE.padded_vocab_size,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMoE",
        intermediate_size=DENSE.ffn_size,
        moe_intermediate_size=swiglu_width(DENSE),
        n_expert=EXPERTS,
        n_expert_per_token=1,
        bias=False,
        rotary_percentage=1.0,
        parallel_residual=False,
    )
    model = LitGPT(config).to(dtype)
    model.lm_head.weight = model.transformer.wte.weight
    return plain_step(model, lambda tokens, targets: chunked_cross_entropy(model(tokens), targets, CHUNK), autocast)


def deepspeed(dtype: torch.dtype, autocast: bool) -> Callable[[], None]:
    """The step with DeepSpeed's layers and cross-entropy in recomputed chunks."""
    config = replace(DENSE, moe=MoEConfig(EXPERTS, expert_interval=1, token_dropping=False))
    model = assembled(config, CausalSelfAttention).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return step(model, recomputed_loss, optimizer, batches_of(config), autocast)


SAME: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "pad_token_id": 0,
    "eos_token_id": None,
}
NEW, WARM_UP = (
    64,
    30,
)  # tokens generated; steps before the clock starts: oneDNN compiles a kernel for each number of rows


def same_model(family: str) -> tuple[GPT, nn.Module]:
    """A model of a family with random weights, imported, and in its own class."""
    import transformers

    if family == "olmoe":
        config = transformers.OlmoeConfig(intermediate_size=256, **SAME)
    else:
        config = transformers.Qwen3MoeConfig(moe_intermediate_size=256, head_dim=32, intermediate_size=256, **SAME)
    theirs: nn.Module = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(f"{folder}/theirs")  # type: ignore[operator]
        import_folder(f"{folder}/theirs", f"{folder}/ours.ckpt")
        return load_model(f"{folder}/ours.ckpt"), theirs


def measure_same(family: str, label: str, rounds: int) -> dict[str, Any]:
    """Seconds of both, and bytes at most, by task."""
    dtype, autocast = TYPES[label]
    ours, theirs = (model.to(dtype) for model in same_model(family))
    shape = replace(DENSE, vocab_size=SAME["vocab_size"])
    batches = batches_of(shape)
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else nullcontext

    def forward(model: nn.Module) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> object:
            tokens = next(batches)[:, :-1]
            with context():
                return (
                    ours.logits(ours(tokens).hidden)
                    if model is ours
                    else model(input_ids=tokens, use_cache=False).logits
                )

        return run

    def generation(model: nn.Module, prompts: int) -> Callable[[], object]:
        tokens = torch.randint(1, SAME["vocab_size"], (prompts, 16), generator=torch.Generator().manual_seed(0))
        if model is ours:
            return lambda: generate(ours, tokens.tolist(), max_new_tokens=NEW, temperature=0)
        mask, options = torch.ones_like(tokens), {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        return lambda: model.generate(tokens, attention_mask=mask, **options)  # type: ignore[operator]

    def their_loss(tokens: Tensor, _: Tensor) -> Tensor:
        loss: Tensor = theirs(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    training: dict[str, Callable[[], object]] = {
        "ours": step(ours, our_loss, build_adamw(ours, AdamWConfig(lr=1e-4)), batches_of(shape), autocast),
        "theirs": plain_step(theirs, their_loss, autocast, shape),
    }
    tasks: dict[str, tuple[dict[str, Callable[[], object]], int]] = {
        "training step": (training, WARM_UP),
        "forward": ({"ours": forward(ours), "theirs": forward(theirs)}, WARM_UP),
    }
    if not autocast:
        for prompts in (1, 8, 32):
            tasks[f"generation, {prompts}"] = (
                {"ours": generation(ours, prompts), "theirs": generation(theirs, prompts)},
                1,
            )
    found: dict[str, Any] = {}
    for task, (candidates, warm_up) in tasks.items():
        for model in (ours, theirs):
            model.train(task == "training step")
        seconds = interleaved(candidates, rounds, warm_up=warm_up)
        memory = {name: float(peak_bytes(candidate)) for name, candidate in candidates.items()}
        found[task] = {"seconds": seconds, "peak_bytes": memory}
        print(
            f"{torch.get_num_threads()} threads, {family}, {label}, {task}: ours {1000 * seconds['ours']:.0f} ms, theirs "
            f"{seconds['theirs'] / seconds['ours']:.2f} times that; memory {memory['theirs'] / memory['ours']:.2f}",
            flush=True,
        )
    return found


def main() -> None:
    arguments = command_line(__doc__.splitlines()[0], "peers", 5, ["peers", "same"])
    results: dict[str, Any] = {}
    if arguments.only == "same":
        for threads in (arguments.threads, 1):
            torch.set_num_threads(threads)
            results[f"{threads} threads"] = {"settings": settings(rounds=arguments.rounds)} | {
                f"{family}, {label}": measure_same(family, label, arguments.rounds)
                for family in ("olmoe", "qwen3_moe")
                for label in TYPES
            }
        Path(arguments.output).with_name("peers_same.json").write_text(json.dumps(results, indent=1) + "\n")
        return
    for threads in (arguments.threads, 1):
        torch.set_num_threads(threads)
        found = {"settings": settings(freed_memory_kept=arguments.freed_memory_kept, rounds=arguments.rounds)}
        results[f"{threads} threads"] = found | {label: measure(label, arguments.rounds) for label in TYPES}
    with open(arguments.output, "w") as file:
        file.write(json.dumps(results, indent=1) + "\n")


def measure(label: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each candidate, and bytes at most."""
    kind = TYPES[label]
    peers = {name: hugging_face(name, *kind) for name in ("olmoe", "qwen3")} | {"deepspeed": deepspeed(*kind)}
    if find_spec("litgpt"):
        peers["litgpt"] = litgpt(*kind)
    candidates = {"ours": ours(*kind), "head": head(*kind), **peers}
    found = interleaved(candidates, rounds, warm_up=3)  # until the heap has grown to its size
    memory = {name: float(peak_bytes(candidate)) for name, candidate in candidates.items() if name != "head"}
    whole, loss = found["ours"], found["head"]
    ratios = ", ".join(
        f"{name} {found[name] / whole:.2f} (without head {(found[name] - loss) / (whole - loss):.2f}, "
        f"memory {memory[name] / memory['ours']:.2f})"
        for name in peers
    )
    print(
        f"{torch.get_num_threads()} threads, {label}: ours {1000 * whole:.0f} ms, head {1000 * loss:.0f}, "
        f"{memory['ours'] / 1e6:.0f} MB; over ours: {ratios}",
        flush=True,
    )
    return {"seconds": found, "peak_bytes": memory}


if __name__ == "__main__":
    main()

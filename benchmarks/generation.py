"""Speed of generation: against Hugging Face's GPT-2, MoE against dense, and the paper's three families against each other.

    python -m benchmarks.generation [--rounds 7] [--only hugging_face|decoding|families] [--widths 128 256 512] [--cpu-time]

    hugging face    greedy text, 64 tokens after 32 or 512, at batch 1, 8 and 32; fp32 and bf16; GPT-2 and OLMoE,
                    with either of its experts, by `generate` of `transformers`; our dense model, and our MoE, with our decoding
                    loop and exported. 64 experts in each block, top-1: as many active parameters in all, and the gates.
                    Uneven: half of the prompts are half as long
    decoding        one token at batch 1, after 64 others: MoE-128 over dense of equal active parameters, by width
    families        standard MoE, PR-MoE and its student: size, memory, time per token at batch 1; the laptop twins, and the
                    shape of the paper's 350M models (128 experts; 32 and 64; 21/24 of the depth) with half the blocks, 256 wide

Models are untrained, and the tokens that are fed to decoding are random ones: a model that repeats itself would find its experts'
weights in the cache. Rounds are interleaved; numbers are medians. `--cpu-time`, with `--threads 1`, is for a machine that
others use too: seconds that this process computed, in place of those that passed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import hugging_face_shape, swiglu_width
from benchmarks.timing import ROOT, interleaved, parse, parser_of, settings
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.eval.generation import generate
from nlgmoe.layers.attention import KVCache
from nlgmoe.model.counting import count_parameters
from nlgmoe.model.gpt import GPT
from nlgmoe.pyramid import student_config

Clock = Callable[[], float]
# Batch and prompt, of the comparison with Hugging Face.
CELLS = ((1, 32), (8, 32), (32, 32), (1, 512), (8, 512), (32, 512))
NEW, EXPERTS = 64, 64
LONGEST = {"OLMoE batched_mm": 1024, "OLMoE grouped_mm": 4096}  # tokens of prompts: longer ones take minutes
CACHED, DECODED = 64, 32  # of decoding: tokens there before, tokens fed one by one in each round


def dense(width: int) -> GPTConfig:
    """6 blocks."""
    return GPTConfig(4096, 128, 6, width, max(2, width // 64))


def moe_128(config: GPTConfig) -> GPTConfig:
    """The same with 128 experts, top-1, in every second block."""
    return replace(config, moe=MoEConfig(128))


def hugging_face_models(config: GPTConfig, ours: GPT, dtype: torch.dtype) -> dict[str, Any]:
    """GPT-2 and OLMoE with as many active parameters as ours, and ours as it is exported.

    OLMoE's experts are SwiGLU networks, three matrices in place of two, and two thirds as wide.
    """
    import transformers

    from nlgmoe.tools.hugging_face.configuration_nlgmoe import NlgmoeConfig
    from nlgmoe.tools.hugging_face.modeling_nlgmoe import NlgmoeForCausalLM

    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    shape = {"n_embd": config.hidden_size, "n_layer": config.num_layers, "n_head": config.num_heads}
    gpt2 = transformers.GPT2Config(vocab_size=config.vocab_size, n_positions=config.seq_len, **shape, **ends)
    olmoe = transformers.OlmoeConfig(
        intermediate_size=swiglu_width(config), **hugging_face_shape(config, EXPERTS), **ends
    )
    exported = NlgmoeForCausalLM(NlgmoeConfig(**ours.config.to_dict(), **ends))
    exported.model.load_state_dict(ours.state_dict())
    models = {"GPT-2": transformers.GPT2LMHeadModel(gpt2), "ours exported": exported}
    for experts in ("grouped_mm", "batched_mm"):
        models[f"OLMoE {experts}"] = transformers.AutoModelForCausalLM.from_config(
            olmoe, attn_implementation="sdpa", experts_implementation=experts
        )
    return {name: model.eval().to(dtype) for name, model in models.items()}


def against_hugging_face(width: int, rounds: int, clock: Clock, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Tokens/s of greedy generation, by batch, prompt and model."""
    base = replace(dense(width), seq_len=max(prompt for _, prompt in CELLS) + NEW)
    ours = {"nlgmoe dense": GPT(base), "nlgmoe MoE": GPT(replace(base, moe=MoEConfig(EXPERTS, expert_interval=1)))}
    ours = {name: model.eval().to(dtype) for name, model in ours.items()}
    theirs = hugging_face_models(base, ours["nlgmoe MoE"], dtype)
    found = []
    print(f"\ngreedy, {NEW} tokens, {width} wide, {EXPERTS} experts in each block, top-1, {dtype}; tokens/s")
    for batch, prompt in CELLS:
        draw = torch.Generator().manual_seed(batch)
        tokens = torch.randint(1, base.vocab_size, (batch, prompt), generator=draw)
        candidates: dict[str, Callable[[], object]] = {
            name: lambda t=tokens, m=model: m.generate(
                t, attention_mask=torch.ones_like(t), max_new_tokens=NEW, do_sample=False, use_cache=True
            )
            for name, model in theirs.items()
            if batch * prompt <= LONGEST.get(name, batch * prompt)
        }
        for name, model in ours.items():
            candidates[name] = lambda t=tokens, m=model: generate(m, t, NEW, temperature=0)
        uneven = [row[: prompt - (prompt // 2) * (index % 2)] for index, row in enumerate(tokens)]
        candidates["nlgmoe MoE, uneven"] = lambda t=uneven: generate(ours["nlgmoe MoE"], t, NEW, temperature=0)
        speed = {
            name: batch * NEW / value for name, value in interleaved(candidates, rounds, warm_up=1, clock=clock).items()
        }
        found.append({"batch": batch, "prompt": prompt, "tokens_per_second": speed})
        shown = ", ".join(f"{name} {value:,.0f}" for name, value in speed.items())
        print(f"batch {batch:>2}, prompt {prompt:>3}: {shown}", flush=True)
    return found


def decoder(model: GPT) -> Callable[[], None]:
    """Feeds `DECODED` tokens one by one after `CACHED`, and takes the most likely next one each time."""
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


def time_per_token(configs: dict[str, GPTConfig], rounds: int, clock: Clock) -> dict[str, float]:
    """Seconds of one token at batch 1, by model."""
    candidates = {name: decoder(GPT(config).eval()) for name, config in configs.items()}
    return {name: value / DECODED for name, value in interleaved(candidates, rounds, clock=clock).items()}


def moe_against_dense(widths: list[int], rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """Seconds per token of both, by width."""
    found = []
    print("\none token at batch 1: MoE-128 over dense of equal active parameters")
    for width in widths:
        configs = {"dense": dense(width), "moe": moe_128(dense(width))}
        seconds = time_per_token(configs, rounds, clock)
        ratio = seconds["moe"] / seconds["dense"]
        active = {name: count_parameters(config).active for name, config in configs.items()}
        found.append({"width": width, "seconds": seconds, "ratio": ratio, "active_parameters": active})
        print(f"{width:>4} wide: {seconds['moe'] * 1e3:6.2f} / {seconds['dense'] * 1e3:6.2f} ms = {ratio:.2f}")
    return found


def families(rounds: int, clock: Clock) -> dict[str, Any]:
    """Size, memory and time of standard MoE, PR-MoE and student, of each shape."""
    from nlgmoe import load_config

    names = {"standard MoE": "moe", "PR-MoE": "pr_moe", "student": "mos"}
    twins = {name: load_config(ROOT / f"configs/{part}/laptop.yaml").module.config for name, part in names.items()}
    base = GPTConfig(4096, 128, 12, 256, 4)
    teacher = replace(base, moe=MoEConfig([32] * 5 + [64], mlp_type="residual"))
    paper = {"standard MoE": moe_128(base), "PR-MoE": teacher, "student": student_config(teacher, 10)}
    found: dict[str, Any] = {}
    for shape, configs in (("laptop twins", twins), ("the 350M models' shape, 12 x 256", paper)):
        seconds = time_per_token(configs, rounds, clock)
        print(f"\n{shape:<34} parameters   active    weights   cache   per token")
        found[shape] = {}
        for name, config in configs.items():
            count = count_parameters(config)
            cache = 2 * 4 * config.num_layers * config.hidden_size * config.seq_len
            row = {
                "parameters": count.total,
                "active_parameters": count.active,
                "weight_bytes": 4 * count.total,
                "cache_bytes_per_sequence": cache,
                "seconds_per_token": seconds[name],
            }
            found[shape][name] = row
            print(
                f"{name:<34} {count.total / 1e6:8.1f}M {count.active / 1e6:7.2f}M {4 * count.total / 1e6:7.0f} MB "
                f"{cache / 1e6:4.1f} MB {seconds[name] * 1e3:7.2f} ms"
            )
    return found


def main() -> None:
    """Measure, print, write."""
    parser = parser_of(__doc__ or "", "generation", 7, ["hugging_face", "decoding", "families"])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512], help="of decoding's models")
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parse(parser)
    clock: Clock = time.process_time if arguments.cpu_time else time.perf_counter
    output = Path(arguments.output)
    result = json.loads(output.read_text()) if arguments.only and output.exists() else {}
    if arguments.only in (None, "hugging_face"):
        result["hugging_face"] = {
            str(dtype): against_hugging_face(256, arguments.rounds, clock, dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }
    if arguments.only in (None, "decoding"):
        result["decoding"] = moe_against_dense(arguments.widths, arguments.rounds, clock)
    if arguments.only in (None, "families"):
        result["families"] = families(arguments.rounds, clock)
    output.write_text(
        json.dumps(
            {**result, "settings": settings(rounds=arguments.rounds, clock="cpu" if arguments.cpu_time else "wall")},
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()

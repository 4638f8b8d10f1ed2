"""Short launches, and their settings."""

from typing import Any

import yaml

from nlgmoe.tools.megatron.from_megatron import translated

NEEDED = (  # by every run
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --num-experts 8 "
    "--micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --lr-decay-style cosine --lr-decay-tokens 25600 "
    "--train-iters 100 --data-path corpus --save mine --save-interval 50 "
    "--vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt"
)


def get(settings: dict[str, Any], path: str) -> Any:
    for part in path.split("."):
        settings = settings[int(part) if part.isdigit() else part]
    return settings


def launched(flags: str, launcher: str = "deepspeed --num_gpus 4") -> list[str]:
    return f"{launcher} pretrain_gpt.py {NEEDED} {flags}".split()


def settings_of(launch: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(translated(launch))
    return settings

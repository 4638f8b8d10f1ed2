"""Compare an imported model with `transformers` on real weights: logits of a text, and its perplexity.

python -m benchmarks.open_moe NAME_OR_FOLDER CHECKPOINT [--text FILE] [--tokens 2048]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from nlgmoe import load_pretrained


@torch.no_grad()
def main() -> None:
    """Print the largest difference of logits, and both perplexities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, default=Path("README.md"))
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    loaded = load_pretrained(arguments.checkpoint)
    limit = min(arguments.tokens, loaded.model.config.seq_len)
    ids = torch.tensor([loaded.tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[:limit]])
    ours = loaded.model.logits(loaded.model(ids).hidden).float()
    del loaded
    theirs = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=torch.float32)(ids).logits
    perplexities = [float(F.cross_entropy(logits[0, :-1], ids[0, 1:]).exp()) for logits in (ours, theirs)]
    print(f"{ids.shape[1]:,} tokens; largest difference of logits {float((ours - theirs).abs().max()):.2e}")
    print(f"perplexity {perplexities[0]:.4f}, by transformers {perplexities[1]:.4f}")


if __name__ == "__main__":
    main()

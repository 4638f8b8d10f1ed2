"""Write a tiny OLMoE with random weights, in the format of `transformers`, to try docs/open_moes.md on.

python docs/examples/tiny_olmoe.py FOLDER
"""

import sys
from pathlib import Path

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from nlgmoe.data.tokenizer_loading import load_tokenizer

folder = Path(sys.argv[1])
tokenizer = load_tokenizer("pocket-1k", Path("data/pocket_pile"))
torch.manual_seed(0)
config = OlmoeConfig(
    vocab_size=tokenizer.vocab_size,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,  # llama.cpp's OLMoE has no grouped queries
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    pad_token_id=None,
    eos_token_id=tokenizer.eod_id,
)
OlmoeForCausalLM(config).save_pretrained(folder)
(folder / "tokenizer.json").write_text(tokenizer.files["tokenizer.json"])
print(f"{folder}: an OLMoE of {sum(p.numel() for p in OlmoeForCausalLM(config).parameters()):,} parameters")

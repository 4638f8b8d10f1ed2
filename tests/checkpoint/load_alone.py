"""Uses exported folders as someone does who has `transformers` and nothing of ours: a script, run by test_hugging_face.py.

python load_alone.py FOLDER ...
"""

import json
import sys

for ours in ("nlgmoe", "lightning", "pytorch_lightning", "deepspeed"):
    sys.modules[ours] = None  # to whoever imports it, or looks whether it could, it is not installed

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

PROMPTS = ["the king", "the queen and the king and", "a"]


def use(folder: str) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.generation_config.eos_token_id = None  # so that all texts have one length
    results = {"prompts": PROMPTS, "logits": model(torch.arange(24).view(2, 12)).logits.tolist()}
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    for way, cached in {"greedy": True, "uncached": False}.items():
        new = model.generate(**batch, use_cache=cached, max_new_tokens=8, do_sample=False)
        results[way] = new[:, batch.input_ids.shape[1] :].tolist()
    return results


print(json.dumps({folder: use(folder) for folder in sys.argv[1:]}))

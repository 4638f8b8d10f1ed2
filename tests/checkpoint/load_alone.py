"""Uses exported folders as someone does who has `transformers` and nothing of ours: a script, run by test_hugging_face.py.

python load_alone.py RESULTS.json FOLDER ...
"""

import json
import sys
from pathlib import Path

for ours in ("nlgmoe", "lightning", "pytorch_lightning", "deepspeed"):
    sys.modules[ours] = None  # to whoever imports it, or looks whether it could, it is not installed

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

PROMPTS = ["the king", "the queen and the king and", "a"]


def use(folder: str) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.generation_config.eos_token_id = None  # so that all texts have one length
    found = {
        "prompts": PROMPTS,
        "class": type(model).__module__,
        "logits": model(torch.arange(24).view(2, 12)).logits.tolist(),
    }
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    for way, settings in {"greedy": {}, "uncached": {"use_cache": False}, "beams": {"num_beams": 3}}.items():
        settings = {"max_new_tokens": 8, "do_sample": False, **settings}
        together = model.generate(**batch, **settings)[:, batch.input_ids.shape[1] :]
        for prompt, new in zip(PROMPTS, together, strict=True):
            alone = tokenizer(prompt, return_tensors="pt")
            assert model.generate(**alone, **settings)[0, alone.input_ids.shape[1] :].equal(new), (way, prompt)
        found[way] = together.tolist()
    again = f"{folder}-again"
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), reloaded.state_dict().values(), strict=True))
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    found["bf16"] = half(torch.arange(24).view(2, 12)).logits.float().tolist()
    return found


results = {folder: use(folder) for folder in sys.argv[2:]}
Path(sys.argv[1]).write_text(json.dumps(results))

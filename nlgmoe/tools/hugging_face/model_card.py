"""The model card of an exported folder, `README.md`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.model.counting import count_parameters
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.versions import versions

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

{kind}, exported by nlgmoe {version}.

| | |
|---|---|
{rows}

{code}```python
from transformers import AutoModelForCausalLM{import_tokenizer}

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
{use}
```

`nlgmoe import {name} {name}.ckpt` converts it to a checkpoint of nlgmoe.

Before you publish the model, add its training data, intended use and the licence of its weights here.
"""
_WITH_TOKENIZER = """tokenizer = AutoTokenizer.from_pretrained("{name}", padding_side="left"{padding}{trust})
prompts = tokenizer(["The king", "It was a dark night, and"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**prompts, max_new_tokens=40, do_sample=True, top_k=40)))"""
_OWN_CODE = """The model's code is in this folder: files of nlgmoe (Apache-2.0) that need only `torch` and `transformers`.
`trust_remote_code=True` allows them to run.

"""
_WITHOUT = "# The checkpoint had no tokenizer: the model reads and writes token ids."


def model_card(
    name: str,
    document: dict[str, Any],
    with_tokenizer: bool,
    family: str | None = None,
    padding: str | None = None,
) -> str:
    """Format the card of the folder `name`.

    Args:
        name: the folder's.
        document: the checkpoint's.
        with_tokenizer: whether the folder has a tokenizer.
        family: the family whose format the folder has; None: it has the model's code.
        padding: token that pads prompts, if the tokenizer's settings name none.
    """
    config = GPTConfig.from_dict(document["model_config"])
    count, moe = count_parameters(config), config.moe
    rows = {
        "parameters": f"{count.total:,}",
        "active parameters per token": f"{count.active:,}",
        "blocks, width, heads": f"{config.num_layers}, {config.hidden_size}, {config.num_heads}",
        "longest sequence": f"{config.seq_len:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
    }
    if moe is not None:
        residual = ", each beside a shared expert" if moe.mlp_type == "residual" else ""
        rows["experts per block (0: dense)"] = ", ".join(map(str, experts_per_layer(config)))
        rows["experts per token"] = f"{moe.top_k}{residual}"
    if document["tokens_seen"]:
        clock = f"{document['tokens_seen']:,} tokens, {document['global_step']:,} steps"
        # A card is published: of the path to the checkpoint it has the run's folder alone.
        start = "/".join(Path(document.get("started_from", "")).parts[-3:])
        rows["trained on"] = f"{clock}, from the weights of {start}" if start else clock
    trust = "" if family else ", trust_remote_code=True"
    named = "" if padding is None else f", pad_token={json.dumps(padding)}"
    return _CARD.format(
        name=name,
        kind="A mixture-of-experts language model" if moe is not None else "A GPT",
        tags="nlgmoe, mixture-of-experts" if moe is not None else "nlgmoe",
        version=versions()["nlgmoe"],
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        import_tokenizer=", AutoTokenizer" if with_tokenizer else "",
        trust=trust,
        code="" if family else _OWN_CODE,
        use=_WITH_TOKENIZER.format(name=name, trust=trust, padding=named) if with_tokenizer else _WITHOUT,
    )

"""What the reader of an exported folder must know: its model card (README.md), and limits of other programs with it.

Named are programs that refuse our code, compute another model, or refuse our tokenizers; docs/open_moes.md has the versions
that were tried.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.model.counting import count_parameters
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.versions import versions

_OLMOE_EPS = 1e-5  # which llama.cpp's converter writes, whatever config.json says
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
    checkpoint: Path,
    document: dict[str, Any],
    with_tokenizer: bool,
    family: str | None = None,
    padding: str | None = None,
) -> str:
    """Format the card of the folder `name`.

    Args:
        name: the folder's.
        checkpoint: the exported checkpoint.
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
    summary = _summary_of(checkpoint, document, count.total)
    if summary.get("val_loss") is not None:
        rows["last validation of its run"] = f"{summary['val_loss']:.3f} nats per token"
    measured = {name: bits for name, bits in summary.get("bits_per_byte", {}).items() if bits is not None}
    for domain, bits in measured.items():
        rows["bits per byte of validation text" if domain == "all" else f"bits per byte, {domain}"] = f"{bits:.2f}"
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


def _summary_of(checkpoint: Path, document: dict[str, Any], size: int) -> dict[str, Any]:
    """Return `summary.json` of the run that ended with this checkpoint; empty if it is another's, or cannot be read.

    A pruned checkpoint in the run's folder is of as many tokens, but of another `size`, its number of parameters.
    """
    try:
        summary = json.loads((checkpoint.parents[1] / "summary.json").read_text(encoding="utf-8"))
        return summary if (summary["tokens"], summary["params_total"]) == (document["tokens_seen"], size) else {}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


def client_limits(config: GPTConfig, family: str | None, own_tokenizer: bool) -> Iterator[str]:
    """Yield a line for each limit that concerns the exported model; `own_tokenizer`: no published model's."""
    moe = config.moe
    if family is None:
        yield "llama.cpp, vLLM and mlx-lm refuse the folder: they take no model with code of its own"
        return
    if moe is not None and (family, moe.normalizes) in (("olmoe", True), ("qwen3_moe", False)):
        value = str(moe.normalizes).lower()
        yield f"llama.cpp computes another model: for {family} it ignores norm_topk_prob={value}"
    if family == "olmoe" and config.layer_norm_eps != _OLMOE_EPS:
        yield f"llama.cpp computes another model: for olmoe it ignores rms_norm_eps={config.layer_norm_eps}"
    if config.rotary_scaling is not None and family in ("minimax_m2", "mixtral", "qwen3_moe"):
        yield f"mlx-lm computes another model: for {family} it ignores scaled positions"
    if own_tokenizer:
        yield "llama.cpp converts tokenizers of published models alone; docs/open_moes.md has a remedy"

"""Models of other families in the format of `transformers`: their settings and the names of their weights.

    llama.py      Llama's block, dense or with a softmax router
    deepseek.py   DeepSeek's families, and those that took over its mixtures
    gpt2.py       GPT-2: the paper's block, dense; import only

A family is a `Family` (`family.py`), and an item of `FAMILIES`. `tensors.py` has the table of tensors for both directions,
`settings.py` what families share of their settings. tests/equivalence/test_open_moes.py compares logits, gradients and generation
with the classes of `transformers`.
"""

from __future__ import annotations

from nlgmoe.config import GPTConfig
from nlgmoe.tools.hugging_face.families import deepseek, llama
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.gpt2 import GPT2
from nlgmoe.validation import SettingError

OWN = "nlgmoe"  # `model_type` of a folder with our code
_ALL = (
    *(llama.OLMOE, llama.QWEN3_MOE, llama.MIXTRAL, llama.QWEN2_MOE),
    *(deepseek.DOTS1, deepseek.GLM4_MOE, deepseek.DEEPSEEK_V3, deepseek.GLM4_MOE_LITE, deepseek.DEEPSEEK_V2),
    *(deepseek.MINIMAX_M2, llama.GRANITE_MOE, llama.GRANITE_MOE_SHARED, llama.LLAMA, llama.QWEN3, llama.GRANITE, GPT2),
)
FAMILIES = {family.name: family for family in _ALL}
"""In the order in which an export chooses."""


def _exported() -> dict[str, Family]:
    return {name: family for name, family in FAMILIES.items() if family.write is not None}


def family_of(config: GPTConfig, preferred: str | None = None) -> tuple[str | None, str]:
    """Return the name of the family whose class computes the same as a model in evaluation; or None, and the reason.

    The `preferred` one is tried first.
    """
    nearest: tuple[int, str] | None = None
    refusal = ""
    for family in sorted(_exported().values(), key=lambda family: family.name != preferred):
        try:
            differing = family.differences(config)
        except ValueError as error:  # its reader or writer refuses the model
            refusal = refusal or f"{error} (for {family.name})"
            continue
        if not differing:
            return family.name, ""
        if nearest is None or len(differing) < nearest[0]:
            nearest = len(differing), f"{', '.join(differing)} (the nearest family is {family.name})"
    return None, refusal if nearest is None else nearest[1]


def chosen_family(config: GPTConfig, name: str | None, preferred: str | None = None) -> tuple[str | None, str]:
    """Return what `family_of` does, or the family `name`, which must compute the model; `nlgmoe`: None, for our own code."""
    if name is None:
        return family_of(config, preferred)
    if name == OWN:
        return None, ""
    if name not in _exported():
        raise SettingError(f"family={name} cannot be exported; supported are {', '.join((OWN, *_exported()))}")
    try:
        differing = ", ".join(FAMILIES[name].differences(config))
    except ValueError as error:
        differing = str(error)
    if differing:
        raise SettingError(f"family={name} does not compute a model with {differing}; leave it out, or use {OWN}")
    return name, ""

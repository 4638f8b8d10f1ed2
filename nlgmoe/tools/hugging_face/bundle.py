"""Source files of an exported model, in the form that `transformers` loads: flat files with relative imports.

    nlgmoe/layers/router.py           nlgmoe_layers_router.py
    from nlgmoe.config import X       from .nlgmoe_config import X

`transformers` copies `modeling_nlgmoe.py` and the files that it imports by `from .x import` into a package; it does not follow
folders (`dynamic_module_utils.py`, 5.24). The files are found by their imports, and need only torch and `transformers`
(`tests/checkpoint/load_alone.py`). The configuration imports the parts that the model names (`bundled_parts`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nlgmoe
from nlgmoe.config import GPTConfig
from nlgmoe.parts import MODEL_PARTS
from nlgmoe.versions import versions

HERE = "nlgmoe.tools.hugging_face"
MODEL, CONFIGURATION = "modeling_nlgmoe", "configuration_nlgmoe"
_ROOT = Path(nlgmoe.__file__).parents[1]
_IMPORT = re.compile(r"^(\s*)from (nlgmoe\.[\w.]+) import\b", re.MULTILINE)


def bundled_parts(config: GPTConfig) -> dict[str, Any]:
    """Return the parts of a model, by the names of `PARTS`, whose code a folder may contain: attention and scaling of nlgmoe's.

    Routers are none of them, because a folder has no buffers.
    """
    parts = {name: getattr(config, name) for name in MODEL_PARTS}
    return {name: part for name, part in parts.items() if type(part).__module__.startswith("nlgmoe.")}


def bundled_sources(config: GPTConfig) -> dict[str, str]:
    """Return file names and texts of a model's module and of all project modules that it imports."""
    classes = [type(part) for part in bundled_parts(config).values()]
    named = "".join(f"\nfrom {kind.__module__} import {kind.__name__}  # in config.json\n" for kind in classes)
    sources: dict[str, str] = {}
    queue = [f"{HERE}.{MODEL}"]
    while queue:
        module = queue.pop()
        name = f"{flat_name(module)}.py"
        if name not in sources:
            file = f"{module.replace('.', '/')}.py"
            text = (_ROOT / file).read_text(encoding="utf-8") + named * (module == f"{HERE}.{CONFIGURATION}")
            queue += [match[2] for match in _IMPORT.finditer(text)]
            sources[name] = (
                f"# {file} of nlgmoe {versions()['nlgmoe']}, copied by `nlgmoe export`; only its imports differ.\n"
                "# SPDX-License-Identifier: Apache-2.0\n"
            ) + _IMPORT.sub(lambda m: f"{m[1]}from .{flat_name(m[2])} import", text)
    return sources


def flat_name(module: str) -> str:
    """Return a module's name in an exported folder; modules of this package keep their own name."""
    return module.rpartition(".")[2] if module.startswith(f"{HERE}.") else module.replace(".", "_")

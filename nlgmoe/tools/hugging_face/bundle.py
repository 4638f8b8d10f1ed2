"""Our sources as `transformers` loads a model's own code: flat files beside the weights that import each other relatively.

    nlgmoe/layers/router.py           nlgmoe_layers_router.py
    from nlgmoe.config import X       from .nlgmoe_config import X

`transformers` copies `modeling_nlgmoe.py` and, looking for `from .x import`, what that imports, into a package of its own; it
follows no folders (`dynamic_module_utils.py`, 5.24). Which files are needed is read off their imports. They need torch and
`transformers` alone.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nlgmoe
from nlgmoe.versions import versions

HERE = "nlgmoe.tools.hugging_face"
MODEL, CONFIGURATION = "modeling_nlgmoe", "configuration_nlgmoe"
_ROOT = Path(nlgmoe.__file__).parents[1]
_IMPORT = re.compile(r"^(\s*)from (nlgmoe\.[\w.]+) import\b", re.MULTILINE)


def bundled_sources() -> dict[str, str]:
    """File -> text of everything that the exported model imports of ours."""
    found: dict[str, str] = {}
    waiting = [f"{HERE}.{MODEL}"]
    while waiting:
        module = waiting.pop()
        name = f"{flat_name(module)}.py"
        if name not in found:
            text = (_ROOT / f"{module.replace('.', '/')}.py").read_text()
            needed = _imports_of_ours(text, module)
            waiting += needed
            found[name] = _header(module) + _IMPORT.sub(lambda m: f"{m[1]}from .{flat_name(m[2])} import", text)
    return found


def flat_name(module: str) -> str:
    """Name of a module of ours in an exported folder; those that are made for it keep theirs."""
    return module.rpartition(".")[2] if module.startswith(f"{HERE}.") else module.replace(".", "_")


def _header(module: str) -> str:
    file, version = f"{module.replace('.', '/')}.py", versions()["nlgmoe"]
    return (
        f"# {file} of nlgmoe {version}, copied by `nlgmoe export`; only its imports are others.\n"
        "# SPDX-License-Identifier: Apache-2.0\n"
    )


def _imports_of_ours(text: str, module: str) -> list[str]:
    """Modules of ours that a source imports, all of which `_IMPORT` finds."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "nlgmoe":
            found.append(str(node.module))
        elif isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "nlgmoe" for alias in node.names), (
                f"{module}: import names from it"
            )
    assert sorted(found) == sorted(match[2] for match in _IMPORT.finditer(text)), f"{module} imports in another way"
    return found

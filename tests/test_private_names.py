"""Each private name of another library that the package uses is in `nlgmoe/private_names.yaml`, and in the installed release."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import nlgmoe

ROOT = Path(nlgmoe.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = [ast.parse(file.read_text()) for file in FILES]
PUBLIC = {"_replace", "_exit"}  # of Python, documented
PRIVATE = re.compile(r"_[a-zA-Z]\w*")
LIST = yaml.safe_load((ROOT / "private_names.yaml").read_text())
NAMES = [(owner, name) for owner, entries in LIST.items() for names in entries for name in names.split()]


@pytest.mark.parametrize(("owner", "name"), NAMES)
def test_private_name_exists_and_is_used(owner: str, name: str) -> None:
    assert any(re.search(rf"\b{name}\b", file.read_text()) for file in FILES)
    module_name, _, class_name = owner.partition(":")
    module = importlib.import_module(module_name)
    holder = getattr(module, class_name, module) if class_name else module
    if not hasattr(holder, name) and not re.search(rf"\.{name}\b", inspect.getsource(holder)):  # set in its code
        importlib.import_module(f"{module_name}.{name}")


def test_private_names_are_all_listed() -> None:
    """A private name that no module of the package defines, or that it overrides, belongs to another library."""
    own = {name for tree in TREES for name in defined(tree)}
    found = {name for tree in TREES for name in used(tree) if PRIVATE.fullmatch(name)}
    listed = {word for owner, name in NAMES for word in (*re.split(r"[:.]", owner), name)}
    assert found - own - PUBLIC <= listed, "add them to nlgmoe/private_names.yaml, or use a public way"


def test_lightnings_private_state_is_read_and_set_in_one_file() -> None:
    """Elsewhere private methods are overridden, and then call the base class's; the planner replaces what it lists."""
    private = {name for owner, name in NAMES if owner.startswith("lightning.")} | {"fit_loop", "val_check_batch"}
    for file, tree in zip(FILES, TREES, strict=True):
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        found = (private & set(used(tree))) - functions - set(mocked(tree))
        assert not found or file.name == "lightning_state.py", f"{file}: {found}"


def defined(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines: functions, classes, variables, and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not overrides(node):
            yield node.name
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and getattr(node.value, "id", "") == "self"
        ):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def used(tree: ast.Module) -> Iterator[str]:
    """Names that a module reads as attributes, imports, gives to `getattr` or `vars`, overrides, or replaces by a mock."""
    yield from mocked(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef) and overrides(node):
            yield node.name
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("nlgmoe"):
            yield from (*str(node.module).split("."), *(alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            yield str(getattr(node.args[1], "value", ""))
        elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.value, ast.Call):
            yield str(getattr(node.slice, "value", ""))


def mocked(tree: ast.Module) -> Iterator[str]:
    """Names that `mock.patch.object` replaces."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("patch.object"):
            yield str(getattr(node.args[1], "value", ""))


def overrides(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any(getattr(decorator, "id", "") == "override" for decorator in node.decorator_list)

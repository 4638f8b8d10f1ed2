"""The shape of the house: imports go downwards, and what is not needed is not imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nlgmoe

ROOT = Path(nlgmoe.__file__).parent

# A module may import modules of its own rank or below. `data` and `optim` stand beside `model`.
RANKS = {
    "seeding": 0,
    "device": 0,
    "versions": 0,
    "parts": 0,
    "config": 0,
    "batch": 0,
    "whole_file": 0,
    "processes": 0,
    "regular_file": 0,
    "pyramid": 1,
    "layers": 2,
    "model": 3,
    "optim": 3,
    "data": 3,
    "checkpoint": 4,
    "non_finite": 4,
    "distill": 5,
    "parallel": 5,
    "eval": 5,
    "hugging_face": 5,
    "resuming": 5,
    "module": 6,
    "megatron": 6,
    "callbacks": 7,
    "loggers": 7,
    "report": 7,
    "cli": 8,
    "__main__": 9,
}
BESIDE = {"optim", "data"}  # know the configuration and the seeds, but none of the model


def imported_parts(file: Path) -> set[str]:
    """First-level names inside nlgmoe that `file` imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: use absolute imports"
            names = [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("nlgmoe.")}
    return found


def part_of(file: Path) -> str:
    relative = file.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


FILES = [file for file in sorted(ROOT.rglob("*.py")) if file != ROOT / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_downwards(file: Path) -> None:
    here = part_of(file)
    for other in imported_parts(file):
        assert RANKS[other] <= RANKS[here], f"{file.name} ({here}) imports {other}, which stands above it"
        if here in BESIDE and other != here:
            assert RANKS[other] <= RANKS["config"], f"{here} stands beside the model and must not import {other}"


def test_only_parallel_imports_deepspeed() -> None:
    users = {
        part_of(file)
        for file in FILES
        if "import deepspeed" in file.read_text() or "from deepspeed" in file.read_text()
    }
    assert users <= {"parallel"}


def names_an_accelerator(file: Path) -> Iterator[int]:
    """Lines whose code, not its documentation, is about one kind of accelerator."""
    tree = ast.parse(file.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts
        if (text and "cuda" in node.value) or (isinstance(node, ast.Attribute) and "cuda" in node.attr):
            yield node.lineno


def test_one_file_knows_devices() -> None:
    """A branch on a device's name would not run in `tests/accelerator/`. Beside it the experts ask which kernel their GPU has."""
    known = {ROOT / "device.py", ROOT / "layers" / "experts.py"}
    found = {
        f"{file.relative_to(ROOT)}:{line}" for file in FILES if file not in known for line in names_an_accelerator(file)
    }
    assert not found
    assert all(list(names_an_accelerator(file)) for file in known)


def test_layers_need_torch_alone() -> None:
    for file in (ROOT / "layers").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                top = str(name).split(".")[0]
                assert top in {"torch", "nlgmoe"} or top in sys.stdlib_module_names, f"{file.name} imports {name}"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_nlgmoe_imports_neither_torch_nor_deepspeed() -> None:
    assert (
        run("import sys, nlgmoe; print([m for m in ('torch', 'deepspeed', 'lightning') if m in sys.modules])") == "[]\n"
    )


def test_training_on_one_process_never_imports_deepspeed() -> None:
    code = """
import sys
from lightning import Trainer
from nlgmoe import GPTConfig, MoEConfig, MoEGPTModule, load_config, PileDataModule
from tests.synthetic import SyntheticData
module = MoEGPTModule(GPTConfig(61, 16, 2, 16, 2, moe=MoEConfig(4)))
trainer = Trainer(max_steps=1, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                  enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0)
trainer.fit(module, SyntheticData())
try:
    from nlgmoe.cli.train import main
    main(["fit", "--help"])
except SystemExit:
    pass
print("deepspeed" in sys.modules)
"""
    assert run(code).endswith("False\n")


def test_public_names_resolve() -> None:
    for name in nlgmoe.__all__:
        assert getattr(nlgmoe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nlgmoe.nothing

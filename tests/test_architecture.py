"""The shape of the house: imports go downwards, and what is not needed is not imported."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest

import nlgmoe

ROOT = Path(nlgmoe.__file__).parent

# A module may import modules of its own line or of those above it. `data` and `optim` stand beside `model`.
LINES = """
seeding process device hardware versions parts config without_effect batch files ranks roles validation lightning_state
pyramid
layers
model optim data
checkpoint non_finite
surgery
distill parallel eval
run
loss step module
callbacks
cli
experiment
tools
commands
__main__
"""
RANKS = {name: rank for rank, line in enumerate(LINES.strip().splitlines()) for name in line.split()}
BESIDE = {"optim", "data"}  # know the configuration and the seeds, but none of the model


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: use absolute imports"
            yield str(node.module)


def part_of(file: Path) -> str:
    relative = file.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


FILES = [file for file in sorted(ROOT.rglob("*.py")) if file != ROOT / "__init__.py"]


def test_imports_go_downwards() -> None:
    for file in FILES:
        here = part_of(file)
        for other in {name.split(".")[1] for name in imported(file) if name.startswith("nlgmoe.")}:
            assert RANKS[other] <= RANKS[here], f"{file} ({here}) imports {other}, which stands above it"
            if here in BESIDE and other != here:
                assert RANKS[other] <= RANKS["config"], f"{file}: {here} stands beside the model, and imports {other}"


def test_picture_of_the_architecture_has_these_levels() -> None:
    picture = (ROOT.parent / "docs/architecture.svg").read_text().partition("<!-- one optimizer step -->")[0]
    heights = {
        name: int(y)
        for y, text in re.findall(r'<text x="\d+" y="(\d+)">(.*)</text>', picture)
        for name in re.findall(r"(\w+)(?:/|\.py)", text.partition("<tspan")[0])
    }
    assert heights.keys() == RANKS.keys() - {"__main__"}
    lines = [{heights[name] for name in line.split()} for line in LINES.strip().splitlines()[:-1]]
    assert all(min(lower) > max(upper) for lower, upper in pairwise(lines))


# Package -> the parts that may import it.
USERS = {"deepspeed": {"parallel", "tools"}, "plotly": {"tools"}, "lm_eval": {"tools"}}


@pytest.mark.parametrize("package", USERS)
def test_optional_packages_are_imported_by_their_users_alone(package: str) -> None:
    pattern = re.compile(rf"^\s*(import|from) {package}\b|import_module\([\"']{package}", re.MULTILINE)
    assert {part_of(file) for file in FILES if pattern.search(file.read_text())} == USERS[package]


def names_an_accelerator(file: Path) -> Iterator[int]:
    """Yield the lines whose code, not its documentation, is about one kind of accelerator."""
    tree = ast.parse(file.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    with_text = [node for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)]
    texts = {id(node.body[0].value) for node in with_text}
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts
        if (text and "cuda" in node.value) or (isinstance(node, ast.Attribute) and "cuda" in node.attr):
            yield node.lineno


def test_devices_are_known_to_one_file() -> None:
    """A branch on a device's name would not run in `tests/accelerator/`. The experts ask for a kernel, the router for TF32."""
    known = {ROOT / "layers" / "grouped_gemm.py", ROOT / "layers" / "precision.py"}
    assert {file for file in FILES if any(names_an_accelerator(file))} == known


def test_layers_need_torch_alone() -> None:
    for file in (ROOT / "layers").rglob("*.py"):
        packages = {name.partition(".")[0] for name in imported(file)}
        assert packages <= {"torch", "nlgmoe"} | sys.stdlib_module_names, file.name


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        (["--help"], ("torch", "lightning", "deepspeed", "jsonargparse")),
        (["--version"], ("torch", "lightning", "deepspeed")),
        (["verify", "--help"], ("lightning", "deepspeed", "datasets", "transformers", "lm_eval", "plotly")),
    ],
    ids=" ".join,
)
def test_a_command_imports_what_it_needs(command: list[str], absent: tuple[str, ...]) -> None:
    code = (
        "import sys, nlgmoe\nassert 'torch' not in sys.modules\nfrom nlgmoe.commands.main import main\n"
        f"try: main({command})\nexcept SystemExit: pass\nassert not {set(absent)} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_public_names_resolve() -> None:
    for name in nlgmoe.__all__:
        assert getattr(nlgmoe, name) is not None
    imports = [
        node for node in ast.walk(ast.parse(Path(nlgmoe.__file__).read_text())) if isinstance(node, ast.ImportFrom)
    ]
    typed = {name.name for node in imports if str(node.module).startswith("nlgmoe.") for name in node.names}
    assert typed == {*nlgmoe.__all__, "__version__"} <= {*dir(nlgmoe)}  # what a type checker and a notebook see
    assert nlgmoe.__version__ == metadata.version("nlgmoe")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nlgmoe.nothing

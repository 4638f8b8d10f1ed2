"""The notebooks run from top to bottom, use what is public, and can be read anywhere."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync

from nlgmoe.commands.main import main
from notebooks.execute import FOLDER, parameters_cell, run, with_parameters

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SIX_LAYERS = {
    **{"model__config__hidden_size": 32, "model__config__seq_len": 32, "model__config__num_heads": 2},
    **{"data__micro_batch_size": 2, "data__max_eval_windows": 2},
    **{"trainer__log_every_n_steps": 1, "trainer__enable_progress_bar": False},
}
TINY = SIX_LAYERS | {"model__config__num_layers": 2, "model__config__moe__num_experts": [4]}
DOCUMENTS = {"data__document_attention": True, "data__mask_eod_loss": True}  # changes what is computed, or counted
CHECKS = {  # of its variables, after a notebook
    "02_routing": """
for layer in range(layers):
    analysis = analyse(study.trace, layer)
    shares = np.bincount(analysis.domain, minlength=len(facts.domains)) / study.trace.num_tokens
    use = np.nan_to_num(analysis.by_domain).T @ shares
    assert np.allclose(experts[experts["layer"] == layer]["use"], use)
""",
    "03_mixture_of_students": """
summary = json.loads(Path(TEACHER, "summary.json").read_text())
assert abs(rows["teacher"][0] - summary["val_loss"]) < 1e-5 and rows["teacher"][2] == summary["params_total"]
""",
    "06_experts": """
assert len(experts) == sum(counts) and experts["contribution"].notna().sum() == counts[layer]
""",
    "05_real_model": """
assert distances.max() < 1e-6 and np.allclose(losses(mixture), loss, rtol=1e-5)  # copies
""",
}
DEEPER = TINY | {"model__config__num_layers": 4, "model__config__moe__num_experts": [2, 4]}


def parameters(name: str, data: Path, runs: Path) -> dict[str, Any]:
    """Tiny values for the notebook `name`: 8 steps of 64 tokens."""
    if name == "05_real_model":
        dense, mixture = str(runs / "cut.ckpt"), str(runs / "mixture.ckpt")
        main(["import", str(FOLDER.parent / "tests/real/smollm2_cut.gguf"), dense])
        main(["upcycle", dense, mixture, "--num-experts=4", "--expert-interval=2", "--top-k=2"])
        return {"MODEL": dense, "MIXTURE": mixture}
    values = {"DATA": str(data), "TOKENS": 512}
    if name == "01_first_prmoe":
        return values | {"RUN": str(runs / "first"), "SETTINGS": DEEPER, "PROMPTS": ["The", "In the year"]}
    if name == "02_routing":
        settings = DEEPER | DOCUMENTS | {"trainer__callbacks": [], "model__config__moe__top_k": 2}
        return values | {"RUN": str(runs / "routing"), "SETTINGS": settings, "WINDOWS": 4}
    if name == "04_laboratory":
        return values | {"RUNS": str(runs / "laboratory"), "SETTINGS": SIX_LAYERS | DOCUMENTS}
    if name == "06_experts":
        settings = DEEPER | DOCUMENTS | {"trainer__callbacks": []}
        return values | {"SOURCE": str(runs / "experts"), "SETTINGS": settings, "WINDOWS": 4}
    students = {"RUNS": str(runs / "students"), "TEACHER_TOKENS": 512, "WINDOWS": 2}
    settings = TINY | DOCUMENTS | {"model__distiller__init_args__beta": 0.5}
    return values | students | {"TEACHER_SETTINGS": DEEPER | DOCUMENTS, "SETTINGS": settings}


@pytest.fixture(scope="module")
def kernel() -> Iterator[AsyncKernelManager]:
    """One process for all: importing torch and Lightning takes longer than the notebooks do."""
    manager = AsyncKernelManager(kernel_name="python3")
    yield manager
    if manager.has_kernel:
        run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(
    path: Path, kernel: AsyncKernelManager, pocket_pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))  # the package that is tested
    notebook = nbformat.read(path, as_version=4)
    values = parameters(path.stem, pocket_pile, tmp_path)
    assignments = ast.parse(notebook.cells[parameters_cell(notebook)].source).body
    assert set(values) <= {target.id for node in assignments for target in node.targets}  # type: ignore[attr-defined]
    notebook = with_parameters(notebook, values)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # of the notebook before
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS.get(path.stem, "")))
    outputs = [output for cell in run(notebook, kernel).cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= sum(cell.source.count("plt.subplots") for cell in notebook.cells) >= 1
    warned = [output.text for output in outputs if output.get("name") == "stderr" and "Warning" in output.text]
    assert not warned
    assert path.stem == "05_real_model" or list(tmp_path.rglob("summary.json"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_no_paths_of_a_machine_and_no_errors(path: Path) -> None:
    text = path.read_text()
    lines = text.replace("\\n", " ")  # as JSON writes the ends of lines
    assert not re.findall(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|Users)/", lines)
    assert len(text) < 300_000
    nbformat.validate(nbformat.read(path, as_version=4))
    assert '"output_type": "error"' not in text and "\\u001b" not in text

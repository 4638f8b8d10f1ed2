"""Run the notebooks and keep what they show: `python notebooks/execute.py [NOTEBOOK ...]`, or `make notebooks` for 01 to 04.

Pictures and texts are kept, progress bars and times are not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
# tqdm's bars, "[00:02<00:10", and the blanks that it writes over them
_PROGRESS = re.compile(r"^.*\[\d\d:\d\d<.*\n?|\x1b\[A|^ +\r\n?", re.MULTILINE)


def parameters_cell(notebook: NotebookNode) -> int:
    """Number of the one cell with the tag `parameters`, as papermill has it."""
    (number,) = [number for number, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    return int(number)


def with_parameters(notebook: NotebookNode, values: Mapping[str, Any]) -> NotebookNode:
    """Put a cell with other values after the parameters, as papermill does."""
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(parameters_cell(notebook) + 1, cell)
    return notebook


def run(notebook: NotebookNode, kernel: Any = None) -> NotebookNode:
    """Run all cells, in the notebooks' folder.

    Args:
        notebook: gets the outputs.
        kernel: a manager of one that runs, with variables of whatever was run in it before; None: a new one.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    NotebookClient(
        notebook,
        km=kernel,
        timeout=None,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = _PROGRESS.sub("", output.text)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("text", "kept").strip()]
    return notebook


def main() -> None:
    """Run notebooks in place: those named, or all."""
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(FOLDER.glob("*.ipynb")):
        print(f"{path.name} ...", flush=True)
        notebook = run(nbformat.read(path, as_version=4))
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e3:,.0f} kB", flush=True)


if __name__ == "__main__":
    main()

"""The files of `nlgmoe.data` build on each other in one direction, also where an import stands in a function."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import nlgmoe.data

ROOT = Path(nlgmoe.data.__file__).parent


def test_no_file_of_the_data_imports_one_that_imports_it() -> None:
    graph: dict[str, set[str]] = {}
    for file in ROOT.rglob("*.py"):
        if file.name != "__init__.py":
            name = ".".join(("nlgmoe.data", *file.relative_to(ROOT).with_suffix("").parts))
            nodes = ast.walk(ast.parse(file.read_text()))
            graph[name] = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    graph = {name: {other for other in others if other in graph} for name, others in graph.items()}
    assert sum(map(len, graph.values())) > 30
    TopologicalSorter(graph).prepare()  # a CycleError names the circle

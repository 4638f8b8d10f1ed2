"""Pages of the site that are made when `make docs` builds it: documents outside `docs/`, and the references."""

from __future__ import annotations

import os
import re
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import nlgmoe
from nlgmoe.commands.main import COMMANDS, TRAIN_PY, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = {"README.md": "index.md"} | {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")}
LINKED = ("CITATION.cff", "LICENSE", "notebooks/02_routing.ipynb", "notebooks/04_laboratory.ipynb")  # from documents


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for name, page in DOCUMENTS.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for name in LINKED:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links of documents outside `docs/`, and those from it to outside, lead to the pages."""
    markdown = re.sub(r'(\]\(|src=")(?:\.\./|docs/)', r"\1", markdown)
    return markdown.replace("](README.md", "](index.md")


def commands() -> str:
    """Return the help of every command."""
    os.environ["COLUMNS"] = "100"
    parts = ["# Commands\n"]
    for name in (*COMMANDS, *TRAIN_PY):
        text = StringIO()
        with redirect_stdout(text), suppress(SystemExit):
            main([name, "--help"])
        parts.append(f"## nlgmoe {name}\n\n```text\n{text.getvalue().strip()}\n```\n")
    return "\n".join(parts)


def reference() -> str:
    """Return the page of all that `nlgmoe` exports."""
    found = (getattr(nlgmoe, name) for name in sorted(nlgmoe.__all__, key=str.lower))
    names = [f"::: {one.__module__}.{one.__qualname__}" for one in found]
    return "\n\n".join(["# Python", "What `import nlgmoe` offers.", *names]) + "\n"

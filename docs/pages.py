"""Pages of the site that are made when `make docs` builds it: documents outside `docs/`, and the references."""

from __future__ import annotations

import os
import re
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import nlgmoe
from nlgmoe.commands.main import COMMANDS, TRAIN_PY, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = {"README.md": "index.md"} | {
    name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "RELEASING.md")
}
SETTINGS = {  # section of a configuration -> its class
    "model": "nlgmoe.module.MoEGPTModule",
    "model.config": "nlgmoe.config.GPTConfig",
    "model.config.moe": "nlgmoe.config.MoEConfig",
    "model.optimizer": "nlgmoe.optim.optimizer.AdamWConfig",
    "model.optimizer.muon": "nlgmoe.optim.muon.MuonConfig",
    "model.schedule": "nlgmoe.optim.token_schedule.LearningRateSchedule",
    "model.curriculum": "nlgmoe.optim.token_schedule.SequenceCurriculum",
    "model.distiller": "nlgmoe.distill.mixture_of_students.MixtureOfStudents",
    "model.non_finite": "nlgmoe.non_finite.NonFinite",
    "model.warm_start": "nlgmoe.surgery.warm_start.WarmStart",
    "data": "nlgmoe.data.datamodule.PileDataModule",
    "trainer.strategy": "nlgmoe.parallel.strategy.ExpertParallelStrategy",
    "trainer.callbacks": "nlgmoe.run.save_checkpoints.SaveCheckpoints",
}
LINK = re.compile(r"\]\(([\w./-]+)")


def linked() -> set[str]:
    """Return the files outside `docs/` that its guides and the documents link to."""
    guides = [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in DOCUMENTS)]
    links = {(guide.parent / link).resolve() for guide in guides for link in LINK.findall(guide.read_text())}
    outside = {str(link.relative_to(ROOT)) for link in links if link.is_file() and ROOT / "docs" not in link.parents}
    return outside - {*DOCUMENTS}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for name, page in DOCUMENTS.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for name in sorted(linked()):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "reference.md", content=reference()))
    files.append(File.generated(config, "settings.md", content=settings()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links of documents outside `docs/`, and those from it to outside, lead to the pages."""
    if "/" in page.file.src_uri:  # below `docs/`, where ../ is `docs/`
        return markdown
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
    """Return the page of all that `nlgmoe` exports, but for the classes of the settings."""
    found = (getattr(nlgmoe, name) for name in sorted(nlgmoe.__all__, key=str.lower))
    paths = [f"{each.__module__}.{each.__qualname__}" for each in found]
    names = [f"::: {path}" for path in paths if path not in SETTINGS.values()]
    return "\n\n".join(["# Python", "What `import nlgmoe` offers beside the [settings](settings.md).", *names]) + "\n"


def settings() -> str:
    """Return the page of the settings in a configuration, section by section."""
    parts = [
        "# Settings",
        "Sections of a YAML file, and of flags such as `--model.config.moe.top_k 2`. `nlgmoe fit --help` has them too.",
    ]
    parts += [f"## {section}\n\n::: {path}\n    options: {{members: false}}" for section, path in SETTINGS.items()]
    return "\n\n".join(parts) + "\n"

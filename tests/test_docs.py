"""The documents speak of things that exist."""

import pkgutil
import re
from contextlib import redirect_stdout, suppress
from functools import lru_cache
from io import StringIO
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from nlgmoe.commands.main import COMMANDS, TRAIN_PY, function_of
from nlgmoe.commands.main import main as nlgmoe
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.experiment import load_config
from nlgmoe.model.counting import count_parameters
from nlgmoe.model.gpt import GPT
from nlgmoe.versions import versions

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


def test_functions_named_from_the_command_to_the_optimizer_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| \d+ \| `(nlgmoe/[\w/]+\.py)`: (.*?) \|", text, re.MULTILINE)
    assert len(rows) == 14
    for file, functions in rows:
        for function in re.findall(r"(\w+)`", functions):
            assert re.search(rf"^ *def {function}\(", (ROOT / file).read_text(), re.MULTILINE), (file, function)


def anchors(file: Path) -> set[str]:
    """Names of the headings of a Markdown file, as GitHub and the site have them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", file.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_tests_make_targets_and_links_in_the_documents_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    paths = set(re.findall(r"\b(?:nlgmoe|tests|configs|benchmarks|docs)/[\w/.-]+\.(?:py|yaml|md|json)", text))
    assert not [path for path in paths if not (ROOT / path).exists()]
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [test for test in re.findall(r"`(test_\w+)`", text) if f"def {test}(" not in tests]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for part in re.findall(r"class_path[\"']?: [\"']?(nlgmoe(?:\.\w+)+)", text):
        assert isinstance(pkgutil.resolve_name(part), type), part
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        broken += [link] if not target.exists() or (anchor and anchor not in anchors(target)) else []
    assert not broken


def test_guides_are_pages_of_the_site() -> None:
    pages = set(re.findall(r" ([\w.]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    made = {
        "index.md",
        "settings.md",
        "reference.md",
        "commands.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "RELEASING.md",
    }
    assert pages == made | {path.name for path in (ROOT / "docs").glob("*.md")}


def test_predictions_of_the_scaling_guide_can_be_repeated() -> None:
    commands = [words for words in commands_in((ROOT / "docs/scaling.md").read_text()) if words[0] == "inspect"]
    assert len(commands) > 2
    for words in commands:
        if "--simulate" not in words:
            nlgmoe(words)


LABORATORY = re.split(r"^    (?=model:$)", (ROOT / "docs/laboratory.md").read_text(), flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("part", LABORATORY, ids=lambda part: " ".join(part.split()[2:4]))
def test_laboratory_recipes_are_models_that_compute(part: str, tmp_path: Path) -> None:
    text = "".join(takewhile(lambda line: line.startswith("     "), part.splitlines(keepends=True)[1:]))
    (tmp_path / "recipe.yaml").write_text("    model:\n" + text)
    files, quiet = [ROOT / "configs/moe/laptop.yaml", tmp_path / "recipe.yaml"], {"trainer__logger": False}
    before, module = (load_config(some, **quiet).module for some in (files[0], files))
    assert (before.config, before.optimizer_config) != (module.config, module.optimizer_config)
    config, model = module.config, GPT(module.config)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    assert model.logits(model(tokens).hidden).isfinite().all()
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total


def test_router_of_the_readme_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(# my_router.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "my_router.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    settings = pkgutil.resolve_name("my_router.UnitNormRouterConfig")()
    model = GPT(GPTConfig(61, 16, 2, 16, 2, moe=MoEConfig(4, router=settings))).eval()
    (routing,) = model(torch.randint(61, (2, 16))).routings
    assert type(model.blocks[1].moe.router).__name__ == "UnitNormRouter" and routing.tokens_per_expert.sum() == 32


def test_version_in_the_documents_is_that_of_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlgmoe.versions.version", lambda package: "of the last pip install")
    released = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released is not None and versions()["nlgmoe"] == released[1]


def commands_in(text: str) -> list[list[str]]:
    """Words of each command of `nlgmoe` or train.py in the indented and fenced blocks of a document."""
    blocks = [*re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S), "\n".join(re.findall(r"^    (.*)$", text, re.M))]
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    command = re.compile(r"(?:^|\s)(?:nlgmoe|train\.py) ([a-z][a-z-]*(?: .*|$))")
    return [match[1].split() for line in lines if (match := command.search(line.partition("  #")[0]))]


@lru_cache
def options_of(command: str) -> frozenset[str]:
    text = StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        nlgmoe([command, "--help"])
    return frozenset(option.replace("-", "_") for option in re.findall(r"--[\w.-]+", text.getvalue()))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_in_the_documents_have_the_options_that_they_are_given(name: str) -> None:
    for command, *words in commands_in((ROOT / name).read_text()):
        assert command in COMMANDS or command in TRAIN_PY, f"nlgmoe {command}"
        known = options_of(command)
        for word in words:
            option = re.match(r"'?(--[\w.-]+)", word)
            if option and option[1] != "--print_config":
                parts = option[1].replace("-", "_").split(".")
                paths = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
                longest = next((path for path in paths if path in known), None)
                assert longest is not None, f"{command} {word}"
                inner = [name for name in known if name.startswith(f"{longest}.") and not name.endswith(".help")]
                assert longest == paths[0] or not inner, f"{command} {word}"


def test_help_overview_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    nlgmoe(["--help"])
    text = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert function_of(name).__doc__ and f"  {name:<15} {summary}\n" in text

"""Benchmarks write what they measure into a JSON file and a page; generated tables in the repository are up to date."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.timing import RESULTS, Benchmark, Part, interleaved

NAMES = ("layer", "parity", "ranks", "scaling", "step")


@pytest.mark.parametrize("name", NAMES)
def test_timing_tables_of_a_page_are_those_of_the_results(name: str) -> None:
    benchmark: Benchmark = importlib.import_module(f"benchmarks.{name}").BENCHMARK
    results = json.loads((RESULTS / f"{name}.json").read_text())
    page = (RESULTS / benchmark.page).read_text()
    assert list(results) == list(benchmark.parts) and benchmark.in_page(page, results) == page


def test_timing_measures_a_part_and_rewrites_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {
        "first": Part(lambda rounds: {"ms": 10 * rounds}, lambda found: (["ms", "note"], [[found["ms"], None]]), 5),
        "second": Part(lambda rounds: rounds, lambda found: (["rounds"], [[found]])),
    }
    benchmark, page = Benchmark("trial", "page.md", parts), tmp_path / "page.md"
    marks = [f"<!-- bench: trial {part} -->\nold\n<!-- end of bench -->\n" for part in parts]
    page.write_text(f"# Page\n\n{marks[0]}\nbetween\n\n{marks[1]}")
    benchmark.run("a trial", ["--only", "first"], tmp_path)
    text = page.read_text()
    assert "| ms | note |\n|---|---|\n| 50 |  |\n<!-- end of bench -->\n\nbetween" in text
    assert "trial second -->\nold" in text
    assert "`python -m benchmarks.trial --only first`, commit " in text and ", medians of 5 rounds:" in text
    assert "| 50 |  |" in capsys.readouterr().out
    benchmark.run("a trial", ["--rounds", "1"], tmp_path)
    assert json.loads((tmp_path / "trial.json").read_text())["first"]["measured"] == {"ms": 10}
    assert "| 10 |  |" in page.read_text() and "old" not in page.read_text()
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"page\.md lacks the lines <!-- bench: trial first -->"):
        benchmark.run("a trial", ["--tables"], tmp_path)


def test_timing_takes_candidates_in_turn() -> None:
    order: list[str] = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, warm_up=1)
    assert order == ["a", "b"] * 3 and set(seconds) == {"a", "b"}

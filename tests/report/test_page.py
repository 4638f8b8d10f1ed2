"""The page, opened in Chromium without a network."""

import csv
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from nlgmoe import GPTConfig, MoEConfig, MoEGPTModule, WriteReport
from nlgmoe.callbacks import ExpertLoad, ExpertSpecialisation, RunSummary, Throughput
from nlgmoe.commands.main import main
from nlgmoe.monitoring.loggers import RunCSVLogger
from tests.eval.test_specialisation import Spelt
from tests.report.browser import Browser
from tests.test_module import trainer
from tests.tools import needs

# What is drawn in each chart: shapes that plotly made of data, and titles of x axes.
DRAWN = """Object.fromEntries([...document.querySelectorAll(".chart")].map(chart => [chart.parentElement.id, {
  shapes: chart.querySelectorAll(".scatterlayer .trace path.js-line, .scatterlayer .trace path.point, .barlayer .point path, " +
    ".heatmaplayer image").length,
  inside: chart.scrollWidth <= document.documentElement.clientWidth,
  x: [...new Set([...chart.querySelectorAll(".infolayer [class^=g-x] text")].map(text => text.textContent))],
}]))"""
ALL = ["loss", "bits-per-byte", "optimisation", "speed", "time-split", "router", "information"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny PR-MoE, with all that writes into its folder."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = GPTConfig(61, 16, 4, 16, 2, moe=MoEConfig([2, 4], mlp_type="residual"))
    looks = WriteReport(), ExpertLoad(), ExpertSpecialisation(), Throughput(), RunSummary()
    validation = {"val_check_interval": 4, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
    run = trainer(folder, *looks, max_steps=12, log_every_n_steps=2, logger=RunCSVLogger(folder), **validation)
    run.fit(MoEGPTModule(config), Spelt())
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"config": config.to_dict(), "note": "</script><b>"}}))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    needs("chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def opened(browser: Browser, page: Path) -> dict[str, dict]:
    """Return what is drawn; there are no errors and no network requests."""
    browser.open(page)
    drawn: dict[str, dict] = browser.evaluate(DRAWN)
    assert browser.complaints == [] and browser.requests == []
    assert page.stat().st_size < 6e6
    return drawn


def choose(browser: Browser, selector: str, value: str) -> dict[str, dict]:
    """Change a control."""
    browser.evaluate(
        f"(() => {{ const it = document.querySelector('{selector}');"
        f"it.type === 'radio' ? it.checked = true : it.value = '{value}';"
        "it.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )
    drawn: dict[str, dict] = browser.evaluate(DRAWN)
    assert browser.complaints == []
    return drawn


def x_of(browser: Browser, chart: str, trace: int) -> list[float]:
    values: list[float] = browser.evaluate(f"[...document.querySelector('#{chart} .chart').data[{trace}].x]")
    return values


def test_a_run_ends_with_its_report(browser: Browser, run: Path) -> None:
    """`WriteReport` saw no config.yaml yet: blocks have no names, and the page says so."""
    drawn = opened(browser, run / "report.html")
    assert list(drawn) == [*ALL[:-1], "load-0", "information", "preference-0"]
    for name, chart in drawn.items():
        assert chart["shapes"] > 0 and chart["inside"], name
    assert (drawn["load-0"]["shapes"], drawn["preference-0"]["shapes"]) == (2, 4)
    text = browser.evaluate("document.body.innerText")
    assert "No config.yaml" in text and "12, 768" in text and "even" in text
    summary = json.loads((run / "summary.json").read_text())
    steps, validation = (summary[name] / summary["wall_seconds"] for name in ("step_seconds", "validation_seconds"))
    assert f"validation\t{validation:.1%}" in text and f"checkpoints\t{1 - steps - validation:.1%}" in text
    assert f"{summary['train_loss']:.3f}" in text and f"{summary['val_loss']:.3f}" in text


def test_two_runs_over_every_x_axis(browser: Browser, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    with (other / "metrics.csv").open() as file:
        rows = [{name: value for name, value in row.items() if name != "train/flops"} for row in csv.DictReader(file)]
    with (other / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    page = tmp_path / "both.html"
    main(["report", str(run), str(other), "--output", str(page)])
    drawn = opened(browser, page)
    assert list(drawn) == [*ALL[:-1], "load-0", "load-1", "information", "overlap", "preference-0", "preference-1"]
    assert all(chart["shapes"] > 0 for chart in drawn.values())
    assert drawn["loss"]["x"] == ["tokens"]
    with (run / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["train/loss"]]
    tokens = [float(row["train/tokens"]) for row in logged]
    assert x_of(browser, "loss", 1) == pytest.approx(tokens)
    assert x_of(browser, "loss", 2) == pytest.approx([4 * 64, 8 * 64, 12 * 64])  # validation comes after its step
    assert x_of(browser, "load-0", 0) == pytest.approx([token + 64 for token in tokens])
    assert choose(browser, "input[value=steps]", "")["loss"]["x"] == ["steps"]
    assert x_of(browser, "loss", 2) == [4, 8, 12]
    assert choose(browser, "input[value=seconds]", "")["router"]["x"] == ["time (minutes)"]
    elapsed = [float(row["time/elapsed"]) / 60 for row in logged]
    between = [(early + late) / 2 for early, late in pairwise(elapsed)]  # every second step is logged, once it is taken
    assert x_of(browser, "loss", 1)[1:] == pytest.approx(between, rel=1e-4)
    hidden = choose(browser, "input[value=flops]", "")
    assert hidden["loss"]["shapes"] < drawn["loss"]["shapes"]
    assert "not logged by other" in browser.evaluate("document.getElementById('hidden').value")


def test_smoothing_and_layers(browser: Browser, run: Path, tmp_path: Path) -> None:
    page = tmp_path / "one.html"
    main(["report", str(run), "--output", str(page)])
    each = opened(browser, page)["router"]["shapes"]
    assert "layer 1 (block 4)" in browser.evaluate("document.body.innerText")
    assert choose(browser, "#layer", "0")["router"]["shapes"] < each
    choose(browser, "#smoothing", "0")
    script = "[...document.querySelector('#loss .chart').data[{}].y]"
    raw = browser.evaluate(script.format(0))
    assert browser.evaluate(script.format(1)) == pytest.approx(raw)
    choose(browser, "#smoothing", "0.5")
    second = (0.25 * raw[0] + 0.5 * raw[1]) / 0.75
    assert browser.evaluate(script.format(1))[:2] == pytest.approx([raw[0], second])


def test_a_page_lists_what_is_missing(browser: Browser, run: Path, tmp_path: Path) -> None:
    bare, dense, cut = tmp_path / "bare", tmp_path / "dense", tmp_path / "cut"
    for folder in (bare, dense, cut):
        folder.mkdir()
    (bare / "summary.json").write_text(json.dumps({"steps": 3, "val_loss": None, "bits_per_byte": {"all": None}}))
    (dense / "config.yaml").write_text(yaml.safe_dump({"model": {"config": GPTConfig(61, 16, 1, 16, 2).to_dict()}}))
    (cut / "metrics.csv").write_text("step,train/loss,val/bits_per_byte/a,val/bits_per_byte/b\n0,8,,\n0,,2,3\n1,7")
    main(["report", str(bare), "--output", str(tmp_path / "bare.html")])
    assert opened(browser, tmp_path / "bare.html") == {}
    assert "No rows in metrics.csv" in browser.evaluate("document.body.innerText")
    main(["report", str(bare), str(dense), str(cut), str(run), "--output", str(tmp_path / "all.html")])
    drawn = opened(browser, tmp_path / "all.html")
    assert {"loss", "bits-per-byte", "load-3", "preference-3"} <= set(drawn)
    text = browser.evaluate("document.body.innerText")
    assert "A dense model" in text and "No expert_load.csv" in text
    assert drawn["loss"]["x"] == ["steps"]  # not all know their tokens

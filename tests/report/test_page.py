"""The page, opened in Chromium without a network."""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
import yaml

from nlgmoe import GPTConfig, MoEConfig, MoEGPTModule, WriteReport
from nlgmoe.callbacks import ExpertLoad, ExpertSpecialisation, RunSummary, Throughput
from nlgmoe.commands.main import main
from nlgmoe.run.folder import RunCSVLogger
from nlgmoe.tools.report.figures import experts, specialisation, training
from nlgmoe.tools.report.runs import read_runs
from tests.report.browser import Browser
from tests.support.programs import needs
from tests.support.synthetic import Spelt
from tests.support.trainers import trainer

# What is drawn in each chart: shapes that plotly made of data, titles of axes, and the legend.
DRAWN = """Object.fromEntries([...document.querySelectorAll("article")].map(chart => [chart.id, {
  shapes: chart.querySelectorAll(".scatterlayer .trace path.js-line, .scatterlayer .trace path.point, .barlayer .point path, " +
    ".heatmaplayer image").length,
  inside: chart.scrollWidth <= document.documentElement.clientWidth,
  x: [...new Set([...chart.querySelectorAll(".infolayer [class^=g-x] text")].map(text => text.textContent))],
  y: [...new Set([...chart.querySelectorAll(".infolayer [class^=g-y] text")].map(text => text.textContent))],
  legend: [...chart.querySelectorAll(".legend button")].map(name => name.textContent),
}]))"""
ALL = ["loss", "bits-per-byte", "optimisation", "speed", "router", "information"]


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


def choose(browser: Browser, selector: str, value: str = "") -> dict[str, dict]:
    browser.evaluate(
        f"(() => {{ const it = document.querySelector('{selector}');"
        f"it.type === 'radio' ? it.checked = true : it.value = '{value}';"
        "it.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )
    drawn: dict[str, dict] = browser.evaluate(DRAWN)
    assert browser.complaints == []
    return drawn


def values(browser: Browser, chart: str, trace: int, axis: str) -> list[float]:
    """Coordinates of a trace in the first panel of a chart."""
    drawn: list[float] = browser.evaluate(f"[...document.querySelector('#{chart} .plot').data[{trace}].{axis}]")
    return drawn


def copies(run: Path, folder: Path, names: list[str]) -> list[Path]:
    """Copies of a run: `a_1` has another learning rate than `b_1`, and another seed than `a_2`."""
    for name in names:
        shutil.copytree(run, folder / name)
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["model"] |= {"lr": name.split("_")[0], "seed": name.split("_")[1]}
        (folder / name / "config.yaml").write_text(yaml.safe_dump(config))
    return [folder / name for name in names]


def test_report_is_written_at_the_end_of_a_run(browser: Browser, run: Path) -> None:
    """`WriteReport` saw no config.yaml yet: blocks have no names, and the page says so."""
    drawn = opened(browser, run / "report.html")
    assert list(drawn) == [*ALL[:-1], "load-0", "information", "preference-0"]
    for name, chart in drawn.items():
        assert chart["shapes"] > 0 and chart["inside"], name
    titles = {"loss": ["nats per token"], "load-0": ["expert"], "information": ["bits"], "router": []}
    assert {name: drawn[name]["y"] for name in titles} == titles
    assert (drawn["load-0"]["shapes"], drawn["preference-0"]["shapes"]) == (2, 4)
    text = browser.evaluate("document.body.innerText")
    summary = json.loads((run / "summary.json").read_text())
    assert "No config.yaml" in text and "steps\t12" in text and "tokens\t768" in text and "even" in text
    assert f"{summary['train_loss']:.3f}" in text and f"{summary['val_loss']:.3f}" in text


def test_report_uses_properties_that_plotly_knows(run: Path) -> None:
    """plotly.js ignores names that it does not know; `go.Figure` refuses them."""
    charts = [*training(read_runs([run])), *experts(read_runs([run])), *specialisation(read_runs([run]))]
    for panel in (panel for chart in charts for panel in chart.panels):
        go.Figure(panel.traces, panel.layout)


def test_page_shows_two_runs_over_every_x_axis(browser: Browser, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    pd.read_csv(run / "metrics.csv").drop(columns="train/flops").to_csv(other / "metrics.csv", index=False)
    page = tmp_path / "both.html"
    main(["report", str(run), str(other), "--output", str(page)])
    drawn = opened(browser, page)
    assert list(drawn) == [*ALL[:-1], "load-0", "load-1", "information", "preference-0", "preference-1"]
    assert all(chart["shapes"] > 0 for chart in drawn.values())
    assert drawn["loss"]["x"] == ["tokens"]
    logged = pd.read_csv(run / "metrics.csv").dropna(subset="train/loss")
    tokens = logged["train/tokens"].tolist()
    assert values(browser, "loss", 1, "x") == pytest.approx(tokens)
    assert values(browser, "loss", 2, "x") == [4 * 64, 8 * 64, 12 * 64]  # validation comes after its step
    assert values(browser, "load-0", 0, "x") == pytest.approx([token + 64 for token in tokens])
    assert choose(browser, "input[value=steps]")["loss"]["x"] == ["steps"]
    assert values(browser, "loss", 2, "x") == [4, 8, 12]
    assert choose(browser, "input[value=seconds]")["router"]["x"] == ["time (minutes)"]
    elapsed = logged["time/elapsed"].to_numpy() / 60
    between = (elapsed[:-1] + elapsed[1:]) / 2  # every second step is logged, once it is taken
    assert values(browser, "loss", 1, "x")[1:] == pytest.approx(between, rel=1e-4)
    without = choose(browser, "input[value=flops]")
    assert without["loss"]["shapes"] < drawn["loss"]["shapes"]
    assert "not logged by other" in browser.evaluate("document.getElementById('hidden').value")


def test_page_has_smoothing_layers_and_legend(browser: Browser, run: Path, tmp_path: Path) -> None:
    page = tmp_path / "one.html"
    main(["report", str(run), "--output", str(page)])
    each = opened(browser, page)["router"]
    assert each["legend"] == ["layer 0 (block 1)", "layer 1 (block 3)"]
    assert choose(browser, "#layer", "0")["router"]["shapes"] < each["shapes"]
    choose(browser, "#smoothing", "0")
    raw = values(browser, "loss", 0, "y")
    assert values(browser, "loss", 1, "y") == pytest.approx(raw)
    straight = [*range(100, 0, -1)]
    assert browser.evaluate(f"smoothed({straight}, 0.1)") == straight  # it lags nowhere
    assert browser.evaluate("smoothed([9, 0, 3, null, 8], 0.2)") == [9, 4, 1.5, None, 8]
    assert choose(browser, "#layer", "all")["router"]["shapes"] == each["shapes"]
    browser.evaluate("document.querySelector('#router .legend button').click()")
    assert browser.evaluate(DRAWN)["router"]["shapes"] < each["shapes"]
    assert "off" in browser.evaluate("document.querySelector('#router .legend button').className")


def test_page_shows_groups_of_six_runs(browser: Browser, run: Path, tmp_path: Path) -> None:
    names = [f"{model}_{seed}" for model in "abc" for seed in (1, 2)]
    page = tmp_path / "six.html"
    main(["report", *map(str, copies(run, tmp_path, names)), "--group-by", "model.seed", "--output", str(page)])
    for width in (1300, 400):
        browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        drawn = opened(browser, page)
        assert all(chart["inside"] for chart in drawn.values())
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        tables = browser.evaluate(
            "[...document.querySelectorAll('.wide')].map(table => table.scrollWidth <= table.clientWidth)"
        )
        assert width == 400 or all(tables)
    browser.ask("Emulation.clearDeviceMetricsOverride")
    groups = ["lr=a", "lr=b", "lr=c"]
    assert drawn["loss"]["legend"] == drawn["router"]["legend"] == drawn["groups"]["legend"] == groups
    assert choose(browser, "#curves", "runs")["loss"]["legend"] == names
    visible = "[...document.querySelectorAll('.reference')].map(table => table.checkVisibility())"
    assert browser.evaluate(visible) == [True, False, False]
    choose(browser, "#reference", "lr=c")
    assert browser.evaluate(visible) == [False, False, True]
    link = browser.evaluate("document.querySelector('a[download=\"groups.csv\"]').href")
    lines = base64.b64decode(link.partition(",")[2]).decode().splitlines()
    assert lines[0] == ",lr=a,lr=b,lr=c" and "at the end: minus lr=a,,0.0,0.0" in lines
    total = json.loads((run / "summary.json").read_text())["params_total"]
    assert f"parameters,{total}.0,{total}.0,{total}.0" in lines


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

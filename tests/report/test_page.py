"""The page, opened in Chromium without a network."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
import yaml

from nlgmoe import GPTConfig, MoEConfig, MoEGPTModule, WriteReport
from nlgmoe.callbacks import ExpertLoad, RoutingWindows, RunSummary, Throughput
from nlgmoe.commands.main import main
from nlgmoe.run.folder import RunCSVLogger
from nlgmoe.tools.report.figures import experts, specialisation, training
from nlgmoe.tools.report.runs import read_runs
from tests.report.browser import look
from tests.support.programs import needs
from tests.support.synthetic import SyntheticData
from tests.support.trainers import trainer

# For the scripts of tests. `drawn`: shapes that plotly made of data, titles of axes, and the legend, of each chart.
HELPERS = """
const $ = selector => document.querySelector(selector);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const text = () => document.body.innerText;
const drawn = () => Object.fromEntries(all("article").map(chart => [chart.id, {
  shapes: all(".scatterlayer .trace path.js-line, .scatterlayer .trace path.point, .barlayer .point path, .heatmaplayer image",
    chart).length,
  inside: chart.scrollWidth <= document.documentElement.clientWidth,
  x: [...new Set(all(".infolayer [class^=g-x] text", chart).map(text => text.textContent))],
  y: [...new Set(all(".infolayer [class^=g-y] text", chart).map(text => text.textContent))],
  legend: all(".legend button", chart).map(name => name.textContent),
}]));
const choose = (selector, value) => {
  const it = $(selector);
  it.type === "radio" ? it.checked = true : it.value = value;
  it.dispatchEvent(new Event("input", { bubbles: true }));
  return drawn();
};
const values = (chart, trace, axis) => [...$(`#${chart} .plot`).data[trace][axis]];  // of its first panel
"""
ALL = ["loss", "bits-per-byte", "optimisation", "speed", "router"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny PR-MoE, with all that writes into its folder."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = GPTConfig(61, 16, 4, 16, 2, moe=MoEConfig([2, 4], mlp_type="residual"))
    looks = WriteReport(), ExpertLoad(), RoutingWindows(), Throughput(), RunSummary()
    validation = {"val_check_interval": 4, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
    run = trainer(folder, *looks, max_steps=12, log_every_n_steps=2, logger=RunCSVLogger(folder), **validation)
    run.fit(MoEGPTModule(config), SyntheticData())
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"config": config.to_dict(), "note": "</script><b>"}}))
    return folder


@pytest.fixture
def shown(tmp_path: Path) -> Callable[..., Any]:
    needs("chromium")

    def show(page: Path, script: str, width: int = 1366) -> Any:
        assert page.stat().st_size < 6e6
        return look(page, HELPERS + script, tmp_path, width)

    return show


def copies(run: Path, folder: Path, names: list[str]) -> list[Path]:
    """Copies of a run: `a_1` has another learning rate than `b_1`, and another seed than `a_2`."""
    for name in names:
        shutil.copytree(run, folder / name)
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["model"] |= {"lr": name.split("_")[0], "seed": name.split("_")[1]}
        (folder / name / "config.yaml").write_text(yaml.safe_dump(config))
    return [folder / name for name in names]


def test_report_is_written_at_the_end_of_a_run(shown: Callable[..., Any], run: Path) -> None:
    """`WriteReport` saw no config.yaml yet: blocks have no names, and the page says so."""
    drawn, text = shown(run / "report.html", "return [drawn(), text()];")
    assert list(drawn) == [*ALL, "load-0", "preference-0"]
    for name, chart in drawn.items():
        assert chart["shapes"] > 0 and chart["inside"], name
    titles = {"loss": ["nats per token"], "load-0": ["expert"], "router": []}
    assert {name: drawn[name]["y"] for name in titles} == titles
    assert (drawn["load-0"]["shapes"], drawn["preference-0"]["shapes"]) == (2, 2)
    summary = json.loads((run / "summary.json").read_text())
    assert "No config.yaml" in text and "steps\t12" in text and "tokens\t768" in text and "even" in text
    assert f"{summary['train_loss']:.3f}" in text and f"{summary['val_loss']:.3f}" in text


def test_report_uses_properties_that_plotly_knows(run: Path) -> None:
    """plotly.js ignores names that it does not know; `go.Figure` refuses them."""
    charts = [*training(read_runs([run])), *experts(read_runs([run])), *specialisation(read_runs([run]))]
    for panel in (panel for chart in charts for panel in chart.panels):
        go.Figure(panel.traces, panel.layout)


def test_page_shows_two_runs_over_every_x_axis(shown: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    pd.read_csv(run / "metrics.csv").drop(columns="train/flops").to_csv(other / "metrics.csv", index=False)
    page = tmp_path / "both.html"
    main(["report", str(run), str(other), "--output", str(page)])
    seen = shown(
        page,
        """const tokens = { drawn: drawn(), loss: values("loss", 1, "x"), validation: values("loss", 2, "x") };
        tokens.load = values("load-0", 0, "x");
        const steps = { drawn: choose("input[value=steps]"), validation: values("loss", 2, "x") };
        const seconds = { drawn: choose("input[value=seconds]"), loss: values("loss", 1, "x") };
        return { tokens, steps, seconds, flops: { drawn: choose("input[value=flops]"), hidden: $("#hidden").value } };""",
    )
    drawn = seen["tokens"]["drawn"]
    assert list(drawn) == [*ALL, "load-0", "load-1", "preference-0", "preference-1"]
    assert all(chart["shapes"] > 0 for chart in drawn.values())
    assert drawn["loss"]["x"] == ["tokens"]
    logged = pd.read_csv(run / "metrics.csv").dropna(subset="train/loss")
    tokens = logged["train/tokens"].tolist()
    assert seen["tokens"]["loss"] == pytest.approx(tokens)
    assert seen["tokens"]["validation"] == [4 * 64, 8 * 64, 12 * 64]  # validation comes after its step
    assert seen["tokens"]["load"] == pytest.approx([token + 64 for token in tokens])
    assert seen["steps"]["drawn"]["loss"]["x"] == ["steps"] and seen["steps"]["validation"] == [4, 8, 12]
    assert seen["seconds"]["drawn"]["router"]["x"] == ["time (minutes)"]
    elapsed = logged["time/elapsed"].to_numpy() / 60
    between = (elapsed[:-1] + elapsed[1:]) / 2  # every second step is logged, once it is taken
    assert seen["seconds"]["loss"][1:] == pytest.approx(between, rel=1e-4)
    assert seen["flops"]["drawn"]["loss"]["shapes"] < drawn["loss"]["shapes"]
    assert "not logged by other" in seen["flops"]["hidden"]


def test_page_has_smoothing_layers_and_legend(shown: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    page = tmp_path / "one.html"
    main(["report", str(run), "--output", str(page)])
    seen = shown(
        page,
        """const each = drawn().router, one = choose("#layer", "0").router;
        choose("#smoothing", "0");
        const raw = values("loss", 0, "y"), unsmoothed = values("loss", 1, "y");
        const again = choose("#layer", "all").router, button = () => $("#router .legend button");
        button().click();
        return { each, one, raw, unsmoothed, again, off: drawn().router, className: button().className,
          straight: smoothed([...Array(100).keys()], 0.1), gap: smoothed([9, 0, 3, null, 8], 0.2) };""",
    )
    each = seen["each"]
    assert each["legend"] == ["layer 0 (block 1)", "layer 1 (block 3)"]
    assert seen["one"]["shapes"] < each["shapes"]
    assert seen["unsmoothed"] == pytest.approx(seen["raw"])
    assert seen["straight"] == [*range(100)]  # it lags nowhere
    assert seen["gap"] == [9, 4, 1.5, None, 8]
    assert seen["again"]["shapes"] == each["shapes"]
    assert seen["off"]["shapes"] < each["shapes"] and "off" in seen["className"]


def test_page_shows_groups_of_six_runs(shown: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    names = [f"{model}_{seed}" for model in "abc" for seed in (1, 2)]
    page = tmp_path / "six.html"
    main(["report", *map(str, copies(run, tmp_path, names)), "--group-by", "model.seed", "--output", str(page)])
    for width in (1300, 500):  # 500 is the least of Chromium
        seen = shown(
            page,
            """const visible = () => all(".reference").map(table => table.checkVisibility()), first = [drawn(), visible()];
            const fits = all(".wide").every(table => table.scrollWidth <= table.clientWidth);
            choose("#reference", "lr=c");
            return { first, fits, width: document.documentElement.scrollWidth, third: visible(),
              legend: choose("#curves", "runs").loss.legend, csv: $('a[download="groups.csv"]').href };""",
            width,
        )
        drawn, visible = seen["first"]
        assert all(chart["inside"] for chart in drawn.values())
        assert seen["width"] <= width and (width == 500 or seen["fits"])
    groups = ["lr=a", "lr=b", "lr=c"]
    assert drawn["loss"]["legend"] == drawn["router"]["legend"] == drawn["groups"]["legend"] == groups
    assert seen["legend"] == names
    assert (visible, seen["third"]) == ([True, False, False], [False, False, True])
    lines = base64.b64decode(seen["csv"].partition(",")[2]).decode().splitlines()
    assert lines[0] == ",lr=a,lr=b,lr=c" and "at the end: minus lr=a,,0.0,0.0" in lines
    total = json.loads((run / "summary.json").read_text())["params_total"]
    assert f"parameters,{total}.0,{total}.0,{total}.0" in lines


def test_a_page_lists_what_is_missing(shown: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    bare, dense, cut = tmp_path / "bare", tmp_path / "dense", tmp_path / "cut"
    for folder in (bare, dense, cut):
        folder.mkdir()
    (bare / "summary.json").write_text(json.dumps({"steps": 3, "val_loss": None, "bits_per_byte": {"all": None}}))
    (dense / "config.yaml").write_text(yaml.safe_dump({"model": {"config": GPTConfig(61, 16, 1, 16, 2).to_dict()}}))
    (cut / "metrics.csv").write_text("step,train/loss,val/bits_per_byte/a,val/bits_per_byte/b\n0,8,,\n0,,2,3\n1,7")
    main(["report", str(bare), "--output", str(tmp_path / "bare.html")])
    drawn, text = shown(tmp_path / "bare.html", "return [drawn(), text()];")
    assert drawn == {} and "No rows in metrics.csv" in text
    main(["report", str(bare), str(dense), str(cut), str(run), "--output", str(tmp_path / "all.html")])
    drawn, text = shown(tmp_path / "all.html", "return [drawn(), text()];")
    assert {"loss", "bits-per-byte", "load-3", "preference-3"} <= set(drawn)
    assert "A dense model" in text and "No expert_load.csv" in text
    assert drawn["loss"]["x"] == ["steps"]  # not all know their tokens

"""Reading of run folders: complete, incomplete, damaged."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nlgmoe.commands.main import main
from nlgmoe.tools.report.drawing import thinned
from nlgmoe.tools.report.page import clock_values, page
from nlgmoe.tools.report.runs import loads_of, metrics_of, read_runs
from nlgmoe.tools.report.tables import differences

METRICS = """step,train/loss,train/tokens,time/elapsed,val/loss
0,8.0,0,1.0,
1,7.0,10,2.0,
1,,,,7.5
2,5.0,20,3.5,
3,4.0,30,4.5,
3,,,,4.5
4,3."""


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_validation_comes_after_its_step_and_a_row_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    metrics = metrics_of(METRICS)
    assert metrics["train/loss"].to_dict() == {0: 8, 1: 7, 2: 5, 3: 4}
    assert metrics["val/loss"].to_dict() == {2: 7.5, 4: 4.5}
    assert metrics["time/elapsed"].tolist() == [1, 2, 3.5, 4.5]
    (run,) = read_runs([folder(tmp_path / "a", metrics__csv=METRICS)])
    assert clock_values(run) == {"steps": [0, 1, 2, 3], "tokens": [0, 10, 20, 30], "seconds": [0, 1, 2, 3.5]}
    later = run.clock("tokens", np.array([1.5, 5]))
    assert later is not None and later.tolist() == [15, 50]


def test_thinning_keeps_the_mean_of_what_is_finite() -> None:
    series = thinned(pd.Series([1, 3, np.nan, 5, np.inf]), 3)
    assert series.index.tolist() == [0.5, 2.5, 4]
    assert series.tolist()[:2] == [2, 5] and np.isnan(series.tolist()[2])


def test_loads_of_experts_are_read_without_an_incomplete_row() -> None:
    rows = ["step,tokens,moe_layer,dropped,expert_0,expert_1,expert_2"]
    for step in (9, 19):
        rows += [f"{step},{step},0,0.5,{step},2,", f"{step},{step},1,0.5,1,{step},3"]
    first, second = loads_of("\n".join([*rows, "29,29,0,0.1,1"]))  # the last row is not complete
    assert first.index.tolist() == [10, 20] and first.to_numpy().tolist() == [[9, 2], [19, 2]]
    assert second.to_numpy().tolist() == [[1, 9, 3], [1, 19, 3]]
    assert loads_of(rows[0] + "\n") == []


def test_missing_files_of_a_run_are_named(tmp_path: Path) -> None:
    folder(tmp_path / "x/run", config__yaml="model: {}")
    folder(tmp_path / "y/run", metrics__csv="step,train/loss\n0,inf\n")
    (tmp_path / "latest").symlink_to("x/run")
    first, second = read_runs([tmp_path / name for name in ("x/run", "y/run", "y/../x/run", "latest")])
    assert (first.name, second.name) == ("x/run", "y/run")
    notes = "\n".join(first.notes)
    for words in ("No summary.json", "No versions.json", "No rows in metrics.csv", "No expert_load.csv"):
        assert words in notes
    assert any("train/loss is not finite in 1 of 1 rows" in note for note in second.notes)
    assert second.last("train/loss") is None


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("metrics.csv", "step,train/loss\n0,1.5\n2,x\n", "could not convert string to float: 'x'"),
        ("config.yaml", "model: [", "while parsing"),
    ],
)
def test_damaged_file_of_a_run_is_one_line_with_its_path(
    name: str, text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"summary.json": "{}", name: text}
    folder(tmp_path / "run", **{file.replace(".", "__"): content for file, content in files.items()})
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "run")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 1 and len(lines) == 1
    assert f"{tmp_path / 'run' / name} is damaged" in lines[0] and reason in lines[0]


def test_settings_that_differ_between_runs_are_listed(tmp_path: Path) -> None:
    for name, rate in (("a", 1), ("b", 2)):
        model = {"lr": rate, "betas": [0.9, rate], "shape": "<b>"}
        folder(tmp_path / name, config__yaml=json.dumps({"trainer": {"default_root_dir": name}, "model": model}))
    table = differences(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert "model.lr" in table and "[0.9, 2]" in table
    assert "default_root_dir" not in table and "shape" not in table


def test_report_escapes_all_text_of_a_run(tmp_path: Path) -> None:
    evil = "</script><img src=x>"
    files = {"metrics__csv": f"step,val/bits_per_byte/{evil}\n0,1\n"}
    runs = []
    for name in "ab":
        files |= {"config__yaml": json.dumps({"model": {evil: name}}), "versions__json": json.dumps({evil: name})}
        runs.append(folder(tmp_path / f"{name}<i>", **files))
    tags: set[str] = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.add(tag)  # type: ignore[method-assign]
    html = page(read_runs(runs))
    parser.feed(html)
    assert "script" in tags and "table" in tags and "img" not in tags


def test_report_shows_experts_of_a_router_that_is_not_imported(tmp_path: Path) -> None:
    router = "{class_path: nowhere_to_be_found.Router, init_args: {}}"
    text = f"model: {{config: {{vocab_size: 61, num_layers: 4, moe: {{num_experts: [0, 8], router: {router}}}}}}}"
    (run,) = read_runs([folder(tmp_path / "a", config__yaml=text)])
    assert run.layer(0) == "layer 0 (block 3)" and "<td>0/8</td>" in page([run])

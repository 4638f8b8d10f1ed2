"""Reading of run folders, complete and incomplete."""

import errno
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nlgmoe.commands.main import main
from nlgmoe.tools.report.metrics import Series, read_expert_loads, read_metrics
from nlgmoe.tools.report.page import clock_values, page
from nlgmoe.tools.report.runs import read_runs
from nlgmoe.tools.report.tables import differences, flattened

METRICS = """step,train/loss,train/tokens,time/elapsed,val/loss
0,8.0,0,1.0,
1,7.0,10,2.0,
1,,,,7.5
2,5.0,20,3.5,
3,4.0,30,4.5,
3,,,,4.5
4,3.
"""


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_repeated_steps_count_once_and_validation_comes_after_its_step(tmp_path: Path) -> None:
    metrics = read_metrics(folder(tmp_path / "a", metrics__csv=METRICS) / "metrics.csv")
    assert metrics["train/loss"].steps.tolist() == [0, 1, 2, 3, 4]
    assert metrics["train/loss"].values.tolist() == [8, 7, 5, 4, 3]
    assert metrics["val/loss"].steps.tolist() == [2, 4]
    assert metrics["time/elapsed"].values.tolist() == [1, 2, 3.5, 4.5]
    (run,) = read_runs([tmp_path / "a"])
    assert clock_values(run) == {"steps": [0, 1, 2, 3], "tokens": [0, 10, 20, 30], "seconds": [0, 1, 2, 3.5]}


def test_a_callbacks_metric_over_something_else_than_steps_cuts_nothing(tmp_path: Path) -> None:
    """As of positions in the sequence, at each validation; the last value at a position counts."""
    rows = "".join(f"{step},{9 - step},\n" + "".join(f"{at},,{step + at}\n" for at in range(3)) for step in range(5))
    run = folder(tmp_path / "a", metrics__csv=f"step,train/loss,by_position\n{rows}")
    metrics = read_runs([run])[0].metrics
    assert metrics["train/loss"].steps.tolist() == [0, 1, 2, 3, 4]
    assert metrics["by_position"].values.tolist() == [4, 5, 6]


def test_thinning_keeps_the_mean_of_what_is_finite() -> None:
    series = Series(np.arange(5.0), np.array([1, 3, np.nan, 5, 9])).thinned(3)
    assert series.steps.tolist() == [0.5, 2.5, 4]
    assert series.values.tolist() == [2, 5, 9]
    assert np.isnan(Series(np.arange(2.0), np.array([np.inf, np.nan])).thinned(1).values).all()


def test_loads(tmp_path: Path) -> None:
    rows = ["step,tokens,layer,dropped,expert_0,expert_1,expert_2"]
    for step in (9, 19):
        rows += [f"{step},{step},0,0.5,{step},2,", f"{step},{step},1,0.5,1,{step},3"]
    rows += ["29,29,0,0.1,1"]  # cut off
    file = tmp_path / "expert_load.csv"
    file.write_text("\n".join(rows))
    loads = read_expert_loads(file)
    assert loads is not None and loads.steps.tolist() == [10, 20]
    assert [layer.tolist() for layer in loads.requests] == [[[9, 2], [19, 2]], [[1, 9, 3], [1, 19, 3]]]
    thin = loads.thinned(1)
    assert thin.steps.tolist() == [20] and thin.requests[0].tolist() == [[28, 4]]
    file.write_text(rows[0])
    assert read_expert_loads(file) is None and read_expert_loads(tmp_path / "none") is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder(tmp_path / "x/run", config__yaml="model: [", summary__json="[1]")
    folder(tmp_path / "y/run", metrics__csv="step,train/loss\n0,inf\n")
    (tmp_path / "latest").symlink_to("x/run")
    first, second = read_runs(
        [tmp_path / "x/run", str(tmp_path / "y/run"), tmp_path / "y/../x/run", tmp_path / "latest"]
    )
    assert (first.name, second.name) == ("x/run", "y/run")
    notes = "\n".join(first.issues)
    for words in (
        "config.yaml cannot be read",
        "summary.json does not hold",
        "No versions.json",
        "No rows in metrics.csv",
    ):
        assert words in notes
    assert any("No expert_load.csv" in note for note in second.issues)
    assert any("train/loss is not finite in 1 of 1 rows" in note for note in second.issues)
    assert second.last("train/loss") is None


@pytest.mark.usefixtures("no_waiting")
def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    folder(tmp_path / "run", metrics__csv=METRICS)
    (tmp_path / "run/starts").mkdir()
    for name in ("config.yaml", "starts/step-0.yaml", "specialisation.safetensors"):
        os.mkfifo(tmp_path / "run" / name)
    notes = "\n".join(read_runs([tmp_path / "run"])[0].issues)
    assert notes.count("is a FIFO, not a regular file") == 3, notes


def test_damaged_rows_and_changed_settings_are_listed(tmp_path: Path) -> None:
    folder(tmp_path / "run", metrics__csv="step,train/loss\n0,1.5\n1\n2,x\n3,1.0,9\n4,0.5\n")
    (tmp_path / "run/starts").mkdir()
    for name, version, tokens in (("step-0", "2.12", 256), ("step-4", "2.13", 512)):
        settings = f'# {{"torch": "{version}"}}\nmodel: {{train_tokens: {tokens}, seed: 1}}\n'
        (tmp_path / f"run/starts/{name}.yaml").write_text(settings)
    (run,) = read_runs([tmp_path / "run"])
    assert "metrics.csv has 3 damaged rows: what cannot be read of them is left out." in run.issues
    assert "From step 4 on: model.train_tokens 256 -> 512, version of torch 2.12 -> 2.13." in run.issues
    (tmp_path / "run/starts/step-4.yaml").write_text("# {}\nmodel: [")
    assert any("starts/step-4.yaml cannot be read" in note for note in read_runs([tmp_path / "run"])[0].issues)


def test_settings_that_differ(tmp_path: Path) -> None:
    for name, rate in (("a", 1), ("b", 2)):
        folder(
            tmp_path / name,
            config__yaml=f"trainer: {{default_root_dir: {name}}}\nmodel: {{lr: {rate}, betas: [0.9, {rate}], shape: '<b>'}}\n",
        )
    found = differences(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert "model.lr" in found and "[0.9, 2]" in found
    assert "default_root_dir" not in found and "shape" not in found
    assert "the same" in differences(read_runs([tmp_path / "a"]))
    assert flattened({"a": [{"b": 1}, 2], "c": {}}) == {"a[0].b": 1, "a[1]": 2, "c": {}}


def test_nothing_in_a_run_becomes_html(tmp_path: Path) -> None:
    bad = "</script><img src=x onerror=alert(1)>"
    config = json.dumps({"model": {"note": bad, bad: 1}})
    summary = json.dumps({"steps": 9, "versions": {bad: bad}})
    files = {"config__yaml": config, "summary__json": summary, "metrics__csv": METRICS, "samples__txt": bad}
    runs = [folder(tmp_path / f"{n}<img>", **files) for n in "ab"]
    parser, tags = HTMLParser(), set()
    parser.handle_starttag = lambda tag, attributes: tags.add(tag)  # type: ignore[method-assign]
    shown = page(read_runs(runs))
    parser.feed(shown)
    assert "texts by step</summary><pre>&lt;/script&gt;&lt;img" in shown
    assert "script" in tags and "table" in tags and "img" not in tags


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("expert_load.csv", "step,tokens,layer,dropped,expert_0,expert_1\n1,1,0,0,1,2\n2,2,0,0,1,"),
        ("expert_load.csv", "step,tokens,layer,dropped,expert_0\n1,1,nan,0,1\ninf,1,0,0,1\n2,2,0,0,nan\n"),
        ("metrics.csv", "step,train/loss\n1,2\n2,inf\nnan,1\ninf,3\n"),
        ("metrics.csv", "step,experts/0/confidence,experts/8/confidence\n1,0.5,0.6\n2,0.5,0.6\n"),
        ("metrics.csv", 'step,train/loss\n1,2\n2,"' + "x" * 200_000),
        ("summary.json", '{"params_total": 3, "bits_per_byte": [1], "steps": "many", "versions": 7, "val_loss": {}}'),
        ("summary.json", "[" * 100_000),
        ("config.yaml", "model: {config: {moe: 4}}\n"),
        ("config.yaml", "model: {config: null}\n"),
        ("config.yaml", "model: 3\ntrainer: [1]\n1: {2: 3}\n"),
    ],
)
def test_a_damaged_file_affects_only_its_part_of_the_page(name: str, text: str, tmp_path: Path) -> None:
    files = {"summary.json": '{"steps": 9, "versions": {"torch": "9.9.9"}}', "metrics.csv": METRICS, name: text}
    path = folder(tmp_path / "run", **{file.replace(".", "__"): content for file, content in files.items()})
    shown = page(read_runs([path]))
    assert ("9.9.9" in shown) == (name != "summary.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere does not exist; give the folder of a run"),
        (["empty"], "empty is no run folder: there is no metrics.csv, summary.json or config.yaml in it"),
        (["run", "run/summary.json"], "run/summary.json is no run folder"),
        ([], "runs"),
        (["run", "--output", "run"], "--output=run is a folder; give the name of a file"),
        (
            ["run", "--output", "run/metrics.csv"],
            "--output=run/metrics.csv is not a name of a page; let it end in .html",
        ),
    ],
)
def test_a_wrong_command_ends_with_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "empty")
    folder(tmp_path / "run", summary__json=json.dumps({"steps": 1}))
    with pytest.raises(SystemExit) as end:
        main(["report", *arguments])
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]
    assert not list(tmp_path.rglob("*.html")) and not list(tmp_path.rglob(".*writing"))


def test_a_full_disk_is_no_wrong_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "run", summary__json=json.dumps({"steps": 1}))

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "run")])
    assert end.value.code == 1 and "cannot be written (No space left on device); make room" in capsys.readouterr().err


def test_a_run_with_a_router_that_is_not_imported_shows_its_experts(tmp_path: Path) -> None:
    router = "{class_path: nowhere_to_be_found.Router, init_args: {}}"
    text = f"model: {{config: {{vocab_size: 61, num_layers: 4, moe: {{num_experts: [0, 8], router: {router}}}}}}}"
    (run,) = read_runs([folder(tmp_path / "a", config__yaml=text)])
    assert run.blocks == [4] and run.parameters() is None
    assert "<td>0/8</td>" in page([run])

